"""A batch on the kernels, whole or split over processes: each token gets x · A · B of its own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.stacked import (
    IN,
    LAYERS,
    OUT,
    Case,
    StandIn,
    cases,
    delta_by_address,
    delta_by_token,
    integers,
    load,
    loaded,
    stand_in,
)
from lorax_async.adapters import BatchLoraWeights, Bridge, padded_rank
from lorax_async.errors import IncompatibleAdapterError, UsageError

RANKS = st.one_of(st.integers(1, 20), st.integers(1, 128), st.integers(1, 256))


def bridge_of(weights: dict[int, StandIn], tokens: list[int], world_size: int = 1) -> Bridge:
    return Bridge.of(load(weights, tokens), world_size=world_size)


@settings(max_examples=120, deadline=None)
@given(cases(RANKS))
def test_every_row_gets_its_own_adapter(case: Case) -> None:
    """By a bridge, and by kernels that follow the addresses of the groups."""
    weights = {index: stand_in(rank, seed=index) for index, rank in case.ranks.items()}
    batch = loaded(weights, case.tokens, prefill=case.prefill, heads=case.heads)
    if batch is None:
        assert not weights.keys() & set(case.tokens)
        return
    x, before = integers(99, len(case.rows), IN), integers(98, len(case.rows), OUT)
    expected, y = delta_by_token(weights, case.rows, x, case.layer), before.clone()
    assert torch.equal(delta_by_address(batch, x, case.layer), expected)
    Bridge.of(batch).apply(y, x, case.layer)
    assert torch.equal(y, before + expected)


@pytest.mark.parametrize("local_rank", [1, 4, 8, 10, 12, 16, 200])
def test_any_local_rank_is_applied_and_a_padded_one_where_it_is(local_rank: int) -> None:
    """A rank that is no multiple of 8 is copied; other weights are used in their own memory."""
    weights = {0: stand_in(local_rank, local_rank=local_rank), 1: stand_in(3, seed=1)}
    bridge, tokens = bridge_of(weights, [1, 0, 0]), [1, 0, 0]
    x, y = integers(5, 3, IN), torch.zeros(3, OUT).double()
    first = delta_by_token(weights, tokens, x, 1)
    bridge.apply(y, x, 1)
    assert torch.equal(y, first)
    weights[0].weights_a_t *= 2
    bridge.apply(y, x, 1)
    second = first if local_rank % 8 else delta_by_token(weights, tokens, x, 1)
    assert torch.equal(y, first + second)


IN_EACH, OUT_EACH = 5, 3
"""Of one process, where a side is split."""


@dataclass(frozen=True)
class Whole:
    """A `[layers, in, rank]` and B `[layers, rank, out]` before they are split."""

    a: Tensor
    b: Tensor

    def share(self, world: int, place: int, *, by_rank: bool) -> StandIn:
        a = self.a.chunk(world, dim=2 if by_rank else 1)[place]
        return StandIn(a, self.b.chunk(world, dim=2)[place], "config")


def whole(rank: int, world: int, *, seed: int = 0) -> Whole:
    padded = padded_rank(rank, world)
    a = torch.zeros(LAYERS, IN_EACH * world, padded).double()
    b = torch.zeros(LAYERS, padded, OUT_EACH * world).double()
    a[:, :, :rank] = integers(2 * seed, LAYERS, IN_EACH * world, rank)
    b[:, :rank] = integers(2 * seed + 1, LAYERS, rank, OUT_EACH * world)
    return Whole(a, b)


class World:
    """All processes in one; column-parallel where A is split by rank, else row-parallel."""

    def __init__(
        self,
        adapters: dict[int, Whole],
        tokens: list[int],
        world: int,
        *,
        by_rank: bool,
        prefill: bool = True,
        heads: list[int] | None = None,
    ) -> None:
        self.adapters, self.by_rank, self.size = adapters, by_rank, world
        self.rows = tokens if heads is None else [tokens[at] for at in heads]
        self.processes = []
        for place in range(world):
            shares = {i: one.share(world, place, by_rank=by_rank) for i, one in adapters.items()}
            batch = load(shares, tokens, prefill=prefill, heads=heads)
            self.processes.append(Bridge.of(batch, world_size=world))

    def shrink(self, x: Tensor, layer: int) -> list[Tensor]:
        parts = [x] * self.size if self.by_rank else x.chunk(self.size, dim=1)
        pairs = zip(self.processes, parts, strict=True)
        return [process.shrink(part.contiguous(), layer) for process, part in pairs]

    def apply(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        shrunk = torch.stack(self.shrink(x, layer))
        outputs = [part.clone() for part in y.chunk(self.size, dim=1)]
        for process, output in zip(self.processes, outputs, strict=True):
            process.expand(output, shrunk if self.by_rank else shrunk.sum(dim=0), layer)
        return torch.cat(outputs, dim=1)

    def exact(self, x: Tensor, layer: int) -> Tensor:
        """`x · A · B` of each token's own adapter, of the weights as they were before the split."""
        out = next(iter(self.adapters.values())).b.shape[2]
        delta = torch.zeros(len(self.rows), out).double()
        for row, index in enumerate(self.rows):
            if index in self.adapters:
                one = self.adapters[index]
                delta[row] = x[row] @ one.a[layer].double() @ one.b[layer].double()
        return delta


