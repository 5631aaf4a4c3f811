"""Batches for the GPU's kernels, run in an arena of NaN, and what float64 says of them.

Bit for bit where no rounding is allowed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, product
from math import ceil
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorax_kernels import Operands, Plan
from lorax_kernels.tiles import Tiles

INTEGERS, POSITIVE, SIGNED, ONES = "integers", "positive", "signed", "ones"

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One batch on one group of modules.

    `ranks` are by slot, before they are padded to a multiple of 8 (0: does not touch the module);
    those of the second and third module are the same, moved by one and two slots. `segments` are
    (slot, rows), slot -1: no adapter. `partials` of None: as many as the launch would take. `spare`:
    room for two tiles and for ranks that no slot has. The results of INTEGERS lie half-way between
    two numbers of the dtype.
    """

    dtype: str = "bfloat16"
    kind: str = SIGNED
    ranks: tuple[int, ...] = (16, 8, 0, 24)
    features: tuple[int, int] = (67, 129)
    segments: Segments = ((0, 3),)
    partials: int | None = 1
    tile_rows: int = 16
    members: int = 1
    spare: bool = False


DTYPES = ("float32", "bfloat16", "float16")
RANKS = (1, 3, 8, 16, 20, 64, 129, 256)
FEATURES = ((67, 129), (576, 192), (1, 5), (257, 1))
PLANES = (1, 2, 3, None)
ROWS = (0, 1, 15, 16, 17, 33)
AROUND = ("alone", "duplicates", "mixed")
KINDS = (INTEGERS, POSITIVE, SIGNED)
TILE_ROWS = (16, 32)
MEMBERS = (1, 2, 3)
SPARE = (False, True)

_FACTORS: tuple[tuple[object, ...], ...] = (
    *(DTYPES, RANKS, FEATURES, PLANES, ROWS, AROUND),
    *(KINDS, TILE_ROWS, MEMBERS, SPARE),
)


