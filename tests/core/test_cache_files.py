"""What lies in a disk cache: names, records of entries, and maps of the chunks that are here."""

from __future__ import annotations

import json
import re
import struct
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.cache_names import (
    BUDGET_LOCK,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    CacheKey,
    FileRole,
    Owner,
    PartialName,
    is_entry_name,
    is_partial_name,
    partial_name,
    role_of,
    scope_name,
)
from lorax_async.core.cache_record import FileRecord, decoded_record, record_of
from lorax_async.core.chunk_map import CHUNK_BYTES, ChunkMap, encoded_size
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span, SpanSet
from lorax_async.errors import AdapterFormatError, UsageError

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


# -- names ----------------------------------------------------------------------------------------


@given(TEXT, TEXT, TEXT, TEXT)
def test_an_entry_has_one_name_of_64_digits_whatever_its_key_is(
    a: str, b: str, c: str, d: str
) -> None:
    name = CacheKey(a, b).name
    assert re.fullmatch("[0-9a-f]{64}", name)
    assert is_entry_name(name)
    assert (name == CacheKey(c, d).name) == ((a, b) == (c, d))
    assert name != CacheKey(a + "\0", b).name
    if b:
        assert name != CacheKey(a + b[0], b[1:]).name, "where a text ends matters"
    assert re.fullmatch(r"scope\.[0-9a-f]{64}", scope_name(a))


def test_a_name_is_the_same_in_every_process_and_version() -> None:
    """sha256sum of: 8 bytes of length and the text, twice."""
    assert CacheKey("hub:o/n", "abc").name == (
        "4e47a3b77515f05e4bdb997630eec929da4a5e1271b06e68517af5d9721420cd"
    )


FILE_NAMES = {
    "adapter_config.json": CONFIG_FILE,
    "adapter_model.safetensors.index.json": INDEX_FILE,
    "adapter_model.safetensors": WEIGHTS_FILE,
    "adapter_model-00001-of-00002.safetensors": FileRole("weights", 1, 2),
    "adapter_model-99999-of-99999.safetensors": FileRole("weights", 99_999, 99_999),
}
OTHER_NAMES = [
    *("", "adapter_model.bin", "adapter_model-00000.safetensors", "record.json"),
    *("adapter_model-1-of-2.safetensors", "adapter_model-00001.safetensors"),
    *("adapter_model-00000-of-00002.safetensors", "adapter_model-00003-of-00002.safetensors"),
    *("adapter_config.json.chunks", "../adapter_config.json", "adapter_config.json\n"),
]


def test_files_have_the_names_that_tools_know() -> None:
    assert {role.file_name: role_of(role.file_name) for role in FILE_NAMES.values()} == FILE_NAMES
    assert [name for name in OTHER_NAMES if role_of(name) is not None] == []
    no_files: list[tuple[Any, int, int]] = [
        *(("weights", 100_000, 100_000), ("weights", -1, 0), ("weights", 0, 1)),
        *(("weights", 1, 0), ("weights", 3, 2), ("config", 1, 1), ("index", 0, 1)),
    ]
    for kind, number, count in no_files:
        with pytest.raises(UsageError, match="no "):
            FileRole(kind, number, count)


ENTRY = CacheKey("a", "b").name
OWNER = Owner("0123456789abcdef0123456789abcdef", 4026531836, 2**22, 2**40)


NO_PARTIALS = [
    *(BUDGET_LOCK, ENTRY, f"{ENTRY[1:]}.free.00", f"{ENTRY}.ab-1-2.00", f"{ENTRY}.ab-1-2-x.00"),
    *(f"{ENTRY}.{end}" for end in ("free", "free.", "other.00", "free.00/..", "free.00\n")),
]


def test_a_partials_name_says_who_writes_to_it() -> None:
    for owner in (None, OWNER):
        name = PartialName(ENTRY, owner, "0f" * 8)
        assert partial_name(str(name)) == name
        assert is_partial_name(str(name))
        assert not is_entry_name(str(name))
        assert len(str(name)) < 255
    assert [name for name in NO_PARTIALS if partial_name(name) or is_partial_name(name)] == []


# -- records --------------------------------------------------------------------------------------

FILES = (
    FileRecord(CONFIG_FILE, 7, 1_700_000_000_123_456_789, Digest("git-sha1", "ab" * 20)),
    FileRecord(WEIGHTS_FILE, 2**40, 0, Digest("transport", "01" * 32)),
)
RECORD = record_of(CacheKey("hub:o/n", "c0ffee"), FILES)
FIELDS: dict[str, Any] = json.loads(RECORD.encoded())


def test_a_record_is_json_that_people_can_read_and_comes_back() -> None:
    assert decoded_record(RECORD.encoded()) == RECORD
    assert RECORD.nbytes == 2**40 + 7
    assert RECORD.name == FIELDS["entry"] == CacheKey("hub:o/n", "c0ffee").name
    assert (FIELDS["format"], FIELDS["source"], FIELDS["version"]) == (1, "hub:o/n", "c0ffee")
    assert FIELDS["files"][0] == {
        "file": "adapter_config.json",
        "nbytes": 7,
        "mtime_ns": 1_700_000_000_123_456_789,
        "kind": "git-sha1",
        "digest": "ab" * 20,
    }


