"""A batch in kernel order, worked out by hand and against a definition that goes token by token."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.batch_plan import (
    NOWHERE,
    BatchPlan,
    Place,
    Segments,
    Tenant,
    plan_batch,
    require_current,
)
from lorax_async.errors import HandleClosedError

TENANTS = {0: Tenant(4, 16), 1: Tenant(9, 8), 2: Tenant(5, 16), 3: Tenant(1, 64)}
A, B, C = Place(0, 4), Place(1, 9), Place(2, 5)


def test_rows_are_ordered_by_rank_then_slot() -> None:
    plan = plan_batch([C, NOWHERE, A, B, A, NOWHERE], [1, 2, 1, 20, 3, 1], TENANTS)
    assert plan == BatchPlan(
        order=(1, 5, 3, 2, 4, 0),
        segments=Segments((0, 3, 23, 27, 28), (-1, 1, 0, 2)),
        tiles=((0, 0, 3), (1, 3, 19), (1, 19, 23), (2, 23, 27), (3, 27, 28)),
        groups=((0, 0, 1), (8, 1, 2), (16, 2, 4)),
    )


@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [
        (1, ((0, 0, 1),)),
        (15, ((0, 0, 15),)),
        (16, ((0, 0, 16),)),
        (17, ((0, 0, 16), (0, 16, 17))),
        (33, ((0, 0, 16), (0, 16, 32), (0, 32, 33))),
    ],
)
def test_tiles_cut_a_segment(tokens: int, tiles: tuple[tuple[int, int, int], ...]) -> None:
    assert plan_batch([A], [tokens], TENANTS).tiles == tiles


def test_no_sequences() -> None:
    assert plan_batch([], [], TENANTS) == BatchPlan((), Segments((0,), ()), (), ())


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (Place(0, 3), "generation 3 of slot 0, which generation 4 has"),
        (Place(0, 5), "generation 5 of slot 0, which generation 4 has"),
        (Place(7, 1), "generation 1 of slot 7, which nobody has"),
        (Place(7, -1), "generation -1 of slot 7, which nobody has"),
    ],
)
def test_a_stale_row_is_refused(place: Place, named: str) -> None:
    with pytest.raises(HandleClosedError, match=named):
        plan_batch([A, place, NOWHERE], [1, 1, 1], TENANTS)
    with pytest.raises(HandleClosedError, match=named):
        require_current([A, place, NOWHERE], TENANTS)


def test_current_rows_are_not() -> None:
    require_current([A, NOWHERE, C], TENANTS)


@pytest.mark.parametrize(("places", "lengths"), [([A], [0]), ([A], []), ([A, B], [1])])
def test_sequences_without_tokens_are_refused(places: list[Place], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plan_batch(places, lengths, TENANTS)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([NOWHERE, *(Place(slot, t.generation) for slot, t in TENANTS.items())]),
            st.integers(1, 40),
        ),
        max_size=30,
    ),
    st.integers(1, 16),
)
def test_it_is_the_definition(batch: list[tuple[Place, int]], rows: int) -> None:
    def rank(place: Place) -> int:
        return 0 if place == NOWHERE else TENANTS[place.slot].rank

    order = sorted(range(len(batch)), key=lambda n: (rank(batch[n][0]), batch[n][0].slot))
    tokens = [batch[n][0] for n in order for _ in range(batch[n][1])]
    runs = [(place, len(list(run))) for place, run in groupby(tokens)]
    plan = plan_batch([place for place, _ in batch], [n for _, n in batch], TENANTS, tile_rows=rows)
    assert list(plan.order) == order
    assert plan.segments.slots == tuple(place.slot for place, _ in runs)
    cut = [(s, at) for s, stop, start in _spans(plan.segments) for at in range(start, stop)]
    assert [(s, at) for s, start, stop in plan.tiles for at in range(start, stop)] == cut
    assert all(0 < stop - start <= rows for _, start, stop in plan.tiles)
    ranks = [r for r, first, stop in plan.groups for _ in range(first, stop)]
    assert ranks == [rank(place) for place, _ in runs]
    assert len({r for r, _, _ in plan.groups}) == len(plan.groups)


def _spans(segments: Segments) -> list[tuple[int, int, int]]:
    bounds = segments.bounds
    return [(s, bounds[s + 1], bounds[s]) for s in range(len(segments.slots))]