SHARED: dict[int, list[int]] = {world: [] for world in range(1, 9)}
for each in range(1, 257):
    for world, shared in SHARED.items():
        with suppress(IncompatibleAdapterError):
            padded_rank(each, world)
            shared.append(each)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_all_processes_together_add_each_tokens_adapter(
    data: st.DataObject, world: int, by_rank: bool
) -> None:
    """Every row is shrunk by its process's share, and zero beyond; it may lie in any order."""
    case = data.draw(cases(st.sampled_from(SHARED[world])))
    case.tokens[0] = min(case.ranks)  # one adapter is used
    adapters = {i: whole(rank, world, seed=i) for i, rank in case.ranks.items()}
    every = World(
        adapters, case.tokens, world, by_rank=by_rank, prefill=case.prefill, heads=case.heads
    )
    x = integers(99, len(case.rows), IN_EACH * world)
    before = integers(98, len(case.rows), OUT_EACH * world)
    y = every.apply(before, x, case.layer)
    assert torch.equal(y, before + every.exact(x, case.layer))
    if by_rank:
        shrunk = every.shrink(x, case.layer)
        for place, v in enumerate(shrunk):
            for row, index in enumerate(every.rows):
                expected = torch.zeros(v.shape[1]).double()
                if index in adapters:
                    a = adapters[index].a[case.layer].chunk(world, dim=1)[place]
                    expected[: a.shape[1]] = x[row] @ a
                assert torch.equal(v[row], expected)
        turned = before[:, :OUT_EACH].clone()
        every.processes[0].expand(turned, torch.stack(shrunk, 2).permute(2, 0, 1), case.layer)
        assert torch.equal(turned, y[:, :OUT_EACH])


@pytest.mark.parametrize("by_rank", [True, False, None])
def test_rows_without_weights_keep_their_bits(by_rank: bool | None) -> None:
    before = torch.tensor([-0.0, torch.nan, torch.inf, -torch.nan, 1e-300, 1.0]).double()
    y, x = before.repeat(3, 1), torch.full((3, 2 * IN_EACH), torch.nan).double()
    x[1], y[1] = 1.0, 0.0
    if by_rank is None:
        after = y.clone()
        bridge_of({1: whole(8, 2).share(1, 0, by_rank=True)}, [0, 1, 2]).apply(after, x, 0)
    else:
        after = World({1: whole(8, 2)}, [0, 1, 2], 2, by_rank=by_rank).apply(y, x, 0)
    assert torch.equal(after[[0, 2]].view(torch.int64), y[[0, 2]].view(torch.int64))
    assert after[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [1, 2])
def test_dtypes_of_models(dtype: torch.dtype, world: int) -> None:
    """Integers of this size are exact in all of them."""
    a = integers(1, LAYERS, IN_EACH * world, 16).to(dtype)
    one, x = Whole(a, integers(2, LAYERS, 16, 4).to(dtype)), integers(3, 2, IN_EACH * world)
    every = World({0: one}, [0, 0], world, by_rank=True)
    exact = every.exact(x, 1).to(dtype)
    y = torch.zeros(2, 4, dtype=dtype)
    assert torch.equal(every.apply(y, x.to(dtype), 1), exact)
    if world == 1:
        every.processes[0].apply(y, x.to(dtype), 1)
        assert torch.equal(y, exact)


def shapes(*ranks: tuple[int, int]) -> dict[int, StandIn]:
    """Adapter i has the i-th local rank in A, and whole rank in B."""
    return {
        i: StandIn(integers(1, LAYERS, IN, local), integers(2, LAYERS, rank, OUT))
        for i, (local, rank) in enumerate(ranks)
    }


OTHER = {
    "layers": StandIn(integers(1, LAYERS + 1, IN, 8), integers(1, LAYERS + 1, 8, OUT)),
    "in": StandIn(integers(1, LAYERS, IN + 1, 8), integers(1, LAYERS, 8, OUT)),
    "out": StandIn(integers(1, LAYERS, IN, 8), integers(1, LAYERS, 8, OUT + 1)),
    "dtype": StandIn(torch.ones(LAYERS, IN, 8), torch.ones(LAYERS, 8, OUT)),
}
KINDS = r"adapter 1 has \(layers, in, out, dtypes\) "


