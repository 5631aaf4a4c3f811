"""Tensor parallelism, cut as Megatron-LM cuts: what one rank holds of a base, and of its adapters.

Of a column-parallel module a rank holds A whole and B's rows, of a row-parallel one A's columns and
B whole: its product is a part of the sum, and is added before the all-reduce. Where the output is
fused of parts (q, k and v, or gate and up), each part is cut by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lorax_async.config import Shard
from lorax_async.errors import ConfigError, shorten
from lorax_async.formats.safetensors import TensorSpan
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.pairing import TensorPair

_SHOWN = 3
# By name they may be one part, or several in any order: only the base's config says.
_FUSED = frozenset(
    {
        *("qkv_proj", "query_key_value", "W_pack", "Wqkv", "wqkv", "c_attn", "in_proj"),
        *("gate_up_proj", "dense_h_to_4h"),
    }
)
_HEADED = frozenset({"k_proj", "v_proj", "k_lin", "v_lin", "wk", "wv", "k", "v", "key", "value"})

Range = tuple[int, int]
"""[first, last) of a module's features."""


@dataclass(frozen=True, slots=True)
class ModuleCut:
    """What a rank holds of one module: B's `rows`, one after the other, and A's `columns`.

    `rows` are as many as the output has parts; both count features of the whole module.
    """

    rows: tuple[Range, ...]
    columns: Range


@dataclass(frozen=True, slots=True)
class Sharding:
    """A base, and what one rank holds of it.

    Attributes
    ----------
    whole
        The base's layout: adapters' files are checked against it.
    held
        The same modules in the same order, of the sizes that this rank has.
    cuts
        By the module's position; empty where all is held.
    """

    whole: ModelLayout
    held: ModelLayout
    cuts: tuple[ModuleCut, ...]


def shard_layout(layout: ModelLayout, shard: Shard | None) -> Sharding:
    """Cut a base for one rank; None holds it all.

    Raises
    ------
    ConfigError
        A module cannot be cut into parts for so many ranks, or it is not known how.
    """
    if shard is None or shard.world_size == 1:
        return Sharding(layout, layout, ())
    problems = [text for module in layout.modules if (text := _problem(module, shard.world_size))]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more modules)" if len(problems) > _SHOWN else ""
        raise ConfigError(f"shard: {'; '.join(problems[:_SHOWN])}{more}")
    cuts = tuple(_cut(module, shard) for module in layout.modules)
    held = tuple(map(_held, layout.modules, cuts))
    return Sharding(layout, replace(layout, modules=held), cuts)


def cut_pairs(pairs: Iterable[TensorPair], cuts: Sequence[ModuleCut]) -> list[TensorPair]:
    """The same pairs, with spans of what is held; vectors are cut as B's rows are."""
    return [_cut_pair(pair, cuts[pair.module]) for pair in pairs]


def _cut_pair(pair: TensorPair, cut: ModuleCut) -> TensorPair:
    module, layer, a, b, rank, scale, vectors = pair
    if vectors:
        vectors = tuple((part, _rows_of(span, cut.rows)) for part, span in vectors)
    a, b = _columns_of(a, cut.columns), _rows_of(b, cut.rows)
    return TensorPair(module, layer, a, b, rank, scale, vectors)


def _problem(module: Module, world: int) -> str | None:
    """Why a module cannot be cut for so many ranks, and what to do; None if it can."""
    last = module.name.rpartition(".")[2]
    if module.parallel is Parallelism.REPLICATED:
        return None
    if module.parallel is Parallelism.ROW:
        fits = module.in_features % world == 0
        return None if fits else _uneven(module, f"{module.in_features:,} input features", world)
    if module.parts:
        tight = [part for part in module.parts if not _divides(part, world)]
        return _uneven(module, _units(tight[0]), world) if tight else None
    if last in _FUSED:
        return (
            f"module {shorten(module.name, 80)!r} may be fused of several parts, as q, k and v are,"
            " and the layout does not say of which; make it with layouts.from_pretrained or"
            " from_module, or give the Module its parts"
        )
    if module.out_features % world == 0:
        return None
    heads = " or, to replicate heads, take a layout that knows them (layouts.from_pretrained)"
    return _uneven(module, f"{module.out_features:,} output features", world) + (
        heads if last in _HEADED else ""
    )


def _uneven(module: Module, what: str, world: int) -> str:
    last = module.name.rpartition(".")[2]
    return (
        f"module {shorten(module.name, 80)!r} has {what}, which {world} ranks cannot share evenly;"
        f" use another world_size, or layout.replicate({shorten(last, 50)!r}) if every rank holds"
        " it whole"
    )


def _units(part: FusedPart) -> str:
    return f"a part of {part.size // part.unit:,} × {part.unit:,} output features"


def _divides(part: FusedPart, world: int) -> bool:
    units = part.size // part.unit
    return units % world == 0 or (part.replicable and world % units == 0)


def _cut(module: Module, shard: Shard) -> ModuleCut:
    rows: tuple[Range, ...] = ((0, module.out_features),)
    columns = (0, module.in_features)
    if module.parallel is Parallelism.COLUMN:
        parts = module.parts or (FusedPart(module.out_features),)
        starts = accumulate((part.size for part in parts), initial=0)
        rows = tuple(_share(start, part, shard) for start, part in zip(starts, parts, strict=False))
    elif module.parallel is Parallelism.ROW:
        columns = _share(0, FusedPart(module.in_features), shard)
    return ModuleCut(rows, columns)


def _share(start: int, part: FusedPart, shard: Shard) -> Range:
    """The rank's features of a part that begins at feature `start`."""
    units = part.size // part.unit
    first = start + shard.rank * units // shard.world_size * part.unit
    return first, first + max(1, units // shard.world_size) * part.unit


def _held(module: Module, cut: ModuleCut) -> Module:
    sizes = [last - first for first, last in cut.rows]
    parts = zip(module.parts, sizes, strict=False)
    return replace(
        module,
        in_features=cut.columns[1] - cut.columns[0],
        out_features=sum(sizes),
        parts=tuple(replace(part, size=size) for part, size in parts),
    )


def _rows_of(span: TensorSpan, rows: Sequence[Range]) -> TensorSpan:
    """Some rows of a tensor, each of which is contiguous in the file."""
    count = span.shape[0]
    held = sum(last - first for first, last in rows)
    if held == count:
        return span
    start, pitch = span.start, span.nbytes // count
    pieces = tuple(ByteSpan(start + first * pitch, start + last * pitch) for first, last in rows)
    return span._replace(shape=(held, *span.shape[1:]), pieces=pieces)


def _columns_of(span: TensorSpan, columns: Range) -> TensorSpan:
    """Some columns of a matrix: a part of each row, all of them one strided piece."""
    count, width = span.shape
    first, last = columns
    if last - first == width:
        return span
    pitch = span.nbytes // count
    item = pitch // width
    start, stop = span.start + first * item, span.start + last * item
    piece = ByteSpan(start, stop, count, pitch if count > 1 else 0)
    return span._replace(shape=(count, last - first), pieces=(piece,))
