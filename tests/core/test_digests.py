"""Digests against hashlib and git, and those that responses tell: RFC 9530, S3, and nonsense."""

from __future__ import annotations

import base64
import hashlib
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.file_digest import Digest, DigestKind, FileHash, sent_sha256
from lorax_async.core.spans import SpanSet
from lorax_async.errors import UsageError

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


def test_gits_digest_is_what_git_hash_object_says() -> None:
    found = FileHash("git-sha1", 6)
    found.feed(memoryview(b"hello\n"))
    assert found.digest().value == "ce013625030ba8dba906f756967f9e9ca394464a"


NO_DIGESTS: list[tuple[Any, Any]] = [
    *(("md5", "0" * 32), ("sha256", "0" * 40), ("sha256", "A" * 64), ("sha256", 5)),
    *(("sha256", "0" * 63 + "\n"), ("git-sha1", "0" * 64), ("transport", ""), ([], "0" * 64)),
]


def test_what_is_no_digest_is_refused() -> None:
    for kind, value in NO_DIGESTS:
        with pytest.raises(UsageError, match="digest"):
            Digest(kind, value)


# -- what responses tell --------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("value", "more", "told"),
    [
        (EXAMPLE, {}, True),
        (EXAMPLE, {"x-amz-checksum-type": "FULL_OBJECT"}, True),
        (EXAMPLE, PART | {"x-amz-checksum-type": "FULL_OBJECT"}, True),
        (EXAMPLE, PART, False),  # it may be that of one part of an upload
        (EXAMPLE, {"x-amz-checksum-type": "COMPOSITE"}, False),
        (EXAMPLE, {"x-amz-checksum-type": "something new"}, False),
        (f"{EXAMPLE}-3", {}, False),
        (f"{EXAMPLE}-3", {"x-amz-checksum-type": "FULL_OBJECT"}, False),
        *(("not base64!", {}, False), ("\xe9", {}, False)),
        # The digest of a part is not that of the file, and RFC 3230 is obsolete.
        ("", {"content-digest": f"sha-256=:{EXAMPLE}:", "digest": f"sha-256={EXAMPLE}"}, False),
    ],
)
def test_an_objects_checksum_is_told_if_it_is_of_all(
    value: str, more: dict[str, str], told: bool
) -> None:
    assert sent_sha256({"x-amz-checksum-sha256": value} | more) == (TOLD if told else None)


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
