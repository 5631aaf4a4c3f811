"""Cut a base and its adapters for one tensor-parallel rank, as Megatron-LM does.

A rank of a column-parallel module holds all of A and some rows of B. A rank of a row-parallel
module holds some columns of A and all of B; its product is a partial sum, added before the
all-reduce. Each part of a fused output (q, k and v, or gate and up) is cut separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lorax_async.config import Shard
from lorax_async.errors import ConfigError, UnsupportedAdapterError, shorten
from lorax_async.formats.safetensors import TensorSpan
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.tensor_kinds import PARAMETERS, TensorRole
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.pairing import OtherTensor, TensorPair

_SHOWN = 3
# Names do not tell how these are fused; only the base's config does.
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
    """The share of one rank in a module: B's `rows`, concatenated, and A's `columns`.

    There is one range of rows per part of the output. Both count features of the whole module.
    """

    rows: tuple[Range, ...]
    columns: Range


@dataclass(frozen=True, slots=True)
class Sharding:
    """A base, and the share of one rank.

    Adapter files are checked against `whole`; `held` has the same modules in the same order, with
    this rank's sizes. `cuts` has one per module, by position; it is empty if the rank holds all.
    """

    whole: ModelLayout
    held: ModelLayout
    cuts: tuple[ModuleCut, ...]


def shard_layout(layout: ModelLayout, shard: Shard | None) -> Sharding:
    """Cut a base for one rank; None means a single rank.

    Raise `ConfigError` if a module cannot be divided by the number of ranks, or the layout does not
    tell how.
    """
    if shard is None or shard.world_size == 1:
        return Sharding(layout, layout, ())
    problems = [
        text for module in layout.modules if (text := _find_problem(module, shard.world_size))
    ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more modules)" if len(problems) > _SHOWN else ""
        raise ConfigError(f"shard: {'; '.join(problems[:_SHOWN])}{more}")
    cuts = tuple(_plan_cut(module, shard) for module in layout.modules)
    held = tuple(map(_cut_module, layout.modules, cuts))
    return Sharding(layout, replace(layout, modules=held), cuts)


def cut_pairs(pairs: Iterable[TensorPair], cuts: Sequence[ModuleCut]) -> list[TensorPair]:
    """Return the pairs with the spans of one rank. Vectors are cut like the rows of B."""
    shares = []
    for module, layer, a, b, rank, scale, vectors in pairs:
        rows, columns = cuts[module].rows, cuts[module].columns
        own_a, own_b = _cut_columns(a, columns), _cut_rows(b, rows)
        own_vectors = tuple((part, _cut_rows(span, rows)) for part, span in vectors)
        shares.append(TensorPair(module, layer, own_a, own_b, rank, scale, own_vectors))
    return shares


def cut_others(
    others: Iterable[OtherTensor], modules: Sequence[Module], cuts: Sequence[ModuleCut]
) -> list[OtherTensor]:
    """Return the tensors with the spans of one rank. Those of other modules are whole.

    Raise `UnsupportedAdapterError` for a weight of which a rank holds several parts of each row,
    and for a resized vocabulary or trained tokens, which the ranks would share in another way.
    """
    shares = []
    for other in others:
        if other.part in PARAMETERS:
            raise UnsupportedAdapterError(
                f"tensor {shorten(other.span.name, 200)!r} is for a bare parameter, as in fused"
                " experts, of which a layout knows no share; load it without a shard"
            )
        if other.module >= len(cuts):
            shares.append(other)
            continue
        module, cut, span = modules[other.module], cuts[other.module], other.span
        if other.part is TensorRole.TOKENS:
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} has rows of trained tokens, and a rank may"
                " hold others of a head that is tied; load it without a shard"
            )
        if other.part is TensorRole.OWN_BIAS:
            span = _cut_rows(span, cut.rows)
        elif span.shape == module.weight_shape:
            span = _cut_weight(span, module, cut)
        elif module.parallel is not Parallelism.REPLICATED:
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} resizes a vocabulary that tensor parallelism"
                " divides; load it without a shard"
            )
        shares.append(other._replace(span=span))
    return shares


def _cut_weight(span: TensorSpan, module: Module, cut: ModuleCut) -> TensorSpan:
    """Return the share of a weight, stored as the base stores it."""
    rows, columns = cut.rows, (cut.columns,)
    if module.transposed or module.embedding:
        rows, columns = columns, rows
    if sum(last - first for first, last in columns) == span.shape[1]:
        return _cut_rows(span, rows)
    if len(columns) == 1:
        return _cut_columns(span, columns[0])
    raise UnsupportedAdapterError(
        f"tensor {shorten(span.name, 200)!r} is a weight stored as [in, out], of which a shard has"
        " several parts of each row; load it without a shard"
    )


def _find_problem(module: Module, world: int) -> str | None:
    """Return why a module cannot be cut for `world` ranks, and the remedy; None if it can."""
    last = module.name.rpartition(".")[2]
    if module.parallel is Parallelism.REPLICATED:
        return None
    if module.parallel is Parallelism.ROW:
        if module.in_features % world == 0:
            return None
        return _describe_uneven(module, f"{module.in_features:,} input features", world)
    if module.parts:
        for part in module.parts:
            units = part.size // part.unit
            if units % world and not (part.replicable and world % units == 0):
                what = f"a part of {units:,} × {part.unit:,} output features"
                return _describe_uneven(module, what, world)
        return None
    if last in _FUSED:
        return (
            f"module {shorten(module.name, 80)!r} may be fused of several parts, such as q, k and"
            " v, but the layout does not list them; make it with layouts.from_pretrained or"
            " from_module, or give the Module its parts"
        )
    if module.out_features % world == 0:
        return None
    heads = " or, to replicate heads, take a layout that knows them (layouts.from_pretrained)"
    return _describe_uneven(module, f"{module.out_features:,} output features", world) + (
        heads if last in _HEADED else ""
    )


def _describe_uneven(module: Module, what: str, world: int) -> str:
    last = module.name.rpartition(".")[2]
    return (
        f"module {shorten(module.name, 80)!r} has {what}, which {world} ranks cannot share evenly;"
        f" use another world_size, or layout.replicate({shorten(last, 50)!r}) if every rank holds"
        " it whole"
    )


def _plan_cut(module: Module, shard: Shard) -> ModuleCut:
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
    """Return the rank's features of a part that begins at feature `start`."""
    units = part.size // part.unit
    first = start + shard.rank * units // shard.world_size * part.unit
    return first, first + max(1, units // shard.world_size) * part.unit


def _cut_module(module: Module, cut: ModuleCut) -> Module:
    sizes = [last - first for first, last in cut.rows]
    parts = zip(module.parts, sizes, strict=False)
    return replace(
        module,
        in_features=cut.columns[1] - cut.columns[0],
        out_features=sum(sizes),
        parts=tuple(replace(part, size=size) for part, size in parts),
    )


def _cut_rows(span: TensorSpan, rows: Sequence[Range]) -> TensorSpan:
    """Return the span of some rows of a tensor; a row is contiguous in the file."""
    count = span.shape[0]
    held = sum(last - first for first, last in rows)
    if held == count:
        return span
    start, pitch = span.start, span.nbytes // count
    pieces = tuple(ByteSpan(start + first * pitch, start + last * pitch) for first, last in rows)
    return span._replace(shape=(held, *span.shape[1:]), pieces=pieces)


def _cut_columns(span: TensorSpan, columns: Range) -> TensorSpan:
    """Return the span of some columns of a matrix, as one strided piece."""
    count, width = span.shape
    first, last = columns
    if last - first == width:
        return span
    pitch = span.nbytes // count
    item = pitch // width
    start, stop = span.start + first * item, span.start + last * item
    piece = ByteSpan(start, stop, count, pitch if count > 1 else 0)
    return span._replace(shape=(count, last - first), pieces=(piece,))