@pytest.mark.parametrize(
    ("weights", "world", "named"),
    [
        (
            shapes((12, 48)),
            2,
            "A of adapter 0 has rank 12 and B has 48, which is no share of one in 2",
        ),
        (shapes((12, 48)), 1, "B has 48, which is no share of one in 1"),
        (shapes((8, 16), (8, 24)), 2, "A of adapter 1 has rank 8 and B has 24"),
        (shapes((16, 8)), 2, "A of adapter 0 has rank 16 and B has 8"),
        (shapes((8, 8)), 0, "no share of one in 0 processes; load the weights for this world size"),
        (
            shapes((8, 16), (16, 16)),
            2,
            "A of adapter 1 has 1/1 of its rank, .* the first .* 1/2; load",
        ),
        ({0: stand_in(8), 1: OTHER["layers"]}, 1, KINDS + r"\(3, 5, 3, "),
        ({0: stand_in(8), 1: OTHER["in"]}, 1, KINDS + r"\(2, 6, 3, "),
        ({0: stand_in(8), 1: OTHER["out"]}, 1, KINDS + r"\(2, 5, 4, "),
        ({0: stand_in(8), 1: OTHER["dtype"]}, 1, KINDS + ".*torch.float32.*torch.float64"),
    ],
)
def test_adapters_that_do_not_fit_the_world_or_each_other_are_refused(
    weights: dict[int, StandIn], world: int, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        bridge_of(weights, list(weights), world)


def test_one_processs_share_is_not_applied_as_a_whole() -> None:
    """Split along the input, what tells is a layer's output of all processes, or the world size."""
    share, y = whole(8, 4).share(4, 0, by_rank=False), torch.ones(1, 4 * OUT_EACH).double()
    for world in (1, 4):
        with pytest.raises(UsageError, match="y has 12 columns and B 3: one process's share"):
            bridge_of({0: share}, [0], world).apply(y, torch.ones(1, IN_EACH).double(), 0)
    assert (y == 1).all()
    with pytest.raises(UsageError, match="made by hand, without adapters; use load"):
        Bridge.of(BatchLoraWeights({}, {}, {}, {}, False, "q_proj", None))


@pytest.mark.parametrize(
    ("rows", "layer", "named"),
    [
        (3, 0, r"layer 0: expected x contiguous \[2, features\]"),
        (2, LAYERS, "layer 2: expected a module from 0 to 1, got 2"),
    ],
)
def test_what_the_kernels_refuse_is_refused_with_its_layer(
    rows: int, layer: int, named: str
) -> None:
    y, x = torch.ones(2, OUT).double(), torch.ones(rows, IN).double()
    with pytest.raises(UsageError, match=named):
        bridge_of({0: stand_in(8)}, [0, 0]).apply(y, x, layer)
    with pytest.raises(UsageError, match=named):
        World({0: whole(16, 2)}, [0, 0], 2, by_rank=False).processes[0].shrink(x, layer)
    assert (y == 1).all()


GATHERED = r"layer 0: expected v \[2, 2, 8\], gathered .*"
SUMMED = r"layer 0: expected v \[2, 16\], summed .*"
DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("by_rank", "shape", "dtype", "y_columns", "named"),
    [
        (True, (2, 8), DOUBLE, OUT_EACH, rf"{GATHERED} got \[2, 8\]"),
        (True, (3, 2, 8), DOUBLE, OUT_EACH, rf"{GATHERED} got \[3, 2, 8\]"),
        (True, (2, 2, 8), torch.float32, OUT_EACH, r"in torch.float64, got \[2, 2, 8\] in .*32"),
        (False, (2, 2, 16), DOUBLE, OUT_EACH, rf"{SUMMED} got \[2, 2, 16\]"),
        (False, (3, 16), DOUBLE, OUT_EACH, rf"{SUMMED} got \[3, 16\]"),
        (False, (2, 16), DOUBLE, 6, r"layer 0: .* y \[tokens, 3\] .* y \[2, 6\]"),
    ],
)
def test_what_others_shrank_must_have_come_together(
    by_rank: bool, shape: tuple[int, ...], dtype: torch.dtype, y_columns: int, named: str
) -> None:
    process = World({0: whole(16, 2)}, [0, 0], 2, by_rank=by_rank).processes[0]
    y = torch.ones(2, y_columns).double()
    with pytest.raises(UsageError, match=named):
        process.expand(y, torch.ones(shape, dtype=dtype), 0)
    assert (y == 1).all()
