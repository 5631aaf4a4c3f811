"""Digests against hashlib and git, over any order of arrival."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.file_digest import Digest, DigestKind, FileHash
from lorax_async.core.spans import SpanSet
from lorax_async.errors import UsageError


@given(
    st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=12), st.randoms(), st.booleans()
)
def test_the_prefix_digest_is_hashlibs_over_any_order(
    content: bytes, cuts: list[int], order: Random, git: bool
) -> None:
    """Pieces arrive shuffled; after each, all that is there without a gap is fed."""
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    pieces = list(zip(edges, edges[1:], strict=False))
    order.shuffle(pieces)
    here, found = SpanSet(), FileHash("git-sha1" if git else "sha256", len(content))
    for start, stop in pieces:
        here.add(start, stop)
        found.feed(memoryview(content)[found.done : here.reach(found.done)])
    header = b"blob %d\0" % len(content)
    oracle = hashlib.sha1(header + content) if git else hashlib.sha256(content)
    assert found.digest().value == oracle.hexdigest()
    assert found.done == len(content)


@pytest.mark.parametrize(
    ("content", "value"),
    [  # git hash-object --stdin
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ],
)
def test_gits_digest_is_gits(content: bytes, value: str) -> None:
    found = FileHash("git-sha1", len(content))
    found.feed(memoryview(content))
    assert found.digest() == Digest("git-sha1", value)


def test_nobodys_word_is_our_own_sha256() -> None:
    """FIPS 180-2, the example of one block."""
    found = FileHash("transport", 3)
    found.feed(memoryview(b"abc"))
    value = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found.digest() == Digest("transport", value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("md5", "0" * 32),
        ("sha256", "0" * 40),
        ("sha256", "A" * 64),
        ("sha256", "0" * 63 + "\n"),
        ("git-sha1", "0" * 64),
        ("transport", ""),
        ("sha256", 5),
        ([], "0" * 64),
    ],
)
def test_what_is_no_digest_is_refused(kind: DigestKind, value: str) -> None:
    with pytest.raises(UsageError, match="digest"):
        Digest(kind, value)
