"""Plan where each byte of an adapter's file goes: layer groups, moves, staging windows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, repeat
from math import ceil, prod
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Self

from lorax_async.config import Limits
from lorax_async.errors import ConfigError, InternalError, UnsupportedAdapterError
from lorax_async.formats.safetensors import Header, TensorSpan
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.tensor_kinds import TensorRole
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.planning.layout import ModelLayout, OtherModule
from lorax_async.planning.pairing import OtherTensor, TensorPair, pair_tensors
from lorax_async.planning.sharding import ModuleCut, cut_others, cut_pairs
from lorax_async.types import AdapterSpec

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Casts are cut at multiples of this, so that every move starts on a cache line.
_ELEMENTS = 64
_MAX_BUFFERS = 1024  # IOV_MAX


class ReadMove(NamedTuple):
    """Copy `nbytes` of the file from `file_offset` verbatim to `target` in the group's extent.

    Several `rows` divide `nbytes` equally and begin `pitch` bytes apart in the file; on the device
    they are contiguous. A tuple, because a shard's plan has hundreds.
    """

    file_offset: int
    nbytes: int
    target: int
    rows: int = 1
    pitch: int = 0

    @property
    def source(self) -> ByteSpan:
        """The bytes to read."""
        stop = self.file_offset + self.nbytes // self.rows
        return ByteSpan(self.file_offset, stop, self.rows, self.pitch)


@dataclass(frozen=True, slots=True)
class ConvertMove:
    """Cast `rows` of `columns` elements to the plan's dtype and write them at `target`.

    `nbytes` counts bytes of the file. Each row takes `row_pitch` ≥ `columns` elements on the
    device and is padded with zeros, so that the move writes `rows * row_pitch` elements. `pieces`
    are the bytes to read if they are not contiguous.
    """

    file_offset: int
    nbytes: int
    source_dtype: str
    rows: int
    columns: int
    target: int
    row_pitch: int
    pieces: tuple[ByteSpan, ...] = ()

    @property
    def sources(self) -> tuple[ByteSpan, ...]:
        """The bytes to read, in the order of the elements."""
        return self.pieces or (ByteSpan(self.file_offset, self.file_offset + self.nbytes),)


@dataclass(frozen=True, slots=True)
class ZeroMove:
    """Write `nbytes` of zeros at `target`: the rows of A that pad its rank."""

    target: int
    nbytes: int


class TableRow(NamedTuple):
    """A module's row of the pointer table. A tuple, because every plan has hundreds.

    `module` indexes `layout.modules`. A `[padded_rank, in]` begins at `a` and B
    `[out, padded_rank]` at `b`, in bytes from the start of the group's extent. `rank` is the true
    rank; the padding is zero.
    """

    module: int
    a: int
    b: int
    rank: int
    padded_rank: int
    scale: float


class ExtraSlot(NamedTuple):
    """A tensor beside A and B, which kernels do not read: `shape` at `offset` of the extent.

    `module` is the layout's index; the fields after `dtype` are as in `OtherTensor`. What belongs
    to a linear module, an embedding or a parameter has the plan's dtype, but for biases and
    magnitudes. They, and other modules, keep the file's: a magnitude scales a whole row of the
    base's weight, and rounding it to bf16 would change that row by up to 0.2 %. On SmolLM2 this
    moves the logits a hundred times as far as rounding A and B does.
    """

    module: int
    part: TensorRole
    offset: int
    shape: tuple[int, ...]
    dtype: str
    tokens: tuple[int, ...] = ()
    needs_tie: bool = False
    rank: int = 0
    scale: float = 0.0
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class BaseCopy(NamedTuple):
    """A copy of the weight of the base's `module`: `sources` of the file, in `dtype`.

    It is compared with the base, and gets no place on the device.
    """

    module: int
    dtype: str
    sources: tuple[ByteSpan, ...]

    @classmethod
    def of(cls, other: OtherTensor) -> Self:
        span = other.span
        return cls(other.module, span.dtype, span.pieces or (ByteSpan(span.start, span.stop),))


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One layer group: an extent of `nbytes` (aligned), and the moves that fill it.

    The moves write disjoint bytes. `spans` are exactly the bytes of the file that they and `copies`
    read, in order. Alignment gaps between tensors are not written, and no row points to them.
    """

    layer: int
    nbytes: int
    reads: tuple[ReadMove, ...]
    converts: tuple[ConvertMove, ...]
    zeros: tuple[ZeroMove, ...]
    rows: tuple[TableRow, ...]
    spans: tuple[ByteSpan, ...]
    extras: tuple[ExtraSlot, ...] = ()
    copies: tuple[BaseCopy, ...] = ()