def full_grid() -> Iterator[Case]:
    """Every combination of dtype, rank, features, partials, rows and neighbours; the rest in turn."""
    for place, levels in enumerate(product(*_FACTORS[:6])):
        paces = zip((1, 5, 7, 11), _FACTORS[6:], strict=True)
        yield _case(*levels, *(each[place // pace % len(each)] for pace, each in paces))


def pairwise() -> Iterator[Case]:
    """Cases in which every two levels of any two properties meet. Few, always the same."""
    draw = Random(1)

    def closed(chosen: list[int]) -> set[Any]:
        return open_pairs.intersection(combinations(enumerate(chosen), 2))

    places = [(i, n) for i, levels in enumerate(_FACTORS) for n in range(len(levels))]
    open_pairs = {pair for pair in combinations(places, 2) if pair[0][0] != pair[1][0]}
    while open_pairs:
        drawn = ([draw.randrange(len(levels)) for levels in _FACTORS] for _ in range(100))
        chosen = max(drawn, key=lambda each: len(closed(each)))
        open_pairs -= closed(chosen)
        yield _case(*(levels[n] for levels, n in zip(_FACTORS, chosen, strict=True)))


def _case(*levels: Any) -> Case:
    dtype, rank, features, partials, rows, around, kind, tile_rows, members, spare = levels
    segments = {
        "alone": ((0, rows),),
        "duplicates": ((0, rows), (-1, 1), (0, 2), (1, rows), (0, 1)),
        "mixed": ((-1, 2), (1, 3), (0, rows), (2, 2), (3, 1), (-1, 1)),
    }[around]
    ranks = (rank, 8, 0, 24)
    return Case(dtype, kind, ranks, features, segments, partials, tile_rows, members, spare)


_WHOLE = Case(dtype="float32", kind=INTEGERS, ranks=(8,), segments=((0, 1),))
BY_HAND = {
    "a rank of 8 in tiles of 16": replace(_WHOLE, segments=((0, 3),)),
    "one row in a tile of 16": replace(_WHOLE, segments=((0, 1), (-1, 2))),
    "a scale of -3": _WHOLE,
    "five partials": replace(_WHOLE, features=(576, 8), partials=5),
    "a rank below the tile's and the plan's": replace(_WHOLE, features=(5, 40), spare=True),
    "features that end in a tile": replace(_WHOLE, features=(130, 40)),
    "-0 below a row with an adapter": Case(segments=((0, 1), (-1, 2)), features=(5, 65)),
    "a group with other outputs": replace(_WHOLE, ranks=(8, 16, 24), members=3),
    "slots without the module": Case(ranks=(0, 8), segments=((0, 2), (1, 2), (0, 1))),
    "padded tiles": Case(spare=True),
    "sums half-way between bfloat16s": Case(kind=INTEGERS, ranks=(8,), segments=((0, 16),)),
    "sums half-way between float16s": Case(dtype="float16", kind=INTEGERS, segments=((0, 16),)),
    "a shrunk 257, half-way in bfloat16": Case(kind=ONES, ranks=(1,), features=(257, 8)),
    "a shrunk 259, half-way in bfloat16": Case(kind=ONES, ranks=(1,), features=(259, 8)),
    "a shrunk 2051, half-way in float16": Case("float16", ONES, (1,), (2051, 8), partials=None),
    "nothing but rows without an adapter": Case(segments=((-1, 3), (-1, 1))),
    "no rows": Case(segments=()),
}


ALIGNMENT, GUARD = 64, 1 << 12
MARGIN = 1 << 16  # Bytes at both ends: a kernel that reads far beyond its operands still reads NaN
_NAN = 0xFF  # As every byte of a number: NaN in float32, float16 and bfloat16


class Arena:
    """Tensors one after the other in one buffer of a device, with guards between them."""

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self.memory = torch.full((nbytes + 2 * MARGIN,), _NAN, dtype=torch.uint8, device=device)
        self._next = MARGIN + -self.memory.data_ptr() % ALIGNMENT
        self._before = self.memory
        self._spans: list[tuple[int, int]] = []

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._next = self._next, self._next + -(-(nbytes + GUARD) // ALIGNMENT) * ALIGNMENT
        assert self._next <= len(self.memory) - MARGIN, "the arena is too small for this case"
        self._spans.append((start, start + nbytes))
        return self.memory[start : start + nbytes].view(dtype).view(shape)

    def put(self, values: Tensor) -> Tensor:
        view = self.room(*values.shape, dtype=values.dtype)
        view.copy_(values)
        return view

    def owned(self) -> Tensor:
        """Bool, by byte of the memory: where tensors are."""
        owned = torch.zeros(len(self.memory), dtype=torch.bool)
        for start, stop in self._spans:
            owned[start:stop] = True
        return owned

    def remember(self) -> None:
        self._before = self.memory.clone()

    def changed_outside(self, views: Sequence[Tensor]) -> int:
        """Bytes that are not in `views` and not what they were."""
        different = self.memory != self._before
        for view in views:
            start = view.data_ptr() - self.memory.data_ptr()
            different[start : start + view.numel() * view.element_size()] = False
        return int(different.sum())


MODULES = (4, 1, 3)  # Of five; the other rows of the tables lead nowhere
_INNER = {16: 128, 32: 64}  # Features that are never cut, by a tile's rows
_HALF_WAY_FROM = {"float32": 1 << 24, "bfloat16": 1 << 8, "float16": 1 << 11}
"""From here on, odd integers lie between two numbers."""


class ArenaTables:
    """Tables whose columns are contiguous, as a GPU's are, and host views for the reference."""

    def __init__(self, arena: Arena, case: Case) -> None:
        slots = len(case.ranks)
        entries = arena.put(torch.zeros(slots, 5, 3, dtype=torch.int64, device=arena.memory.device))
        entries[:] = arena.memory.data_ptr()
        self.address = entries[:, :, :2].permute(2, 1, 0)
        self.scale = entries.view(torch.float32)[:, :, 4].permute(1, 0)
        ranks = torch.full((slots, 5), 8, dtype=torch.int32, device=arena.memory.device)
        self.rank = arena.put(ranks).permute(1, 0)
        self._operands: dict[tuple[int, int], Operands] = {}

    def put(self, module: int, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        self.address[0, module, slot], self.address[1, module, slot] = a.data_ptr(), b.data_ptr()
        self.rank[module, slot] = a.shape[0]
        self.scale[module, slot] = scale
        if len(a):
            self._operands[module, slot] = a.cpu(), b.cpu(), scale

    def operands(self, module: int, slot: int) -> Operands | None:
        return self._operands.get((module, slot))


class World:
    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.modules = MODULES[: case.members]
        self._generator = torch.Generator().manual_seed(1)
        self.arena = Arena(_nbytes(case), device)
        self.tables = ArenaTables(self.arena, case)
        for member, module in enumerate(self.modules):
            for slot in range(len(case.ranks)):
                rank = case.ranks[(slot + member) % len(case.ranks)]
                self._put_adapter(module, slot, rank, self._out(member))
        self.plan = self._make_plan(device)
        self.x = self.arena.put(self._draw(self.plan.tokens, case.features[0]))
        self.ys = [self.arena.put(self._y(self._out(n))) for n in range(case.members)]
        self._poison_base_rows()
        self.x_before, self.ys_before = self.x.clone().cpu(), [y.clone().cpu() for y in self.ys]

    def restart(self, seed: int) -> None:
        """Other numbers in x and y, without NaN, and other ranks in the tables."""
        self._generator.manual_seed(seed)
        self.x.copy_(self._draw(*self.x.shape))
        for y in self.ys:
            y.copy_(self._draw(*y.shape))
        self.ys_before = [y.clone().cpu() for y in self.ys]
        ranks = torch.tensor(self.case.ranks, dtype=torch.int32)
        for member, module in enumerate(self.modules):
            padded = (ranks + -ranks % 8).roll(-member)
            self.tables.rank[module] = padded if seed % 2 else padded.clamp(max=8)

    def _poison_base_rows(self) -> None:
        """What must not be read into other rows, and what would change if 0 was added."""
        base = torch.ones(self.plan.tokens, dtype=torch.bool, device=self.x.device)
        for start, stop, _ in self.plan.segments:
            base[start:stop] = False
        self.x[base] = torch.nan
        for y in self.ys:
            y[base] = -0.0

    def _out(self, member: int) -> int:
        """The second module's output is smaller, as that of k is; the third's larger."""
        out = self.case.features[1]
        return (out, ceil(out / 3), out + 16)[member]

    def _draw(self, *shape: int) -> Tensor:
        if self.case.kind == ONES:
            return torch.ones(shape, dtype=self.dtype)
        if self.case.kind == INTEGERS:
            return torch.randint(-1, 2, shape, generator=self._generator).to(self.dtype)
        low = 0.0 if self.case.kind == POSITIVE else -1.0
        return torch.empty(shape).uniform_(low, 1.0, generator=self._generator).to(self.dtype)

    def _y(self, out: int) -> Tensor:
        if self.case.kind == ONES:
            return torch.ones(self.plan.tokens, out, dtype=self.dtype)
        if self.case.kind != INTEGERS:
            return self._draw(self.plan.tokens, out)
        even = 2 * torch.randint(0, 100, (self.plan.tokens, out), generator=self._generator)
        return (_HALF_WAY_FROM[self.case.dtype] + even).to(self.dtype)

    def _put_adapter(self, module: int, slot: int, rank: int, out: int) -> None:
        padded = rank + -rank % 8
        a = torch.zeros(padded, self.case.features[0], dtype=self.dtype)
        b = torch.zeros(out, padded, dtype=self.dtype)
        a[:rank], b[:, :rank] = self._draw(rank, self.case.features[0]), self._draw(out, rank)
        if self.case.kind not in {INTEGERS, ONES}:
            b /= 8  # so that no sum is too large for float16
        scale = {INTEGERS: -3.0, ONES: 1.0}.get(self.case.kind, 7 / 3)
        self.tables.put(module, slot, self.arena.put(a), self.arena.put(b), scale)

    def _make_plan(self, device: torch.device | str) -> Plan:
        case = self.case
        plan = Plan.from_segments(
            (0, *accumulate(rows for _, rows in case.segments)),
            [slot for slot, _ in case.segments],
            device=device,
            tile_rows=case.tile_rows,
            max_rank=256 if case.spare else max(1, *case.ranks),
        )
        assert plan.tiles is not None
        table = plan.tiles.table
        if case.spare:
            unused = torch.tensor([[0, 1, -1]], dtype=torch.int32, device=device)
            table = torch.cat([unused, table, unused])
        return replace(plan, tiles=Tiles(plan.tiles.rows, self.arena.put(table)))

    def partials(self, sgmv: ModuleType) -> Tensor:
        case = self.case
        count = sgmv.new_split_k_partials(self.x, self.plan, case.members).shape[0]
        if case.partials is not None:
            tiles = ceil(case.features[0] / _INNER[case.tile_rows])
            count = ceil(tiles / ceil(tiles / case.partials))
        shape = (count, case.members, self.plan.tokens, self.plan.max_rank)
        return self.arena.room(*shape, dtype=torch.float32)

    def compute(self, sgmv: ModuleType, partials: Tensor) -> None:
        self.arena.remember()
        sgmv.shrink(partials, self.x, self.plan, self.modules, self.tables)
        sgmv.expand(self.ys, partials, self.plan, self.modules, self.tables)

    def complaints(self, partials: Tensor) -> list[str]:
        wrong = [f"member {n}: {text}" for n in range(len(self.ys)) for text in self._judge(n)]
        if changed := self.arena.changed_outside([partials, *self.ys]):
            wrong.append(f"{changed} bytes of other memory changed")
        if strays := self._stray_partials(partials):
            wrong.append(f"{strays} elements of partials that no adapter has were written")
        return wrong

    def _judge(self, member: int) -> list[str]:
        y, before, module = self.ys[member].cpu(), self.ys_before[member], self.modules[member]
        wrong = []
        kept = torch.ones(len(y), dtype=torch.bool)
        for start, stop, slot in self.plan.segments:
            operands = self.tables.operands(module, slot)
            if operands is None:
                continue
            kept[start:stop] = False
            result = y[start:stop].double()
            if self.case.kind in {INTEGERS, ONES}:
                expected = _exact(before[start:stop], self.x_before[start:stop], operands)
                far = result != expected
            else:
                expected, bound = _bounded(before[start:stop], self.x_before[start:stop], operands)
                far = ~((result - expected).abs() <= bound)
            if far.any():
                row, column = far.nonzero()[0].tolist()
                wrong.append(
                    f"rows {start} to {stop} of slot {slot}: {int(far.sum())} elements, the first "
                    f"[{start + row}, {column}] is {result[row, column]}, not {expected[row, column]}"
                )
        bits = [each[kept].view(torch.uint8) for each in (y, before)]  # -0 is not 0
        if not torch.equal(*bits):
            wrong.append("rows without an adapter changed")
        return wrong

    def _stray_partials(self, partials: Tensor) -> int:
        """Elements outside every adapter's rows and padded ranks that are not NaN any more."""
        written = ~partials.cpu().isnan()
        for member, module in enumerate(self.modules):
            for start, stop, slot in self.plan.segments:
                operands = self.tables.operands(module, slot)
                written[:, member, start:stop, : len(operands[0]) if operands else 0] = False
        return int(written.sum())


def _nbytes(case: Case) -> int:
    inside, outside = case.features[0], case.features[1] + 16
    weights = case.members * sum((rank + 8) * (inside + outside) * 4 for rank in case.ranks)
    tokens = sum(rows for _, rows in case.segments)
    batch = tokens * 4 * (inside + 3 * outside)
    partials = 8 * case.members * tokens * (256 if case.spare else max(1, *case.ranks) + 8) * 4
    return weights + batch + partials + (1 << 19)


def _exact(y: Tensor, x: Tensor, operands: Operands) -> Tensor:
    """Of integers: what is shrunk and the result are rounded once each, ties to even."""
    a, b, scale = operands
    shrunk = (x.double() @ a.double().T).to(y.dtype).double()
    return (y.double() + scale * (shrunk @ b.double().T)).to(y.dtype).double()


def _bounded(y: Tensor, x: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far rounding may take the kernels' from it.

    Sums of n products in float32 are off by n·v of the sum of their magnitudes, in whatever order
    (Higham, Accuracy and Stability, ch. 3); v is a whole unit, since tensor cores cut. What is
    shrunk and the result are rounded to the working type: u each, or its smallest step.
    """
    u, v = torch.finfo(y.dtype).eps / 2, torch.finfo(torch.float32).eps
    step = torch.finfo(y.dtype).smallest_normal * 2 * u
    a, b, scale = operands[0].double(), operands[1].double(), operands[2]
    size = x.double().abs() @ a.abs().T
    shrunk_off = ((a.shape[1] + 8) * v * (1 + u) + u) * size + step
    sums = size @ b.abs().T
    inner = (len(a) + 2) * v
    delta_off = (shrunk_off @ b.abs().T) * (1 + inner) + inner * sums
    delta_off = abs(scale) * ((1 + 2 * v) * delta_off + 2 * v * sums)
    total = y.double().abs() + abs(scale) * sums + delta_off
    expected = y.double() + scale * (x.double() @ a.T @ b.T)
    return expected, delta_off + (u + v) * total + step
