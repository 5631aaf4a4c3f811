"""What lies in a disk cache: names, records, chunk maps, and digests, also those of responses."""

import base64
import hashlib
import json
import re
import struct
from itertools import pairwise
from random import Random
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from refusals import refusals

from lorax_async.cache import base, partials
from lorax_async.cache.partials import CHUNK_BYTES, ChunkMap
from lorax_async.errors import AdapterFormatError, UsageError
from lorax_async.formats.digests import Digest, DigestKind, FileHash, sent_sha256
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.formats.spans import ByteRange, SpanSet

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


@given(TEXT, TEXT, TEXT, TEXT)
def test_an_entry_has_one_name_of_64_digits_whatever_its_key_is(
    a: str, b: str, c: str, d: str
) -> None:
    name = base.CacheKey(a, b).name
    assert re.fullmatch("[0-9a-f]{64}", name)
    assert base.is_entry_name(name)
    assert (name == base.CacheKey(c, d).name) == ((a, b) == (c, d))
    assert name != base.CacheKey(a + "\0", b).name
    if b:
        assert name != base.CacheKey(a + b[0], b[1:]).name, "where a text ends matters"
    assert re.fullmatch(r"scope\.[0-9a-f]{64}", base.scope_name(a))


def test_a_name_is_the_same_in_every_process_and_version() -> None:
    """sha256sum of: 8 bytes of length and the text, twice."""
    assert base.CacheKey("hub:o/n", "abc").name == (
        "4e47a3b77515f05e4bdb997630eec929da4a5e1271b06e68517af5d9721420cd"
    )


def test_files_of_adapters_are_told_by_their_names() -> None:
    """Version 0.2 stored weights in several files too, which count until they are removed."""
    several = ["adapter_model.safetensors.index.json", "adapter_model-00001-of-00002.safetensors"]
    assert all(map(base.is_adapter_file, ["adapter_config.json", WEIGHTS_FILE, *several]))
    others = [
        *("record.json", "verified", "lock", base.scope_name("")),
        *(f"{name}{base.MAP_SUFFIX}" for name in (CONFIG_FILE, WEIGHTS_FILE)),
    ]
    assert not any(map(base.is_adapter_file, others))


def test_a_partials_name_begins_with_its_entrys() -> None:
    entry = base.CacheKey("a", "b").name
    assert base.is_partial_name(f"{entry}.00ff")
    assert base.is_partial_name(f"{entry}.ab-1-2-3.00ff"), "of a former version"
    others = ("lock", entry, f"{entry}.", f"{entry[1:]}.00", f"{entry}.00/..", f"{entry}.00\n")
    assert not any(map(base.is_partial_name, others))
    assert not base.is_entry_name(f"{entry}.00ff")


FILES = (
    base.FileRecord(CONFIG_FILE, 7, 1_700_000_000_123_456_789, Digest("git-sha1", "ab" * 20)),
    base.FileRecord(WEIGHTS_FILE, 2**40, 0, Digest("transport", "01" * 32)),
)
RECORD = base.record_of(base.CacheKey("hub:o/n", "c0ffee"), FILES)
FIELDS: dict[str, Any] = json.loads(RECORD.encoded())


def test_a_record_is_json_that_people_can_read_and_comes_back() -> None:
    assert base.decode_record(RECORD.encoded()) == RECORD
    assert RECORD.nbytes == 2**40 + 7
    assert RECORD.name == FIELDS["entry"] == base.CacheKey("hub:o/n", "c0ffee").name
    assert (FIELDS["format"], FIELDS["source"], FIELDS["version"]) == (1, "hub:o/n", "c0ffee")
    assert FIELDS["files"][0] == {
        "file": "adapter_config.json",
        "nbytes": 7,
        "mtime_ns": 1_700_000_000_123_456_789,
        "kind": "git-sha1",
        "digest": "ab" * 20,
    }


def test_any_key_has_a_record() -> None:
    for text in ("\ud800", "x" * 5_000, "a\nb\x1b[31m", '"}{'):
        record = base.decode_record(base.record_of(base.CacheKey(text, text), FILES).encoded())
        assert record.name == base.CacheKey(text, text).name
        assert record.source.isprintable()
        assert len(record.source) <= 1_000


NO_FILES: list[dict[str, Any]] = [
    *({"file": "../../etc/passwd"}, {"file": "adapter_model.safetensors"}, {"file": 3}),
    {"file": "adapter_model.safetensors.index.json"},
    *({"nbytes": -1}, {"nbytes": True}, {"nbytes": 1.5}, {"mtime_ns": "0"}),
    *({"kind": "md5"}, {"digest": "ab" * 19}),
]
NO_RECORDS: list[dict[str, Any]] = [
    *({"format": 2}, {"entry": 5}, {"source": None}, {"version": []}, {"files": []}),
    *({"files": {}}, {"files": ["adapter_config.json"]}, {"files": FIELDS["files"][:1]}),
    *({"files": [FIELDS["files"][0] | change, FIELDS["files"][1]]} for change in NO_FILES),
]


