"""The kernels' plan: what it keeps and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lorax_kernels import Plan


def test_a_plan_keeps_all_segments_as_tensors_and_the_adapters_as_integers() -> None:
    plan = Plan.from_segments([0, 3, 3, 5, 6], [2, 1, -1, 0])
    assert plan.segments == ((0, 3, 2), (5, 6, 0))
    assert (plan.tokens, plan.top_slot) == (6, 2)
    assert (plan.bounds.tolist(), plan.slots.tolist()) == ([0, 3, 3, 5, 6], [2, 1, -1, 0])
    assert plan.bounds.dtype == plan.slots.dtype == torch.int32


@pytest.mark.parametrize(
    ("bounds", "slots", "named"),
    [
        ([], [], "expected 1 bounds from 0 for 0 slots, got 0"),
        ([0, 1], [], "expected 1 bounds"),
        ([1, 2], [0], "got 2 from 1"),
        ([0, 3, 2], [0, 1], "ascending"),
        ([0, 1], [-2], "at least -1, got -2"),
    ],
)
def test_a_plan_refuses(bounds: list[int], slots: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Plan.from_segments(bounds, slots)