@pytest.mark.parametrize("text", ["\ud800", "x" * 5_000, "a\nb\x1b[31m", '"}{'])
def test_any_key_has_a_record(text: str) -> None:
    key = CacheKey(text, text)
    record = decoded_record(record_of(key, FILES).encoded())
    assert record.name == key.name
    assert record.source.isprintable()
    assert len(record.source) <= 1_000


NO_RECORDS: list[dict[str, Any]] = [
    *({"format": 2}, {"entry": 5}, {"source": None}, {"version": []}, {"files": []}),
    *({"files": {}}, {"files": ["adapter_config.json"]}),
    *(
        {"files": [FIELDS["files"][0] | change, FIELDS["files"][1]]}
        for change in [
            *({"file": "../../etc/passwd"}, {"file": "adapter_model.safetensors"}, {"file": 3}),
            *({"nbytes": -1}, {"nbytes": True}, {"nbytes": 1.5}, {"mtime_ns": "0"}),
            *({"kind": "md5"}, {"digest": "ab" * 19}),
        ]
    ),
]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", RECORD.encoded()[:-10]]
    + [json.dumps(FIELDS | changes).encode() for changes in NO_RECORDS],
)
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterFormatError, match="the cache's record"):
        decoded_record(content)


# -- maps of chunks -------------------------------------------------------------------------------


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, int, list[Span]]:
    """A file's size, its chunks', and spans of it."""
    nbytes, chunk = draw(st.integers(1, 120)), draw(st.integers(1, 13))
    starts = draw(st.lists(st.integers(0, nbytes - 1), max_size=14))
    return nbytes, chunk, [(start, draw(st.integers(start + 1, nbytes))) for start in starts]


@given(arrivals(), st.randoms(use_true_random=False))
def test_the_map_on_disk_tells_of_whole_chunks_only(
    case: tuple[int, int, list[Span]], choice: Random
) -> None:
    """Also where each of its bytes is as it was before or after, as a crash may leave it."""
    nbytes, chunk, spans = case
    here, model, found = SpanSet(), set[int](), ChunkMap(nbytes, chunk)
    on_disk, moments = bytearray(found.encoded()), [found.encoded()]
    chunks = [set(range(at, min(nbytes, at + chunk))) for at in range(0, nbytes, chunk)]
    for start, stop in spans:
        model |= set(range(start, stop))
        changed = found.mark((start, stop), here.add(start, stop))
        if changed is not None:
            content, at = changed
            on_disk[at : at + len(content)] = content
        moments.append(found.encoded())
        left = ChunkMap.decoded(bytes(on_disk), nbytes)
        assert left is not None
        told = {byte for first, last in left.spans() for byte in range(first, last)}
        assert told == set[int]().union(*(each for each in chunks if each <= model))
    torn = ChunkMap.decoded(
        bytes(choice.choice(each) for each in zip(*moments, strict=True)), nbytes
    )
    assert torn is not None
    assert all(here.covers(start, stop) for start, stop in torn.spans())


def test_a_map_in_the_default_size() -> None:
    """As worked out by hand: 256 KiB a chunk, so 1 MiB and a byte are five."""
    found = ChunkMap((1 << 20) + 1)
    assert (found.chunks, CHUNK_BYTES) == (5, 262_144)
    assert found.mark((262_143, 786_432), (262_143, 786_432)) == (b"\x06", 24)
    assert found.mark((786_433, 1_048_577), (786_433, 1_048_577)) == (b"\x16", 24)
    assert list(found.spans()) == [(262_144, 786_432), (1_048_576, 1_048_577)]
    assert found.encoded() == b"LRXCHNK1" + struct.pack("<QQ", 1_048_577, 262_144) + b"\x16"
    assert encoded_size(1_048_577) == len(found.encoded()) == 25


GOOD = ChunkMap(100, 10).encoded()


NO_MAPS = [
    *(b"", GOOD[:-1], GOOD + b"\0", GOOD[:20], b"X" + GOOD[1:]),
    *(
        GOOD[:8] + struct.pack("<QQ", *sizes) + GOOD[24:]
        for sizes in [(101, 10), (100, 0), (100, 1 << 40)]
    ),
    GOOD[:-1] + b"\x04",  # the eleventh chunk of ten
]


def test_what_is_no_map_of_the_file_is_none() -> None:
    assert [content for content in NO_MAPS if ChunkMap.decoded(content, 100)] == []
    for content, nbytes, spans in [
        (ChunkMap(0).encoded(), 0, []),
        (GOOD[:-1] + b"\x03", 100, [(80, 100)]),
    ]:
        found = ChunkMap.decoded(content, nbytes)
        assert found is not None
        assert list(found.spans()) == spans
