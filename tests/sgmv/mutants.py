"""Faults put into the kernels' source, and the case of `cases.BY_HAND` that notices each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lorax_kernels import sgmv_programs

SOURCE = Path(sgmv_programs.__file__).read_text()


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old` becomes `new`, wherever it is in the source."""

    name: str
    old: str
    new: str
    noticed_by: str

    def source(self) -> str:
        assert self.old in SOURCE, f"{self.name}: no longer in the source"
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


def _by_case(found: Mapping[str, Sequence[tuple[str, str, str]]]) -> tuple[Mutant, ...]:
    """By what notices them: name, old and new."""
    return tuple(Mutant(*row, case) for case, rows in found.items() for row in rows)


MUTANTS = _by_case(
    {
        "a rank of 8 in tiles of 16": [
            (
                "rank mask of the planes",
                "total, mask=has_row & (column < rank))",
                "total, mask=has_row)",
            ),
            ("rank mask of A", "mask=has_a & has_inner", "mask=(has_a == has_a) & has_inner"),
        ],
        "a rank below the tile's and the plan's": [
            ("rank mask of B", "has_inner = inner < rank - at", "has_inner = inner < tile_ranks"),
            ("B stride", "+ column * rank", "+ column * width"),
        ],
        "one row in a tile of 16": [
            ("row mask", "has_row = row < tl.load(tile + 1) - start", "has_row = row < tile_rows")
        ],
        "-0 below a row with an adapter": [
            (
                "row mask of y",
                "inside = has_row & (column < out)",
                "inside = (row >= 0) & (column < out)",
            ),
            (
                "column mask",
                "inside = has_row & (column < out)",
                "inside = has_row & (column >= 0)",
            ),
        ],
        "a scale of -3": [
            ("scale", "scale * total", "total"),
            ("B is A", "address + side_step + ", "address + "),
        ],
        "five planes": [
            ("plane sum", "range(plane_count)", "range(1)"),
            ("plane step", "part += plane_step", "part += 0"),
            (
                "split-K overlap",
                "tl.minimum(begin + steps * tile_inner, features)",
                "tl.minimum(begin + (steps + 1) * tile_inner, features)",
            ),
            (
                "split-K gap",
                "begin = plane * steps * tile_inner",
                "begin = plane * (steps + 1) * tile_inner",
            ),
        ],
        "features that end in a tile": [
            ("feature mask", "has_inner = inner < features - at", "has_inner = inner < tile_inner")
        ],
        "sums half-way between bfloat16s": [
            ("bf16 truncation", "        bits += 0x7FFF + ((bits >> 16) & 1)\n", ""),
            ("ties away from zero", "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
        ],
        "a shrunk 257, half-way in bfloat16": [
            ("shrunk sums not rounded", "_rounded(shrunk, b_tile.dtype, promoted)", "shrunk")
        ],
        "a group with other outputs": [
            ("one module for all", "packed >> (member * 20)", "packed >> 0")
        ],
        "padded tiles": [
            ("no slot is a slot", "mask=slot >= 0, other=0", "mask=slot >= -1, other=0")
        ],
    }
)

COMPILED_MUTANTS = _by_case(
    {
        "scalar loads or stores of 16 bits": [
            (
                "no hint on A and B",
                "tl.multiple_of(tl.load(cell).to(tl.pointer_type(dtype)), 16)",
                "tl.load(cell).to(tl.pointer_type(dtype))",
            ),
            ("no hint on x", "x_start = tl.multiple_of(x_start, 16)", "x_start = x_start"),
            ("no hint on y", "y_start = tl.multiple_of(y_start, 16)", "y_start = y_start"),
            ("ranks of any size", "tl.minimum(rank, width) // 8 * 8", "tl.minimum(rank, width)"),
            (
                "planes that begin anywhere",
                "begin = plane * steps * tile_inner",
                "begin = plane * steps",
            ),
        ],
        "scalar loads of 32 bits": [
            ("no hint on planes", "tl.multiple_of(plane_start, 16)", "plane_start")
        ],
        "float32 products in tf32": [("products in short", ', input_precision="ieee"', "")],
    }
)
"""What only a compiler notices, with what `compiled.faults` says of it."""
