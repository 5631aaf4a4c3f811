"""Shares that are of no such world, and steps that were left out between them."""

from __future__ import annotations

import pytest
import torch

from adapters.shares import IN_EACH, OUT_EACH, bridges, whole
from adapters.stacked import LAYERS, StandIn, integers, load
from lorax_async.adapters.batching.bridge import Bridge, ShardBridge
from lorax_async.errors import UsageError


def of_ranks(*ranks: tuple[int, int]) -> dict[int, StandIn]:
    """Adapter i has the i-th local rank in A, and whole rank in B."""
    return {
        i: StandIn(integers(1, LAYERS, IN_EACH, local), integers(2, LAYERS, rank, OUT_EACH))
        for i, (local, rank) in enumerate(ranks)
    }


@pytest.mark.parametrize(
    ("ranks", "world", "named"),
    [
        ([(12, 48)], 2, "A of adapter 0 has rank 12 and B has 48, which is no share of one in 2"),
        ([(12, 48)], 1, "B has 48, which is no share of one in 1"),
        ([(8, 16), (8, 24)], 2, "A of adapter 1 has rank 8 and B has 24"),
        ([(16, 8)], 2, "A of adapter 0 has rank 16 and B has 8"),
        ([(8, 8)], 0, "no share of one in 0 processes; load the weights for this world size"),
        ([(8, 16), (16, 16)], 2, "A of adapter 1 has 1/1 of its rank, .* the first .* 1/2; load"),
    ],
)
def test_ranks_that_do_not_fit_the_world_are_refused(
    ranks: list[tuple[int, int]], world: int, named: str
) -> None:
    batch = load(of_ranks(*ranks), list(range(len(ranks))))
    with pytest.raises(UsageError, match=named):
        ShardBridge.of(batch, world_size=world)


def test_whole_application_of_weights_split_by_rank_names_the_methods() -> None:
    named = (
        "A of adapter 0 has rank 12 and B has 48: it is one process's share, and a gather belongs "
        "between them; use ShardBridge.shrink and ShardBridge.expand"
    )
    with pytest.raises(UsageError, match=named):
        Bridge.of(load(of_ranks((12, 48)), [0]))


def test_whole_application_of_weights_split_along_in_names_the_methods() -> None:
    """Their ranks look whole; what tells is a layer's output of all processes."""
    share = whole(8, 4).share(4, 0, by_rank=False)
    y = torch.ones(1, 4 * OUT_EACH).double()
    named = "y has 12 columns and B 3: if it is one process's share of 4, use ShardBridge.shrink"
    with pytest.raises(UsageError, match=named):
        Bridge.of(load({0: share}, [0])).apply(y, torch.ones(1, IN_EACH).double(), 0)
    assert torch.equal(y, torch.ones(1, 4 * OUT_EACH).double())


@pytest.mark.parametrize(
    ("by_rank", "shape", "dtype", "named"),
    [
        (True, (2, 8), torch.float64, r"expected v \[2, 2, 8\], gathered .* got \[2, 8\]"),
        (True, (2, 16), torch.float64, r"expected v \[2, 2, 8\], gathered .* got \[2, 16\]"),
        (True, (3, 2, 8), torch.float64, r"expected v \[2, 2, 8\], gathered .* got \[3, 2, 8\]"),
        (
            True,
            (2, 2, 8),
            torch.float32,
            r"expected v \[2, 2, 8\].* in torch.float64, got \[2, 2, 8\] in .*32",
        ),
        (False, (2, 2, 16), torch.float64, r"expected v \[2, 16\], summed .* got \[2, 2, 16\]"),
        (False, (3, 16), torch.float64, r"layer 0: expected v \[2, 16\], summed .* got \[3, 16\]"),
    ],
)
def test_what_others_shrank_must_have_come_together(
    by_rank: bool, shape: tuple[int, ...], dtype: torch.dtype, named: str
) -> None:
    process = bridges({0: whole(16, 2)}, [0, 0], 2, by_rank=by_rank)[0]
    y = torch.ones(2, OUT_EACH).double()
    with pytest.raises(UsageError, match=named):
        process.expand(y, torch.ones(shape, dtype=dtype), 0)
    assert torch.equal(y, torch.ones(2, OUT_EACH).double())


def test_tensors_that_do_not_fit_are_refused() -> None:
    process = bridges({0: whole(16, 2)}, [0, 0], 2, by_rank=False)[0]
    y, v = torch.ones(2, 2 * OUT_EACH).double(), torch.ones(2, 16).double()
    with pytest.raises(UsageError, match=r"layer 0: .* y \[tokens, 3\] .* y \[2, 6\]"):
        process.expand(y, v, 0)
    with pytest.raises(UsageError, match=f"layer {LAYERS}: expected a module from 0 to"):
        process.expand(y, v, LAYERS)
    with pytest.raises(UsageError, match=r"layer 1: expected x \[tokens, 5\] .* got x \[2, 10\]"):
        process.shrink(torch.ones(2, 2 * IN_EACH).double(), 1)
    with pytest.raises(UsageError, match=r"layer 1: expected x contiguous \[2, features\]"):
        process.shrink(torch.ones(3, IN_EACH).double(), 1)
    assert torch.equal(y, torch.ones(2, 2 * OUT_EACH).double())