def test_what_is_no_record_is_refused() -> None:
    contents = [b"", b"[]", b"{}", RECORD.encoded()[:-10]]
    contents += [json.dumps(FIELDS | changes).encode() for changes in NO_RECORDS]
    refusals(base.decode_record, AdapterFormatError, {"the cache's record": contents})


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, int, list[ByteRange]]:
    """A file's size, its chunks', and spans of it."""
    nbytes, chunk = draw(st.integers(1, 120)), draw(st.integers(1, 13))
    starts = draw(st.lists(st.integers(0, nbytes - 1), max_size=14))
    return nbytes, chunk, [(start, draw(st.integers(start + 1, nbytes))) for start in starts]


@given(arrivals(), st.randoms(use_true_random=False))
def test_the_map_on_disk_tells_of_whole_chunks_only(
    case: tuple[int, int, list[ByteRange]], choice: Random
) -> None:
    """Also where each of its bytes is as it was before or after, as a crash may leave it."""
    nbytes, chunk, spans = case
    with mock.patch.object(partials, "CHUNK_BYTES", chunk):
        here, model, found = SpanSet(), set[int](), ChunkMap(nbytes)
        moments = [found.encoded()]
        chunks = [set(range(at, min(nbytes, at + chunk))) for at in range(0, nbytes, chunk)]
        for start, stop in spans:
            model |= set(range(start, stop))
            found.mark((start, stop), here.add(start, stop))
            moments.append(found.encoded())
            left = ChunkMap.decoded(moments[-1], nbytes)
            assert left is not None
            told = {byte for first, last in left.spans() for byte in range(first, last)}
            assert told == set[int]().union(*(each for each in chunks if each <= model))
        content = bytes(choice.choice(each) for each in zip(*moments, strict=True))
        torn = ChunkMap.decoded(content, nbytes)
        assert torn is not None
        assert all(here.covers(start, stop) for start, stop in torn.spans())


def test_a_map_in_the_default_size() -> None:
    """As worked out by hand: 256 KiB a chunk, so 1 MiB and a byte are five."""
    found = ChunkMap((1 << 20) + 1)
    assert (found.chunks, CHUNK_BYTES) == (5, 262_144)
    found.mark((262_143, 786_432), (262_143, 786_432))
    assert found.bits == b"\x06"
    found.mark((786_433, 1_048_577), (786_433, 1_048_577))
    assert list(found.spans()) == [(262_144, 786_432), (1_048_576, 1_048_577)]
    assert found.encoded() == b"LRXCHNK3" + struct.pack("<QQ", 1_048_577, 262_144) + b"\x16"


TEN = 10 * CHUNK_BYTES - 5
"""Bytes of ten chunks."""

GOOD = ChunkMap(TEN).encoded()
WRONG_SIZES = [(TEN + 1, CHUNK_BYTES), (TEN, 0), (TEN, 2 * CHUNK_BYTES)]
NO_MAPS = [
    *(b"", GOOD[:-1], GOOD + b"\0", GOOD[:20], b"X" + GOOD[1:]),
    *(GOOD[:8] + struct.pack("<QQ", *at) + GOOD[24:] for at in WRONG_SIZES),
    GOOD[:-1] + b"\x04",  # the eleventh chunk of ten
]


def test_what_is_no_map_of_the_file_is_none() -> None:
    assert [each for each in NO_MAPS if ChunkMap.decoded(each, TEN) is not None] == []
    for content, nbytes, spans in [
        (ChunkMap(0).encoded(), 0, []),
        (GOOD[:-1] + b"\x03", TEN, [(8 * CHUNK_BYTES, TEN)]),
    ]:
        found = ChunkMap.decoded(content, nbytes)
        assert found is not None
        assert list(found.spans()) == spans


KINDS: list[DigestKind] = ["git-sha1", "sha256", "transport"]


