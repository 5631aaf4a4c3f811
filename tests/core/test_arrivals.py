"""Groups are told of when they are whole, and in their order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.core.arrivals import Arrivals
from lorax_async.errors import InternalError


def test_in_order_however_they_come() -> None:
    arrivals = Arrivals([[], [(10, 20), (40, 50)], [], [(20, 40)], []])
    assert arrivals.take() == [0], "what has no bytes is there"
    arrivals.landed((10, 40))
    assert arrivals.take() == [], "the last is whole, but one before it is not"
    assert arrivals.missing == 10
    arrivals.landed((40, 45))
    arrivals.landed((45, 50))
    assert arrivals.take() == [1, 2, 3, 4]
    assert (arrivals.take(), arrivals.missing) == ([], 0)


def test_bytes_of_no_group_count_for_none() -> None:
    arrivals = Arrivals([[(10, 20)]])
    arrivals.landed((0, 10))
    arrivals.landed((20, 99))
    assert arrivals.missing == 10


def test_the_same_bytes_twice_are_a_fault() -> None:
    arrivals = Arrivals([[(0, 10)]])
    arrivals.landed((0, 6))
    with pytest.raises(InternalError, match="5-10 landed twice"):
        arrivals.landed((5, 10))


@settings(max_examples=200, deadline=None)
@given(owners=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 1 << 16))
def test_against_counting_bytes(owners: list[int], seed: int) -> None:
    """Byte n belongs to group owners[n]; they land in runs, in any order."""
    groups = [[(n, n + 1) for n, owner in enumerate(owners) if owner == g] for g in range(5)]
    arrivals = Arrivals(groups)
    draw = random.Random(seed)
    cuts = sorted({0, len(owners), *(draw.randrange(len(owners)) for _ in range(6))})
    pieces = list(zip(cuts, cuts[1:], strict=False))
    draw.shuffle(pieces)
    here: set[int] = set()
    told: list[int] = arrivals.take()
    for start, stop in pieces:
        arrivals.landed((start, stop))
        here |= set(range(start, stop))
        told += arrivals.take()
        whole = [all(n in here for n, _ in group) for group in groups]
        expected = next((n for n, each in enumerate(whole) if not each), 5)
        assert told == list(range(expected))
    assert told == [0, 1, 2, 3, 4]