class DeviceRules(NamedTuple):
    """The device's requirements, and the largest size of a move."""

    dtype: str
    alignment: int
    rank_multiple: int
    move_bytes: int


def file_runs(reads: Sequence[ReadMove]) -> list[tuple[ReadMove, ...]]:
    """Group reads that are contiguous in the file, one call each. Strided reads stay separate."""
    if len(reads) == 1:
        return [tuple(reads)]
    runs: list[list[ReadMove]] = []
    end = -1
    for read in sorted(reads, key=attrgetter("file_offset")):
        if read.rows > 1 or read.file_offset != end or len(runs[-1]) == _MAX_BUFFERS:
            runs.append([])
        runs[-1].append(read)
        end = read.file_offset + read.nbytes if read.rows == 1 else -1
    return [tuple(run) for run in runs]


@dataclass(slots=True)
class _TargetRun:
    """Bytes of the file, as in `ByteSpan`, that fill [target, end) of a group's extent."""

    dtype: str
    start: int
    stop: int
    target: int
    end: int
    rows: int = 1
    pitch: int = 0


_NO_RUN = _TargetRun("", -1, -1, -1, -1)
"""Ends where no tensor begins."""


def _group_adjoining(runs: Iterable[_TargetRun]) -> Iterator[list[_TargetRun]]:
    """Group runs that are contiguous on the device and have the same dtype."""
    group: list[_TargetRun] = []
    for run in runs:
        if group and (run.target != group[-1].end or run.dtype != group[-1].dtype):
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _split_portions(runs: Iterable[_TargetRun], nbytes: int) -> Iterator[list[ByteSpan]]:
    """Yield the runs' bytes of the file in portions of `nbytes`."""
    portion: list[ByteSpan] = []
    room = nbytes
    for run in runs:
        span = ByteSpan(run.start, run.stop, run.rows, run.pitch)
        first, end = 0, span.nbytes
        while first < end:
            last = min(end, first + room)
            portion += span.cut(first, last)
            room -= last - first
            first = last
            if not room:
                yield portion
                portion, room = [], nbytes
    if portion:
        yield portion


def _merge_spans(spans: Iterable[ByteSpan]) -> tuple[ByteSpan, ...]:
    """Sort disjoint spans, and merge adjacent ones of a single row."""
    merged: list[ByteSpan] = []
    for span in sorted(spans):
        if merged and merged[-1].stop == span.start and merged[-1].rows == span.rows == 1:
            merged[-1] = ByteSpan(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)


