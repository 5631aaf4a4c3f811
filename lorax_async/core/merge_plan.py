"""What a merge consists of: a file that nobody wrote, and which bytes of its parts make it up.

The merged adapter is planned as a safetensors file with a config beside it, so that everything
which checks and moves adapters takes it as it takes any other. Its scale is 1 in every module:
the parts' scales, and their weights, go into A and B.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from lorax_async.adapter import AdapterSpec, MergedKey
from lorax_async.config import Limits
from lorax_async.core.header import TensorSpan, parse_header
from lorax_async.core.layout import ModelLayout, Module
from lorax_async.core.merge_draws import Start, starts_of
from lorax_async.core.merged_file import Entry, describe, lay_out
from lorax_async.core.pairing import Pair, pair_tensors
from lorax_async.core.peft_config import parse_config
from lorax_async.core.peft_names import Part
from lorax_async.core.runs import Span
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    LoraxError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.merge import MAX_FACTOR, Merge

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


class PartFile(NamedTuple):
    """One adapter of a merge, as it was opened: config, header, and the size of its weights."""

    config: bytes
    prefix: bytes
    nbytes: int


class Piece(NamedTuple):
    """A tensor of one part, and by what it counts: its weight in the merge, and its own scale."""

    part: int
    span: TensorSpan
    weight: float
    scale: float


class MergedTensor(NamedTuple):
    """A `[rank, in]` or B `[out, rank]` of one module, at [start, stop) of the merged file.

    The pieces may fill less than the rank; the rest is zero.
    """

    factor: Part
    shape: tuple[int, int]
    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merged adapter: its config, its header, and its tensors in file order.

    `dtype` ("F32", "F16" or "BF16") is what it is computed into; `starts` are what PEFT draws
    before it merges, module by module (none where nothing is dropped).
    """

    config: bytes
    prefix: bytes
    dtype: str
    tensors: tuple[MergedTensor, ...]
    starts: tuple[Start, ...]
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_offsets", tuple(tensor.start for tensor in self.tensors))

    @property
    def nbytes(self) -> int:
        return self.tensors[-1].stop

    def touched(self, start: int, stop: int) -> range:
        """The positions of the tensors that have bytes in [start, stop) of the file."""
        first = max(0, bisect_right(self._offsets, start) - 1)
        return range(first, bisect_right(self._offsets, stop - 1))

    def spans(self, part: int, group: Sequence[Span]) -> list[Span]:
        """Which bytes of a part's file these of the merged file are made of."""
        touched = chain.from_iterable(self.touched(span.start, span.end) for span in group)
        pieces = chain.from_iterable(self.tensors[n].pieces for n in dict.fromkeys(touched))
        return [Span(p.span.start, p.span.stop) for p in pieces if p.part == part]


def plan_merge(
    key: MergedKey, parts: Sequence[PartFile], layout: ModelLayout, *, dtype: str, limits: Limits
) -> MergePlan:
    """Check every part as a load of it would, and the parts against each other. Pure.

    Raises
    ------
    AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError
        The text names the part, or the module.
    """
    merge = key.merge
    specs: list[AdapterSpec] = []
    pieces: dict[int, list[tuple[Pair, int]]] = {}
    for number, part in enumerate(parts):
        try:
            spec, pairs = _pairs(part, layout, limits)
        except LoraxError as error:
            raise error.prefixed(part_words(key, number)) from error.__cause__
        specs.append(spec)
        for pair in pairs:
            pieces.setdefault(pair.module, []).append((pair, number))
    names = {module: layout.modules[module].name for module in sorted(pieces)}
    ranks = {names[n]: _rank(merge, names[n], pieces[n], limits) for n in names}
    config, ranks = describe(ranks, {spec.base_model for spec in specs}, limits)
    entries = chain.from_iterable(_entries(layout.modules[n], ranks[names[n]]) for n in names)
    prefix, spans = lay_out(list(entries), dtype)
    tensors = tuple(_tensors(merge, [pieces[n] for n in names], spans))
    starts = starts_of(merge, specs[0], parts[0].config, [layout.modules[n] for n in names], limits)
    return MergePlan(config, prefix, dtype, tensors, starts)


def part_words(key: MergedKey, number: int) -> str:
    """How an error of one part begins. The name alone: whose folder it lies in is not told."""
    name = str(key.merge.parts[number]).rstrip("/").rpartition("/")[2]
    return f"part {number + 1} ({shorten(name, 100)!r}): "


def _pairs(part: PartFile, layout: ModelLayout, limits: Limits) -> tuple[AdapterSpec, list[Pair]]:
    spec = parse_config(part.config, limits)
    header = parse_header(part.prefix, part.nbytes, limits)
    for span in header.tensors:
        if not span.name.endswith(_SUFFIXES):
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} is of more than plain LoRA, which alone can be"
                " merged; load this adapter by itself"
            )
    return spec, pair_tensors(header, spec, layout, limits)


def _rank(merge: Merge, module: str, pairs: Sequence[tuple[Pair, int]], limits: Limits) -> int:
    ranks = [pair.rank for pair, _ in pairs]
    shown = " and ".join(map(str, ranks))
    for pair, number in pairs:
        if not abs(merge.weights[number] * pair.scale) <= MAX_FACTOR:
            raise AdapterFormatError(
                f"module {module!r}: weight {merge.weights[number]:g} times the scale of part"
                f" {number + 1} ({pair.scale:g}) is more than float32 holds; lower the weight"
            )
    if merge.strategy != "linear":
        if len(set(ranks)) > 1:
            raise IncompatibleAdapterError(
                f"module {module!r}: {merge.strategy!r} merges equal ranks, and the parts have"
                f" {shown}; 'linear' merges any"
            )
        return ranks[0]
    if sum(ranks) > limits.max_rank:
        raise UnsupportedAdapterError(
            f"module {module!r}: 'linear' adds the ranks up, and {shown} make {sum(ranks)}, above"
            f" the limit of {limits.max_rank}; raise Limits.max_rank, or merge fewer adapters"
        )
    return sum(ranks)


def _entries(module: Module, rank: int) -> tuple[Entry, Entry]:
    return (
        Entry(module.name, Part.A, (rank, module.in_features)),
        Entry(module.name, Part.B, (module.out_features, rank)),
    )


def _tensors(
    merge: Merge,
    pairs: Sequence[Sequence[tuple[Pair, int]]],
    spans: Sequence[tuple[Entry, int, int]],
) -> Iterator[MergedTensor]:
    for n, (entry, start, stop) in enumerate(spans):
        of_a = entry.factor is Part.A
        pieces = tuple(
            Piece(number, pair.a if of_a else pair.b, merge.weights[number], pair.scale)
            for pair, number in pairs[n // 2]
        )
        yield MergedTensor(entry.factor, entry.shape, start, stop, pieces)