@given(
    content=st.binary(max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    order=st.randoms(),
    kind=st.sampled_from(KINDS),
)
def test_the_digest_is_hashlibs_over_any_order(
    content: bytes, cuts: list[int], order: Random, kind: DigestKind
) -> None:
    """Pieces arrive shuffled; after each, all that is there without a gap is fed."""
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    pieces = list(pairwise(edges))
    order.shuffle(pieces)
    here, found = SpanSet(), FileHash(kind, len(content))
    for start, stop in pieces:
        here.add(start, stop)
        found.feed(memoryview(content)[found.done : here.reach(found.done)])
    header = b"blob %d\0" % len(content)
    oracle = hashlib.sha1(header + content) if kind == "git-sha1" else hashlib.sha256(content)
    assert found.digest() == Digest(kind, oracle.hexdigest())
    assert found.done == len(content)


NO_DIGESTS: list[tuple[Any, Any]] = [
    *(("md5", "0" * 32), ("sha256", "0" * 40), ("sha256", "A" * 64), ("sha256", 5)),
    *(("sha256", "0" * 63 + "\n"), ("git-sha1", "0" * 64), ("transport", ""), ([], "0" * 64)),
]


def test_what_is_no_digest_is_refused() -> None:
    refusals(lambda fields: Digest(*fields), UsageError, {"digest": NO_DIGESTS})


# RFC 9530, B.1: {"hello": "world"} with its line feed.
EXAMPLE = "RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg="
SHA512 = "YMAam51Jz/jOATT6/zvHrLVgOYTGFy1d6GJiOHTohq4yP+pgk4vf2aCsyRZOtw8MjkM7iw7yZ/WkppmM44T3qg=="
TOLD = Digest("sha256", hashlib.sha256(b'{"hello": "world"}\n').hexdigest())
PART = {"content-range": "bytes 0-9/19"}
TELLING = [
    f"sha-256=:{EXAMPLE}:",
    f"sha-256=:{EXAMPLE}:, sha-512=:{SHA512}:",
    f"sha-512=:{SHA512}:,sha-256=:{EXAMPLE}:",
    f"sha-512=:{SHA512}:\t ,\tsha-256=:{EXAMPLE}:",
    f'unixsum=1, a, b=?0, c=-1.5, d=tok/en:x, e="a, \\" :b:", sha-256=:{EXAMPLE}:',
    f'sha-256=:{EXAMPLE}:;note="x"; *more',
    f"sha-256=:AAAA:, sha-256=:{EXAMPLE}:",
]
MALFORMED = [
    *("", ",", "sha-256", "sha-256=:AAAA:", "sha-256=::", f"sha-512=:{SHA512}:"),
    *(f"SHA-256=:{EXAMPLE}:", f"sha-256={EXAMPLE}", f'sha-256="{EXAMPLE}"'),
    *(f"sha-256=:{EXAMPLE}", f"sha-256=:{EXAMPLE[:-1]}:", f"sha-256=:{SHA512}:"),
    f"sha-256=:{EXAMPLE[:-2]}h=:",  # bits behind the last byte
    *(f"sha-256=:{EXAMPLE}:,", f"sha-256=:{EXAMPLE}: sha-512=:{SHA512}:"),
    f"sha-256=:{EXAMPLE}:, sha-256=:AAAA:",  # the last one counts
    *(f"sha-256 = :{EXAMPLE}:", f"sha-256=:{EXAMPLE}:, x=(1 2)", f"sha-256=:{EXAMPLE}:, \xe9"),
    *(f" sha-256=:{EXAMPLE}:", f"sha-256=:{TOLD.value}:"),
    *(part * 20_000 for part in ("a=:", "a;a", 'a="', "a, ", "a=b;c=d ")),  # read in one pass
]


def test_a_representations_digest_is_told_unless_it_is_malformed() -> None:
    for more in ({}, PART):
        assert {sent_sha256({"repr-digest": field, **more}) for field in TELLING} == {TOLD}
    assert [field for field in MALFORMED if sent_sha256({"repr-digest": field}) is not None] == []


WHOLE = {"x-amz-checksum-type": "FULL_OBJECT"}
NOT_OF_ALL: list[tuple[str, dict[str, str]]] = [
    (EXAMPLE, PART),  # it may be that of one part of an upload
    *((EXAMPLE, {"x-amz-checksum-type": kind}) for kind in ("COMPOSITE", "something new")),
    *((f"{EXAMPLE}-3", {}), (f"{EXAMPLE}-3", WHOLE), ("not base64!", {}), ("\xe9", {})),
    # The digest of a part is not that of the file, and RFC 3230 is obsolete.
    ("", {"content-digest": f"sha-256=:{EXAMPLE}:", "digest": f"sha-256={EXAMPLE}"}),
]


def test_an_objects_checksum_is_told_if_it_is_of_all() -> None:
    for more in ({}, WHOLE, PART | WHOLE):
        assert sent_sha256({"x-amz-checksum-sha256": EXAMPLE, **more}) == TOLD
    told = [sent_sha256({"x-amz-checksum-sha256": value} | more) for value, more in NOT_OF_ALL]
    assert told == [None] * len(NOT_OF_ALL)


def test_the_representations_digest_comes_first() -> None:
    other = hashlib.sha256(b"other")
    amazon = {"x-amz-checksum-sha256": base64.b64encode(other.digest()).decode()}
    assert sent_sha256({"repr-digest": f"sha-256=:{EXAMPLE}:", **amazon}) == TOLD
    told = sent_sha256({"repr-digest": "nonsense(", **amazon})
    assert told == Digest("sha256", other.hexdigest())


@given(st.text(alphabet=st.characters(max_codepoint=0xFF), max_size=60))
def test_no_text_is_a_fault(text: str) -> None:
    """Forty-three characters of base64 do not come about by chance."""
    assert sent_sha256({"repr-digest": text, "x-amz-checksum-sha256": text}) is None
