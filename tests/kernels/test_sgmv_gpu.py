"""The GPU's kernels on a GPU: the same cases, the same bits again, and a captured graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from lorax_kernels import apply
from sgmv.cases import BY_HAND, SIGNED, Case, full_grid, pairwise
from sgmv.judge import World

pytestmark = [pytest.mark.gpu, pytest.mark.needs("triton")]

DEVICE = "cuda"
MIXED = Case(
    kind=SIGNED,
    ranks=(16, 8, 0, 64),
    features=(4096, 1024),
    segments=((0, 1), (-1, 2), (1, 3), (3, 1), (0, 16), (2, 1)),
    planes=None,
    members=3,
    spare=True,
)


def require_right(cases: Iterable[Case]) -> None:
    from lorax_kernels import sgmv

    wrong = []
    for case in cases:
        world = World(case, DEVICE)
        planes = world.planes(sgmv)
        world.compute(sgmv, planes)
        wrong += [f"{case}: {text}" for text in world.complaints(planes)]
    assert not wrong, "\n".join(wrong[:20])


def test_cases_by_hand() -> None:
    require_right(BY_HAND.values())


def test_every_pair_of_levels_of_the_grid() -> None:
    require_right(pairwise())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_whole_grid(dtype: str) -> None:
    require_right(full_grid(dtype))


def test_the_entry_that_everybody_calls() -> None:
    world = World(replace(MIXED, members=1), DEVICE)
    [module] = world.modules
    world.arena.remember()
    apply(world.ys[0], world.x, world.plan, module, world.tables)
    no_planes = world.ys[0].new_empty(0, 1, 0, 0)
    assert not world.complaints(no_planes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_inputs_give_equal_bits(dtype: str) -> None:
    from lorax_kernels import sgmv

    worlds = [World(replace(MIXED, dtype=dtype), DEVICE) for _ in range(20)]
    for world in worlds:
        sgmv.apply_group(world.ys, world.x, world.plan, world.modules, world.tables)
    torch.cuda.synchronize()
    first, *others = ([y.view(torch.uint8).cpu() for y in world.ys] for world in worlds)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_captured_graph_meets_the_adapters_and_rows_of_its_replay() -> None:
    """Other weights, ranks and segments in the same tables and tiles: the bits of a plain launch."""
    from lorax_kernels import sgmv

    captured, plain = World(MIXED, DEVICE), World(MIXED, DEVICE)
    sgmv.apply_group(captured.ys, captured.x, captured.plan, captured.modules, captured.tables)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        sgmv.apply_group(captured.ys, captured.x, captured.plan, captured.modules, captured.tables)
    for segments in ([(0, 1, 1), (1, 18, 3)], [(2, 5, 0), (5, 6, 1), (6, 7, 2)], []):
        for world in (captured, plain):
            world.restart(seed=len(segments))
            assert world.plan.tiles is not None
            world.plan.tiles.refill(segments)
        graph.replay()
        sgmv.apply_group(plain.ys, plain.x, plain.plan, plain.modules, plain.tables)
        torch.cuda.synchronize()
        for mine, expected, before in zip(captured.ys, plain.ys, plain.ys_before, strict=True):
            assert torch.equal(mine.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(expected.cpu(), before) == (not segments)
