"""The GPU's kernels without a GPU: interpreted against float64, and compiled for two; and on one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sgmv.cases import BY_HAND, DTYPES, SIGNED, Case, World, full_grid, pairwise

from lorax_kernels import Operands, Plan, apply

WORLDS, SOAK = Path(__file__).parents[1] / "worlds", pytest.mark.soak
pytestmark = [pytest.mark.needs("triton"), pytest.mark.slow]


@pytest.fixture
def sgmv() -> Any:
    from lorax_kernels import sgmv

    return sgmv


PLAN = Plan.from_segments([0, 3], [0], tile_rows=16, max_rank=8)
X, Y = torch.ones(3, 32), torch.ones(3, 16)


class Tables:
    address = torch.zeros(2, 4, 2, dtype=torch.int64)
    rank = torch.zeros(4, 2, dtype=torch.int32)
    scale = torch.zeros(4, 2)

    def operands(self, module: int, slot: int) -> Operands | None:
        return (torch.ones(8, 32), torch.ones(16, 8), 1.0) if module == 2 else None


@pytest.mark.parametrize(
    ("module", "parts", "timeout"),
    [
        ("interpreted", ["by_hand", "unfit_ranks", "halves"], 280),
        ("interpreted", ["pairs"], 280),
        ("interpreted", ["segments"], 280),
        ("compiled", ["bfloat16", "variants"], 280),
        pytest.param("interpreted", ["grid"], 7200, marks=[SOAK, pytest.mark.timeout(7300)]),
        pytest.param("compiled", ["float32", "float16"], 280, marks=SOAK),
    ],
)
def test_interpreted_and_compiled(module: str, parts: list[str], timeout: float) -> None:
    """In a process: Triton reads once what it is to do, and a stray access ends the process."""
    paths = [str(WORLDS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", f"sgmv.{module}", *parts],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    tried = [line.partition(":")[0] for line in done.stdout.splitlines() if line.endswith(" tried")]
    assert tried == parts


def test_a_group_refuses(sgmv: Any) -> None:
    for ys, x, modules, named in [
        ([], X, [], "expected one to 3 outputs, each with its module, got 0 and 0"),
        ([Y] * 4, X, [0, 1, 2, 3], "got 4 and 4"),
        ([Y], X, [0, 1], "got 1 and 2"),
        ([Y[:2]], X, [0], r"expected y contiguous \[3, features\] on cpu, got \[2, 16\]"),
        ([Y], torch.ones(32, 3).T, [0], r"expected x contiguous \[3, features\]"),
        ([Y, Y.half()], X, [0, 1], "expected y in torch.float32, got torch.float16"),
        ([Y.double()], X.double(), [0], "expected x in torch.bfloat16 or torch.float16 or torch.f"),
        ([Y], Y, [2], r"expected x \[tokens, 32\] in torch.float32, got x \[3, 16\]"),
        ([Y, X], X, [0, 2], r"expected y \[tokens, 16\] in torch.float32, got y \[3, 32\]"),
        ([Y.half()], X.half(), [2], r"in torch.float32, got x \[3, 32\] in torch.float16"),
        ([Y], X, [4], "expected a module from 0 to 3, got 4"),
    ]:
        with pytest.raises(ValueError, match=named):
            sgmv.apply_group(ys, x, PLAN, modules, Tables())


def test_the_halves_refuse_other_partials(sgmv: Any) -> None:
    for shape in ((1, 2, 3, 8), (1, 1, 3, 16), (2, 1, 3, 8)):
        with pytest.raises(ValueError, match=r"expected partials contiguous \[1, 1, 3, 8\]"):
            sgmv.shrink(torch.ones(shape), X, PLAN, [0], Tables())
    with pytest.raises(ValueError, match=r"16 bytes on, got \[1, 1, 3, 8\] in torch.float16"):
        sgmv.shrink(torch.ones(1, 1, 3, 8).half(), X, PLAN, [0], Tables())
    with pytest.raises(ValueError, match=r"expected partials contiguous \[2, 1, 3, 8\]"):
        sgmv.expand([Y], torch.ones(2, 3, 3, 8), PLAN, [0], Tables())
    for modules in ([], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="expected one to 3 modules, got"):
            sgmv.shrink(torch.ones(1, len(modules), 3, 8), X, PLAN, modules, Tables())
    with pytest.raises(ValueError, match="expected a plan with tiles"):
        sgmv.shrink(torch.ones(1), X, Plan.from_segments([0, 3], [0]), [0], Tables())


def test_launches_refuse_tensors_that_overlap(sgmv: Any) -> None:
    memory = torch.ones(96 * 8)
    rows, wide = memory[:48].view(3, 16), memory[32:128].view(3, 32)
    for ys in ([rows], [Y, rows], [Y, torch.ones(3, 16), rows]):
        with pytest.raises(ValueError, match="expected y and x in memory of their own"):
            sgmv.apply_group(ys, wide, PLAN, list(range(len(ys))), Tables())
    later = memory[47:95].view(3, 16)
    for ys in ([rows, later], [later, Y, rows], [Y, Y]):
        with pytest.raises(ValueError, match="expected y and y in memory of their own"):
            sgmv.apply_group(ys, X, PLAN, list(range(len(ys))), Tables())
    partials = memory[20:44].view(1, 1, 3, 8)
    with pytest.raises(ValueError, match="expected partials and x in memory of their own"):
        sgmv.shrink(partials, memory[:96].view(3, 32), PLAN, [0], Tables())
    with pytest.raises(ValueError, match="expected y and partials in memory of their own"):
        sgmv.expand([rows], partials, PLAN, [0], Tables())
    with pytest.raises(ValueError, match="expected h and x in memory of their own"):
        sgmv.shrink_one(memory[30:54].view(3, 8), memory[:96].view(3, 32), PLAN, 0, Tables())
    with pytest.raises(ValueError, match="expected y and h in memory of their own"):
        sgmv.expand_one(rows, memory[30:54].view(3, 8), PLAN, 0, Tables())
    assert (memory == 1).all()


def test_a_launch_refuses_a_scale_that_float32_does_not_hold(sgmv: Any) -> None:
    class Beyond(Tables):
        def operands(self, module: int, slot: int) -> Operands | None:
            return torch.ones(8, 32), torch.ones(16, 8), 1e39

    with pytest.raises(ValueError, match="finite scale .* for module 1, slot 0 has 1e.39"):
        sgmv.apply_group([Y], X, PLAN, [1], Beyond())


def test_the_number_of_partials_follows_from_the_shapes(sgmv: Any) -> None:
    expected = {32: 1, 1024: 2, 4096: 8, 14336: 8}
    for features, count in expected.items():
        assert sgmv.new_split_k_partials(torch.ones(3, features), PLAN, 2).shape == (count, 2, 3, 8)
    busy = Plan.from_segments([0, 3], [0], tile_rows=16, tile_room=512)
    assert sgmv.new_split_k_partials(torch.ones(3, 4096), busy, 1).shape == (1, 1, 3, 256)


DEVICE = "cuda"
MIXED = Case(
    kind=SIGNED,
    ranks=(16, 8, 0, 64),
    features=(4096, 1024),
    segments=((0, 1), (-1, 2), (1, 3), (3, 1), (0, 16), (2, 1)),
    partials=None,
    members=3,
    spare=True,
)


ON_A_GPU = {"by hand": BY_HAND.values, "pairs": pairwise, "grid": full_grid}


@pytest.mark.timeout(3600)
@pytest.mark.gpu
@pytest.mark.parametrize("cases", ON_A_GPU)
def test_cases_on_a_gpu(cases: str, sgmv: Any) -> None:
    wrong = []
    for case in ON_A_GPU[cases]():
        world = World(case, DEVICE)
        partials = world.partials(sgmv)
        world.compute(sgmv, partials)
        wrong += [f"{case}: {text}" for text in world.complaints(partials)]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.gpu
def test_the_entry_that_everybody_calls() -> None:
    world = World(replace(MIXED, members=1), DEVICE)
    [module] = world.modules
    world.arena.remember()
    apply(world.ys[0], world.x, world.plan, module, world.tables)
    no_partials = world.ys[0].new_empty(0, 1, 0, 0)
    assert not world.complaints(no_partials)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_give_equal_bits(dtype: str, sgmv: Any) -> None:
    worlds = [World(replace(MIXED, dtype=dtype), DEVICE) for _ in range(20)]
    for world in worlds:
        sgmv.apply_group(world.ys, world.x, world.plan, world.modules, world.tables)
    torch.cuda.synchronize()
    first, *others = ([y.view(torch.uint8).cpu() for y in world.ys] for world in worlds)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.gpu
def test_a_captured_graph_meets_the_adapters_and_rows_of_its_replay(sgmv: Any) -> None:
    """Other weights, ranks and segments in the same tables and tiles: the bits of a plain launch."""
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
