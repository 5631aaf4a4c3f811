"""Faults put into the kernels' source, and the case of `cases.BY_HAND` that notices each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lorax_kernels import sgmv_programs

SOURCE = Path(sgmv_programs.__file__).read_text()


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old`, which is in the source `times` times, becomes `new`."""

    name: str
    old: str
    new: str
    noticed_by: str
    times: int = 1

    def source(self) -> str:
        assert SOURCE.count(self.old) == self.times, f"{self.name}: no longer in the source"
        return SOURCE.replace(self.old, self.new)

    def programs(self, folder: Path) -> ModuleType:
        """The mutated module. From a file: Triton looks at the source."""
        name = "mutant_" + "".join(c if c.isalnum() else "_" for c in self.name)
        file = folder / f"{name}.py"
        file.write_text(self.source())
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


MUTANTS = (
    Mutant(
        "rank mask of the planes",
        "total, mask=has_row & (column < rank))",
        "total, mask=has_row)",
        "a rank of 8 in tiles of 16",
    ),
    Mutant(
        "rank mask of A",
        "mask=has_a & has_inner",
        "mask=(has_a == has_a) & has_inner",
        "a rank of 8 in tiles of 16",
    ),
    Mutant(
        "rank mask of B",
        "has_inner = inner < rank - at",
        "has_inner = inner < tile_ranks",
        "a rank below the tile's and the plan's",
    ),
    Mutant(
        "row mask",
        "has_row = row < tl.load(tile + 1) - start",
        "has_row = row < tile_rows",
        "one row in a tile of 16",
        times=2,
    ),
    Mutant(
        "row mask of y",
        "inside = has_row & (column < out)",
        "inside = (row >= 0) & (column < out)",
        "-0 below a row with an adapter",
    ),
    Mutant("scale", "scale * total", "total", "a scale of -3"),
    Mutant("plane sum", "range(plane_count)", "range(1)", "five planes"),
    Mutant("plane step", "part += plane_step", "part += 0", "five planes"),
    Mutant(
        "B stride", "+ column * rank", "+ column * width", "a rank below the tile's and the plan's"
    ),
    Mutant(
        "split-K overlap",
        "tl.minimum(begin + steps * tile_inner, features)",
        "tl.minimum(begin + (steps + 1) * tile_inner, features)",
        "five planes",
    ),
    Mutant(
        "split-K gap",
        "begin = plane * steps * tile_inner",
        "begin = plane * (steps + 1) * tile_inner",
        "five planes",
    ),
    Mutant(
        "feature mask",
        "has_inner = inner < features - at",
        "has_inner = inner < tile_inner",
        "features that end in a tile",
    ),
    Mutant(
        "column mask",
        "inside = has_row & (column < out)",
        "inside = has_row & (column >= 0)",
        "-0 below a row with an adapter",
    ),
    Mutant(
        "bf16 truncation",
        "        bits += 0x7FFF + ((bits >> 16) & 1)\n",
        "",
        "sums half-way between bfloat16s",
    ),
    Mutant(
        "ties away from zero",
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
        "sums half-way between bfloat16s",
    ),
    Mutant(
        "shrunk sums not rounded",
        "_rounded(shrunk, b_tile.dtype, promoted)",
        "shrunk",
        "a shrunk 257, half-way in bfloat16",
    ),
    Mutant(
        "one module for all", "packed >> (member * 20)", "packed >> 0", "a group with other outputs"
    ),
    Mutant("B is A", "address + side_step + ", "address + ", "a scale of -3"),
    Mutant(
        "no slot is a slot",
        "mask=slot >= 0, other=0",
        "mask=slot >= -1, other=0",
        "padded tiles",
        times=2,
    ),
)

COMPILED_MUTANTS = (
    Mutant(
        "no hint on A and B",
        "tl.multiple_of(tl.load(cell).to(tl.pointer_type(dtype)), 16)",
        "tl.load(cell).to(tl.pointer_type(dtype))",
        "scalar loads or stores of 16 bits",
    ),
    Mutant(
        "no hint on x",
        "x_start = tl.multiple_of(x_start, 16)",
        "x_start = x_start",
        "scalar loads or stores of 16 bits",
    ),
    Mutant(
        "no hint on y",
        "y_start = tl.multiple_of(y_start, 16)",
        "y_start = y_start",
        "scalar loads or stores of 16 bits",
    ),
    Mutant(
        "no hint on planes",
        "tl.multiple_of(plane_start, 16)",
        "plane_start",
        "scalar loads of 32 bits",
    ),
    Mutant(
        "ranks of any size",
        "tl.minimum(rank, width) // 8 * 8",
        "tl.minimum(rank, width)",
        "scalar loads or stores of 16 bits",
    ),
    Mutant(
        "planes that begin anywhere",
        "begin = plane * steps * tile_inner",
        "begin = plane * steps",
        "scalar loads or stores of 16 bits",
    ),
    Mutant("products in short", ', input_precision="ieee"', "", "float32 products in tf32"),
)
"""What only a compiler notices, with what `compiled.faults` says of it."""
