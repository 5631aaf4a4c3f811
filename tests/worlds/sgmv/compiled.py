"""Compiles the kernels for GPUs that are not here: `python -m sgmv.compiled bfloat16 variants`.

Launches are real ones, up to where a driver without a GPU says which one to compile for.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from lorax_kernels import Plan, sgmv, sgmv_programs
from lorax_kernels.tiles import Tiles
from sgmv.cases import TILE_ROWS

TARGETS = (80, 90)
FEATURES = {True: (4096, 4096), False: (67, 129)}
"""Rows that begin where 16-byte loads may, and rows that do not."""

REGISTERS = {"float32": 96, "bfloat16": 72, "float16": 72}
"""Of a thread, of 128, for aligned rows: five blocks per multiprocessor, and seven."""

TABLE_LOADS = 5  # Scalars of 32 bits that a program reads: start, stop, slot, rank, scale


class _NoGpu:
    """A driver for `triton.runtime`, of a GPU that only has a compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


class _Tables:
    """Of 4 modules and 8 slots, without strides of 1."""

    address = torch.zeros(8, 4, 3, dtype=torch.int64)[:, :, :2].permute(2, 1, 0)
    rank = torch.zeros(8, 4, dtype=torch.int32).permute(1, 0)
    scale = torch.zeros(8, 4, 6)[:, :, 4].permute(1, 0)

    def operands(self, module: int, slot: int) -> None:
        """Not there yet."""


class _Warm:
    """In the place of a program: a launch compiles it, and goes no further."""

    def __init__(self, program: Any, compiled: list[Any]) -> None:
        self._program, self._compiled = program, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self._compiled.append(self._program.warmup(*args, grid=grid, **options))

        return launch


@contextmanager
def _compiling(capability: int) -> Iterator[list[Any]]:
    compiled: list[Any] = []
    triton.runtime.driver.set_active(_NoGpu(capability))
    for name in ("shrink_program", "expand_program"):
        setattr(sgmv, name, _Warm(getattr(sgmv_programs, name), compiled))
    yield compiled


@dataclass(frozen=True, slots=True)
class Launch:
    dtype: str
    tile_rows: int
    aligned: bool


def launch(
    dtype: str, tile_rows: int, features: tuple[int, int], *, tokens: int, members: int
) -> None:
    tiles = Tiles(tile_rows, torch.tensor([[0, tokens, 0]], dtype=torch.int32))
    plan = replace(Plan.from_segments([0, tokens], [0]), tiles=tiles)
    x = torch.zeros(tokens, features[0], dtype=getattr(torch, dtype))
    ys = [torch.zeros(tokens, features[1], dtype=x.dtype) for _ in range(members)]
    sgmv.apply_group(ys, x, plan, range(members), _Tables())


def faults(kernel: Any, launched: Launch) -> list[str]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    found = []
    if used["STACK"] or used["LOCAL"]:
        found.append(f"spills: {used}")
    if "wgmma." in ptx:
        found.append("warpgroup instructions, whose operands in registers are miscompiled")
    if re.search(r"\b(atom|red)\.", ptx):
        found.append("atomics")
    if ".tf32" in ptx:
        found.append("float32 products in tf32")
    if launched.aligned:
        found += _slow_loads(ptx, used["REG"], launched)
    rounds = launched.dtype == "bfloat16" and kernel.metadata.name == "expand_program"
    if rounds and "cvt.rn.bf16" not in ptx:
        found.append("no rounding to nearest")
    if launched.dtype != "float32" and not re.search(r"mma\.sync\S+\.f32\.\w+\.\w+\.f32", ptx):
        found.append("no tensor core products that accumulate in float32")
    return [f"{kernel.metadata.name} for {launched}: {text}" for text in found]


def _slow_loads(ptx: str, registers: int, launched: Launch) -> list[str]:
    """Of rows that are aligned: every load of elements takes 16 bytes."""
    found = []
    if registers > REGISTERS[launched.dtype]:
        found.append(f"{registers} registers, more than {REGISTERS[launched.dtype]}")
    if re.search(r"\b(ld|st)\.global\S*\.b16\b", ptx):
        found.append("scalar loads or stores of 16 bits")
    if len(re.findall(r"\bld\.global\.b32\b", ptx)) > TABLE_LOADS:
        found.append("scalar loads of 32 bits")
    if "cp.async.ca" in ptx:
        found.append("copies of less than 16 bytes into shared memory")
    return found


def gates(dtype: str) -> int:
    """Compile what a dtype's launches need; return how many kernels that are."""
    count, found = 0, []
    for capability, rows, aligned in product(TARGETS, TILE_ROWS, FEATURES):
        launched = Launch(dtype, rows, aligned)
        with _compiling(capability) as compiled:
            launch(dtype, rows, FEATURES[aligned], tokens=5, members=3)
        count += len(compiled)
        for kernel in compiled:
            found += [f"sm_{capability} {text}" for text in faults(kernel, launched)]
    assert not found, "\n".join(found)
    return count


def variants() -> int:
    """Whatever the shapes: two tiles times aligned or not, of each program."""
    shapes = ((1, 1), (16, 16), (48, 17), (17, 48), (4096, 1024), (2, 14336))
    launches = list(product(shapes, ((1, 1), (16, 2), (33, 3)), TILE_ROWS))
    with _compiling(90) as compiled:
        for features, (tokens, members), rows in launches:
            launch("bfloat16", rows, features, tokens=tokens, members=members)
    assert len(compiled) == 2 * len(launches)
    different = {kernel.hash for kernel in compiled}
    assert len(different) == 2 * len(TILE_ROWS) * len(FEATURES), len(different)
    return len(launches)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for name in sys.argv[1:]:
            tried = variants() if name == "variants" else gates(name)
            sys.stdout.write(f"{name}: {tried} tried\n")