class _GroupPlanner:
    """Place the tensors of one layer group and plan its moves."""

    def __init__(self, target: DeviceRules) -> None:
        self.target = target
        self.item = ITEM_BYTES[target.dtype]
        self.end = 0
        self.runs: list[_TargetRun] = []
        self.padded: list[ConvertMove] = []
        self.zeros: list[ZeroMove] = []

    def plan(
        self, layer: int, pairs: list[TensorPair], whole: Sequence[OtherTensor] = (), cast: int = 0
    ) -> GroupPlan:
        """Plan a group of pairs, and of whole tensors of which the first `cast` are cast."""
        empty: tuple[tuple[Any, ...], ...] = ((),) * len(TensorPair._fields)
        modules, _, a, b, ranks, scales, vectors_of = zip(*pairs, strict=True) if pairs else empty
        multiple = self.target.rank_multiple
        padded = [rank + -rank % multiple for rank in ranks] if multiple > 1 else ranks
        ragged = {n for n, rank in enumerate(ranks) if rank < padded[n]} if multiple > 1 else set()
        owned: list[tuple[int, TensorRole, TensorSpan]] = []
        if whole:
            owned = [(other.module, other.part, other.span) for other in whole]
        if any(vectors_of):
            owned += [(pair.module, *vector) for pair in pairs for vector in pair.vectors]
        offsets = self._place([*a, *b], list(map(itemgetter(2), owned)), ragged, cast)
        cells = zip(modules, offsets, offsets[len(a) :], ranks, padded, scales, strict=False)
        # As `TableRow._make` does, without a call of Python code for each of hundreds.
        rows = tuple(map(tuple.__new__, repeat(TableRow), cells))
        extras = tuple(
            [
                ExtraSlot(
                    module,
                    part,
                    offset,
                    span.shape,
                    self.target.dtype if n < cast else span.dtype,
                    *(whole[n][4:] if n < len(whole) else ()),
                )
                for n, ((module, part, span), offset) in enumerate(
                    zip(owned, offsets[2 * len(a) :], strict=True)
                )
            ]
        )
        reads: list[ReadMove] = []
        converts, casts = self.padded, list[_TargetRun]()
        moved = list[ByteSpan]()
        for convert in converts:
            moved += convert.sources
        for run in self.runs:
            moved.append(ByteSpan(run.start, run.stop, run.rows, run.pitch))
            if run.dtype == self.target.dtype:
                nbytes = (run.stop - run.start) * run.rows
                reads.append(ReadMove(run.start, nbytes, run.target, run.rows, run.pitch))
            else:
                casts.append(run)
        for runs in _group_adjoining(casts) if casts else ():
            converts.extend(self._cast(runs))
        converts.sort(key=attrgetter("file_offset"))
        moves = tuple(reads), tuple(converts), tuple(self.zeros)
        nbytes = self.end + -self.end % self.target.alignment
        return GroupPlan(layer, nbytes, *moves, rows, _merge_spans(moved), extras)

    def _place(
        self, matrices: list[TensorSpan], extras: list[TensorSpan], ragged: set[int], cast: int
    ) -> list[int]:
        """Return the offsets of `matrices` (every A, then every B) and of `extras`.

        Of the extras, only the first `cast` are cast. The pairs in `ragged` need padding.

        Tensors are placed in file order at the next aligned offset. Tensors contiguous in both
        file and extent form one run; a file with aligned tensors makes the group a single run.
        """
        spans, count = [*matrices, *extras], len(matrices)
        pairs = count // 2
        starts = list(map(attrgetter("start"), spans))
        offsets = [0] * len(spans)
        dtype, alignment, _, _ = self.target
        run = _NO_RUN
        end = 0
        for n in sorted(range(len(spans)), key=starts.__getitem__):
            span = spans[n]
            offsets[n] = offset = end + -end % alignment
            if ragged and n < count and n % pairs in ragged:
                pad = self._pad_rows if n < pairs else self._pad_columns
                end = pad(span, offset)
                continue
            source = span.dtype if n < count + cast else dtype
            if span.pieces:
                end = self._place_pieces(span, offset, source)
                continue
            start, stop = starts[n], span.stop
            end = offset + stop - start
            if source != dtype:
                end = offset + (stop - start) * self.item // ITEM_BYTES[source]
            if run.stop == start and run.end == offset and run.dtype == source:
                run.stop, run.end = stop, end
            else:
                run = _TargetRun(source, start, stop, offset, end)
                self.runs.append(run)
        self.end = end
        return offsets

    def _place_pieces(self, span: TensorSpan, offset: int, source: str) -> int:
        """Add a run of dtype `source` for each piece, from `offset` on; return the end."""
        for piece in span.pieces or (ByteSpan(span.start, span.stop),):
            start, stop, rows, pitch = piece
            end = offset + piece.nbytes * self.item // ITEM_BYTES[source]
            self.runs.append(_TargetRun(source, start, stop, offset, end, rows, pitch))
            offset = end
        return offset

    def _pad_rows(self, a: TensorSpan, offset: int) -> int:
        rows, columns = a.shape
        end = self._place_pieces(a, offset, a.dtype)
        nbytes = -rows % self.target.rank_multiple * columns * self.item
        self.zeros.append(ZeroMove(end, nbytes))
        return end + nbytes

    def _pad_columns(self, b: TensorSpan, offset: int) -> int:
        columns = b.shape[1]
        pitch = columns + -columns % self.target.rank_multiple
        nbytes = columns * ITEM_BYTES[b.dtype]
        step = self.target.move_bytes // max(nbytes, pitch * self.item)
        for start, stop, _, _ in b.pieces or (ByteSpan(b.start, b.stop),):  # pieces hold whole rows
            for first in range(start, stop, step * nbytes):
                rows = min(step, (stop - first) // nbytes)
                move = ConvertMove(first, rows * nbytes, b.dtype, rows, columns, offset, pitch)
                self.padded.append(move)
                offset += rows * pitch * self.item
        return offset

    def _cast(self, runs: list[_TargetRun]) -> Iterator[ConvertMove]:
        """Yield flat moves of about equal size: a cast without padding can ignore rows."""
        target, dtype = runs[0].target, runs[0].dtype
        source = ITEM_BYTES[dtype]
        elements = (runs[-1].end - target) // self.item
        limit = self.target.move_bytes // max(source, self.item)
        step = ceil(elements / ceil(elements / limit))
        step = min(limit, step + -step % _ELEMENTS)
        for first, pieces in zip(
            range(0, elements, step), _split_portions(runs, step * source), strict=True
        ):
            count = min(step, elements - first)
            start, place = pieces[0].start, target + first * self.item
            apart = tuple(pieces) if len(pieces) > 1 or pieces[0].rows > 1 else ()
            yield ConvertMove(start, count * source, dtype, 1, count, place, count, apart)


_WINDOW_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class StagingWindow:
    """The bytes [start, stop) of a group's extent, and the moves that fill them.

    The moves' targets count from `start`. Gaps between tensors are not written.
    """

    start: int
    stop: int
    reads: tuple[ReadMove, ...]
    converts: tuple[ConvertMove, ...]
    zeros: tuple[ZeroMove, ...]

    @classmethod
    def whole(cls, group: GroupPlan) -> Self:
        """Return one window for all of a group's extent."""
        return cls(0, group.nbytes, group.reads, group.converts, group.zeros)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def windows(group: GroupPlan, nbytes: int, item_bytes: int) -> tuple[StagingWindow, ...]:
    """Cut the extent of `group` greedily into windows of at most `nbytes`.

    A window ends at a multiple of 64 bytes of the extent, or at an end of a `ConvertMove` that
    this would cut. `item_bytes` is the size of an element on the device. Raise `InternalError` if
    a `ConvertMove` writes more than `nbytes`, or `nbytes` is less than 64.
    """
    if group.nbytes <= nbytes:
        return (StagingWindow.whole(group),)
    starts = _window_starts(group, nbytes, item_bytes)
    reads: list[list[ReadMove]] = [[] for _ in starts]
    converts: list[list[ConvertMove]] = [[] for _ in starts]
    zeros: list[list[ZeroMove]] = [[] for _ in starts]
    for read in group.reads:
        for n, first, last in _split_by_window(starts, read.target, read.nbytes):
            target = first - starts[n]
            for piece in read.source.cut(first - read.target, last - read.target):
                reads[n].append(
                    ReadMove(piece.start, piece.nbytes, target, piece.rows, piece.pitch)
                )
                target += piece.nbytes
    for convert in group.converts:
        n = bisect_right(starts, convert.target) - 1
        converts[n].append(replace(convert, target=convert.target - starts[n]))
    for zero in group.zeros:
        for n, first, last in _split_by_window(starts, zero.target, zero.nbytes):
            zeros[n].append(ZeroMove(first - starts[n], last - first))
    moves = (map(tuple, kind) for kind in (reads, converts, zeros))
    return tuple(map(StagingWindow, starts, [*starts[1:], group.nbytes], *moves))


def _window_starts(group: GroupPlan, nbytes: int, item_bytes: int) -> list[int]:
    whole = sorted(
        (convert.target, convert.target + convert.rows * convert.row_pitch * item_bytes)
        for convert in group.converts
    )
    starts = [0]
    while (limit := starts[-1] + nbytes) < group.nbytes:
        stop = limit - limit % _WINDOW_ALIGNMENT
        before = bisect_left(whole, (stop,)) - 1
        if before >= 0 and whole[before][1] > stop:  # cut no move
            first, last = whole[before]
            stop = last if last <= limit else first
        if stop <= starts[-1]:
            raise InternalError(f"a window of {nbytes:,} bytes is too small for one move")
        starts.append(stop)
    return starts


def _split_by_window(starts: list[int], target: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (window, first, last) for each window that [target, target + nbytes) touches."""
    n, first, end = bisect_right(starts, target) - 1, target, target + nbytes
    while first < end:
        last = min(end, starts[n + 1]) if n + 1 < len(starts) else end
        yield n, first, last
        n, first = n + 1, last


@dataclass(frozen=True)
class TransferPlan:
    """An adapter's layer groups that have tensors, in layer order. Thousands may share it.

    `dtype` is the dtype of A and B on the device, `rank` the largest true rank, `nbytes` the sum
    of the extents, `file_bytes` the size of the file.
    """

    groups: tuple[GroupPlan, ...]
    dtype: str
    rank: int
    nbytes: int
    file_bytes: int

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple([group.layer for group in self.groups])

    @cached_property
    def converted_bytes(self) -> tuple[int, ...]:
        """Bytes of the file that are cast or padded, by group."""
        nbytes = attrgetter("nbytes")
        return tuple([sum(map(nbytes, group.converts)) for group in self.groups])

    @cached_property
    def has_extras(self) -> bool:
        return any(map(attrgetter("extras"), self.groups))

    @cached_property
    def copies(self) -> tuple[BaseCopy, ...]:
        return tuple(chain.from_iterable(map(attrgetter("copies"), self.groups)))

    @cached_property
    def _sizes(self) -> tuple[GroupSizes, GroupSizes]:
        groups = self.groups
        starts = [group.spans[:1] for group in groups]
        sizes = GroupSizes(
            tuple([group.nbytes for group in groups]),
            tuple(sorted(range(len(groups)), key=starts.__getitem__)),
            file_nbytes=self.file_bytes,
            weight=sum([max(len(g.rows) + len(g.extras), len(g.spans)) for g in groups]),
        )
        return sizes, replace(sizes, holdable=True)

    def needs(self, *, holdable: bool) -> GroupSizes:
        """Return the sizes for the lifecycle, the same object for all adapters of this plan.

        `holdable` is as in `GroupSizes`.
        """
        return self._sizes[holdable]


def plan_transfer(
    header: Header,
    spec: AdapterSpec,
    layout: ModelLayout,
    *,
    dtype: str | None,
    alignment: int,
    rank_multiple: int,
    limits: Limits,
    staging_move_bytes: int,
    cuts: Sequence[ModuleCut] = (),
    compares_copies: bool = True,
) -> TransferPlan:
    """Plan how the adapter of this header and config reaches a device.

    The `dtype` on the device is "F32", "F16" or "BF16"; None means the layout's. Every tensor
    starts at a multiple of `alignment` bytes, and every rank is padded to a multiple of
    `rank_multiple`. One `ConvertMove` may read, and may write, `staging_move_bytes` at most. `cuts`
    is the rank's share of each module (`Sharding.cuts`); empty means everything. Without
    `compares_copies`, copies of the base's weights are not read.

    Raises
    ------
    AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError
        As for `pair_tensors`; the last also if the adapter exceeds the limits in bytes.
    ConfigError
        One padded row does not fit into `staging_move_bytes`.
    """
    target = DeviceRules(dtype or layout.dtype, alignment, rank_multiple, staging_move_bytes)
    if 4 * (limits.max_rank + rank_multiple) > staging_move_bytes:
        raise ConfigError(
            f"staging moves of {staging_move_bytes} bytes are too small for rank"
            f" {limits.max_rank}; raise staging_bytes"
        )
    file_bytes = header.tensors[-1].stop if header.tensors else header.data_start
    check_size(file_bytes, "in its file", limits)
    pairs, others = pair_tensors(header, spec, layout, limits)
    if cuts:
        pairs, others = cut_pairs(pairs, cuts), cut_others(others, layout.modules, cuts)
    by_layer = {n: list(members) for n, members in groupby(pairs, key=attrgetter("layer"))}
    if others:
        groups = _plan_with_others(target, by_layer, others, layout, compares=compares_copies)
    else:
        groups = tuple([_GroupPlanner(target).plan(n, pairs) for n, pairs in by_layer.items()])
    nbytes = sum([group.nbytes for group in groups])
    check_size(nbytes, f"as {target.dtype} on the device", limits)
    rank = max([*map(attrgetter("rank"), pairs), *map(attrgetter("rank"), others)], default=0)
    return TransferPlan(groups, target.dtype, rank, nbytes, file_bytes)


def _plan_with_others(
    target: DeviceRules,
    pairs: Mapping[int, list[TensorPair]],
    others: Sequence[OtherTensor],
    layout: ModelLayout,
    *,
    compares: bool,
) -> tuple[GroupPlan, ...]:
    """Plan groups of pairs by layer and of other tensors, which come with their layers.

    A copy of the base's weight is compared before its layer is used, if at all (`compares`).
    """
    groups = []
    for layer in sorted({*pairs, *(other.layer for other in others)}):
        members = [other for other in others if other.layer == layer]
        copies = [BaseCopy.of(it) for it in members if it.part is TensorRole.BASE_COPY]
        whole = [other for other in members if other.part is not TensorRole.BASE_COPY]
        keeps = {it.module: isinstance(layout.at(it.module), OtherModule) for it in whole}
        whole.sort(key=lambda other: keeps[other.module])
        cast = sum(not keeps[other.module] for other in whole)
        group = _GroupPlanner(target).plan(layer, pairs.get(layer, []), whole, cast)
        if copies and compares:
            sources = chain.from_iterable(copy.sources for copy in copies)
            spans = _merge_spans([*group.spans, *sources])
            group = replace(group, copies=tuple(copies), spans=spans)
        groups.append(group)
    return tuple(groups)


def check_size(nbytes: int, where: str, limits: Limits) -> None:
    """Raise `UnsupportedAdapterError` if `nbytes` exceeds the limit."""
    if nbytes > limits.max_adapter_bytes:
        raise UnsupportedAdapterError(
            f"the adapter has {nbytes:,} bytes {where}, over the limit of"
            f" {limits.max_adapter_bytes:,}; raise Limits.max_adapter_bytes to accept it"
        )
