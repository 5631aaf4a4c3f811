"""A chunk's bit is set when all of its bytes are here, whatever order they came in."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.chunk_map import CHUNK_BYTES, ChunkMap, encoded_size
from lorax_async.core.spans import Span, SpanSet


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, int, list[Span]]:
    """A file's size, its chunks', and spans of it."""
    nbytes, chunk = draw(st.integers(1, 120)), draw(st.integers(1, 13))
    starts = draw(st.lists(st.integers(0, nbytes - 1), max_size=14))
    return nbytes, chunk, [(start, draw(st.integers(start + 1, nbytes))) for start in starts]


def whole_chunks(nbytes: int, chunk: int, model: set[int]) -> set[int]:
    """The bytes of chunks that are in `model` as a whole."""
    parts = (set(range(at, min(nbytes, at + chunk))) for at in range(0, nbytes, chunk))
    return {byte for part in parts if part <= model for byte in part}


@given(arrivals())
def test_the_map_on_disk_tells_of_whole_chunks_only(case: tuple[int, int, list[Span]]) -> None:
    nbytes, chunk, spans = case
    here, model, found = SpanSet(), set[int](), ChunkMap(nbytes, chunk)
    on_disk = bytearray(found.encoded())
    for start, stop in spans:
        model |= set(range(start, stop))
        changed = found.mark((start, stop), here.add(start, stop))
        if changed is not None:
            content, at = changed
            on_disk[at : at + len(content)] = content
        left = ChunkMap.decoded(bytes(on_disk), nbytes)
        assert left is not None
        told = {byte for first, last in left.spans() for byte in range(first, last)}
        assert told == whole_chunks(nbytes, chunk, model)


@given(arrivals(), st.randoms(use_true_random=False))
def test_a_map_torn_between_two_moments_tells_no_lie(
    case: tuple[int, int, list[Span]], choice: Random
) -> None:
    """Each byte as it was before or after: as a crash may leave it."""
    nbytes, chunk, spans = case
    here, found = SpanSet(), ChunkMap(nbytes, chunk)
    moments = [found.encoded()]
    for start, stop in spans:
        found.mark((start, stop), here.add(start, stop))
        moments.append(found.encoded())
    torn = bytes(choice.choice(each) for each in zip(*moments, strict=True))
    left = ChunkMap.decoded(torn, nbytes)
    assert left is not None
    assert all(here.covers(start, stop) for start, stop in left.spans())


def test_a_map_in_the_default_size() -> None:
    """As worked out by hand: 256 KiB a chunk, so 1 MiB and a byte are five."""
    found = ChunkMap((1 << 20) + 1)
    assert (found.chunks, CHUNK_BYTES) == (5, 262_144)
    assert found.mark((262_143, 786_432), (262_143, 786_432)) == (b"\x06", 24)
    assert found.mark((786_433, 1_048_577), (786_433, 1_048_577)) == (b"\x16", 24)
    assert list(found.spans()) == [(262_144, 786_432), (1_048_576, 1_048_577)]
    assert found.encoded() == b"LRXCHNK1" + struct.pack("<QQ", 1_048_577, 262_144) + b"\x16"
    assert encoded_size(1_048_577) == len(found.encoded()) == 25


def test_an_empty_file_has_no_chunk() -> None:
    found = ChunkMap(0)
    assert list(found.spans()) == []
    again = ChunkMap.decoded(found.encoded(), 0)
    assert again is not None
    assert again.chunks == 0


GOOD = ChunkMap(100, 10).encoded()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[:20],
        b"X" + GOOD[1:],
        GOOD[:8] + struct.pack("<QQ", 101, 10) + GOOD[24:],
        GOOD[:8] + struct.pack("<QQ", 100, 0) + GOOD[24:],
        GOOD[:8] + struct.pack("<QQ", 100, 1 << 40) + GOOD[24:],
        GOOD[:-1] + b"\x04",  # the eleventh chunk of ten
    ],
)
def test_what_is_no_map_of_the_file_is_none(content: bytes) -> None:
    assert ChunkMap.decoded(content, 100) is None


def test_the_last_bits_may_be_set() -> None:
    left = ChunkMap.decoded(GOOD[:-1] + b"\x03", 100)
    assert left is not None
    assert list(left.spans()) == [(80, 100)]
