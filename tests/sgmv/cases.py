"""What the kernels are shown: a grid of batches, its pairwise subset, and cases made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

INTEGERS, POSITIVE, SIGNED, ONES = "integers", "positive", "signed", "ones"

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One batch on one group of modules.

    Attributes
    ----------
    dtype
        Name of x, y, A and B's.
    kind
        Of the numbers: signed, all positive, small integers whose results lie half-way between two
        numbers of the dtype, or ones.
    ranks
        By slot, before they are padded to a multiple of 8; 0: does not touch the module. Those of
        the second and third module are the same, moved by one and two slots.
    features
        Input and output.
    segments
        (slot, rows), slot -1: no adapter.
    planes
        At most so many, None: as many as the launch would take.
    tile_rows
        16 or 32.
    members
        Modules of the group.
    spare
        Room for two tiles and for ranks that nobody has.
    """

    dtype: str = "bfloat16"
    kind: str = SIGNED
    ranks: tuple[int, ...] = (16, 8, 0, 24)
    features: tuple[int, int] = (67, 129)
    segments: Segments = ((0, 3),)
    planes: int | None = 1
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

_Level = object
_Levels = tuple[_Level, ...]
_FULL: tuple[_Levels, ...] = (DTYPES, RANKS, FEATURES, PLANES, ROWS, AROUND)
_TURNING: tuple[_Levels, ...] = (KINDS, TILE_ROWS, MEMBERS, SPARE)


def full_grid(dtype: str) -> Iterator[Case]:
    """Every combination of rank, features, planes, rows and neighbours.

    What else there is takes turns, each at its own pace.
    """
    for place, levels in enumerate(product((dtype,), *_FULL[1:])):
        turns = [
            each[place // pace % len(each)]
            for pace, each in zip((1, 5, 7, 11), _TURNING, strict=True)
        ]
        yield _case(*levels, *turns)


def pairwise() -> Iterator[Case]:
    """Cases in which every two levels of any two properties meet. Few, always the same."""
    factors = _FULL + _TURNING
    open_pairs = {
        (i, a, j, b)
        for i, j in combinations(range(len(factors)), 2)
        for a in range(len(factors[i]))
        for b in range(len(factors[j]))
    }
    while open_pairs:
        chosen = _greedy(min(open_pairs), factors, open_pairs)
        open_pairs -= _pairs(chosen)
        yield _case(*(factors[i][chosen[i]] for i in range(len(factors))))


def _greedy(
    seed: tuple[int, int, int, int],
    factors: tuple[_Levels, ...],
    open_pairs: set[tuple[int, int, int, int]],
) -> dict[int, int]:
    """The seed's two levels, and of each other factor the one that closes most pairs."""
    i, a, j, b = seed
    chosen = {i: a, j: b}
    for factor, levels in enumerate(factors):
        if factor not in chosen:
            gains = [len(_pairs(chosen | {factor: n}) & open_pairs) for n in range(len(levels))]
            chosen[factor] = gains.index(max(gains))
    return chosen


def _pairs(chosen: dict[int, int]) -> set[tuple[int, int, int, int]]:
    return {(i, chosen[i], j, chosen[j]) for i, j in combinations(sorted(chosen), 2)}


def _case(*levels: object) -> Case:
    dtype, rank, features, planes, rows, around, kind, tile_rows, members, spare = levels
    assert isinstance(rank, int)
    assert isinstance(rows, int)
    assert isinstance(around, str)
    fields = {
        "dtype": dtype,
        "kind": kind,
        "ranks": (rank, 8, 0, 24),
        "features": features,
        "segments": _around(around, rows),
        "planes": planes,
        "tile_rows": tile_rows,
        "members": members,
        "spare": spare,
    }
    return Case(**fields)  # type: ignore[arg-type]


def _around(name: str, rows: int) -> Segments:
    if name == "alone":
        return ((0, rows),)
    if name == "duplicates":
        return ((0, rows), (-1, 1), (0, 2), (1, rows), (0, 1))
    return ((-1, 2), (1, 3), (0, rows), (2, 2), (3, 1), (-1, 1))


_WHOLE = Case(dtype="float32", kind=INTEGERS, ranks=(8,), segments=((0, 1),))
BY_HAND = {
    "a rank of 8 in tiles of 16": replace(_WHOLE, segments=((0, 3),)),
    "one row in a tile of 16": replace(_WHOLE, segments=((0, 1), (-1, 2))),
    "a scale of -3": _WHOLE,
    "five planes": replace(_WHOLE, features=(576, 8), planes=5),
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
    "a shrunk 2051, half-way in float16": Case("float16", ONES, (1,), (2051, 8), planes=None),
    "nothing but rows without an adapter": Case(segments=((-1, 3), (-1, 1))),
    "no rows": Case(segments=()),
}
