"""The moves that fill one layer group's extent: read verbatim, cast, or padded to a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter
from typing import NamedTuple

from lorax_async.core.header import TensorSpan
from lorax_async.core.pairing import Pair
from lorax_async.core.peft_names import Part
from lorax_async.core.runs import Run, Span, adjoining, merged, portions

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Moves are cut at multiples of this, so that every piece but the last starts on a cache line.
_ELEMENTS = 64
_MAX_BUFFERS = 1024  # IOV_MAX


class Read(NamedTuple):
    """`nbytes` of the file from `file_offset` go verbatim to `target` in the group's extent.

    Of several `rows` each has its share of `nbytes`, and begins `pitch` bytes after the one before;
    on the device they follow each other. A tuple, for a shard's plan has hundreds.
    """

    file_offset: int
    nbytes: int
    target: int
    rows: int = 1
    pitch: int = 0

    @property
    def source(self) -> Span:
        """Which bytes of the file."""
        stop = self.file_offset + self.nbytes // self.rows
        return Span(self.file_offset, stop, self.rows, self.pitch)


@dataclass(frozen=True, slots=True)
class Convert:
    """`rows` of `columns` elements of the file, cast to the plan's dtype, at `target`.

    `nbytes` are the file's. On the device each row takes `row_pitch` ≥ `columns` elements, and what
    is beyond the columns is zero: the move writes all of `rows * row_pitch` elements. Where they do
    not follow each other in the file, `pieces` are where they lie.
    """

    file_offset: int
    nbytes: int
    source_dtype: str
    rows: int
    columns: int
    target: int
    row_pitch: int
    pieces: tuple[Span, ...] = ()

    @property
    def sources(self) -> tuple[Span, ...]:
        """Which bytes of the file, in the order of the elements."""
        return self.pieces or (Span(self.file_offset, self.file_offset + self.nbytes),)


@dataclass(frozen=True, slots=True)
class Zero:
    """`nbytes` of zeros at `target`: the rows of A that pad its rank."""

    target: int
    nbytes: int


class Row(NamedTuple):
    """A module's row of the device's table; a tuple, for there are hundreds in every plan.

    `module` indexes `layout.modules`; A `[padded_rank, in]` lies at `a`, B `[out, padded_rank]` at
    `b`, bytes into the group's extent; `rank` is the true one, what pads it is zero.
    """

    module: int
    a: int
    b: int
    rank: int
    padded_rank: int
    scale: float


class Vector(NamedTuple):
    """A module's bias or magnitude: `length` elements at `offset` of the group's extent.

    It lies there as in the file, in the file's `dtype`. A magnitude is what a row of the base's
    weight is scaled to: rounding it to bf16 would scale all of the row by up to 0.2 %. Measured on
    SmolLM2, that moves the logits a hundred times as far as rounding A and B does.
    """

    module: int
    part: Part
    offset: int
    length: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One layer group: an extent of `nbytes` (aligned), and the moves that fill it.

    The moves touch disjoint bytes; `spans` are the file's that they read, no other, in order.
    Bytes between tensors (alignment) are not written, and no row points to them.
    """

    layer: int
    nbytes: int
    reads: tuple[Read, ...]
    converts: tuple[Convert, ...]
    zeros: tuple[Zero, ...]
    rows: tuple[Row, ...]
    spans: tuple[Span, ...]
    vectors: tuple[Vector, ...] = ()


class Target(NamedTuple):
    """What the device wants, and how large a move may be."""

    dtype: str
    alignment: int
    rank_multiple: int
    move_bytes: int


def file_runs(reads: Sequence[Read]) -> list[tuple[Read, ...]]:
    """Reads that follow each other in the file, to be read in one call each; strided ones alone."""
    if len(reads) == 1:
        return [tuple(reads)]
    runs: list[list[Read]] = []
    end = -1
    for read in sorted(reads, key=attrgetter("file_offset")):
        if read.rows > 1 or read.file_offset != end or len(runs[-1]) == _MAX_BUFFERS:
            runs.append([])
        runs[-1].append(read)
        end = read.file_offset + read.nbytes if read.rows == 1 else -1
    return [tuple(run) for run in runs]


def plan_group(layer: int, pairs: list[Pair], target: Target) -> GroupPlan:
    modules, _, a, b, ranks, scales, _ = zip(*pairs, strict=True)
    multiple = target.rank_multiple
    padded = [rank + -rank % multiple for rank in ranks] if multiple > 1 else ranks
    ragged = {n for n, rank in enumerate(ranks) if rank < padded[n]} if multiple > 1 else set()
    owned = [(pair.module, *vector) for pair in pairs for vector in pair.vectors]
    group = _Group(target)
    offsets = group.place([*a, *b], [span for _, _, span in owned], ragged)
    rows = tuple(map(Row, modules, offsets, offsets[len(a) :], ranks, padded, scales))
    vectors = tuple(
        Vector(module, part, offset, span.shape[0], span.dtype)
        for (module, part, span), offset in zip(owned, offsets[2 * len(a) :], strict=True)
    )
    return group.finish(layer, rows, vectors)


class _Group:
    """Gives each tensor the next aligned bytes of a group's extent, and collects the moves."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.item = ITEM_BYTES[target.dtype]
        self.end = 0
        self.runs: list[Run] = []
        self.padded: list[Convert] = []
        self.zeros: list[Zero] = []

    def place(
        self, matrices: list[TensorSpan], vectors: list[TensorSpan], ragged: set[int]
    ) -> list[int]:
        """Offsets of `matrices`, every A, then every B, and of `vectors`, which are not cast.

        The pairs in `ragged` need padding.

        In file order each gets the next aligned bytes, and what adjoins on both sides is one run:
        where the file's packing keeps the alignment, that is the whole group as it lies there.
        """
        spans, count = [*matrices, *vectors], len(matrices)
        pairs = count // 2
        starts = [span.start for span in spans]
        offsets = [0] * len(spans)
        dtype, alignment, _, _ = self.target
        run = Run("", -1, -1, -1, -1)
        end = 0
        for n in sorted(range(len(spans)), key=starts.__getitem__):
            span = spans[n]
            offsets[n] = offset = end + -end % alignment
            if ragged and n < count and n % pairs in ragged:
                pad = self._pad_rows if n < pairs else self._pad_columns
                end = pad(span, offset)
                continue
            source = span.dtype if n < count else dtype
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
                run = Run(source, start, stop, offset, end)
                self.runs.append(run)
        self.end = end
        return offsets

    def _place_pieces(self, span: TensorSpan, offset: int, source: str) -> int:
        """A run for each, of dtype `source`, one after the other from `offset` on."""
        for piece in span.pieces or (Span(span.start, span.stop),):
            start, stop, rows, pitch = piece
            end = offset + piece.nbytes * self.item // ITEM_BYTES[source]
            self.runs.append(Run(source, start, stop, offset, end, rows, pitch))
            offset = end
        return offset

    def _pad_rows(self, a: TensorSpan, offset: int) -> int:
        rows, columns = a.shape
        end = self._place_pieces(a, offset, a.dtype)
        nbytes = -rows % self.target.rank_multiple * columns * self.item
        self.zeros.append(Zero(end, nbytes))
        return end + nbytes

    def _pad_columns(self, b: TensorSpan, offset: int) -> int:
        columns = b.shape[1]
        pitch = columns + -columns % self.target.rank_multiple
        nbytes = columns * ITEM_BYTES[b.dtype]
        step = self.target.move_bytes // max(nbytes, pitch * self.item)
        for start, stop, _, _ in b.pieces or (Span(b.start, b.stop),):  # whole rows
            for first in range(start, stop, step * nbytes):
                rows = min(step, (stop - first) // nbytes)
                self.padded.append(
                    Convert(
                        first,
                        rows * nbytes,
                        b.dtype,
                        rows=rows,
                        columns=columns,
                        target=offset,
                        row_pitch=pitch,
                    )
                )
                offset += rows * pitch * self.item
        return offset

    def finish(self, layer: int, rows: tuple[Row, ...], vectors: tuple[Vector, ...]) -> GroupPlan:
        reads: list[Read] = []
        converts, casts = self.padded, list[Run]()
        moved = [source for each in converts for source in each.sources]
        for run in self.runs:
            moved.append(Span(run.start, run.stop, run.rows, run.pitch))
            if run.dtype == self.target.dtype:
                nbytes = (run.stop - run.start) * run.rows
                reads.append(Read(run.start, nbytes, run.target, run.rows, run.pitch))
            else:
                casts.append(run)
        for runs in adjoining(casts):
            converts.extend(self._cast(runs))
        converts.sort(key=attrgetter("file_offset"))
        moves = tuple(reads), tuple(converts), tuple(self.zeros)
        nbytes = self.end + -self.end % self.target.alignment
        return GroupPlan(layer, nbytes, *moves, rows, merged(moved), vectors)

    def _cast(self, runs: list[Run]) -> Iterator[Convert]:
        """Flat moves of about equal size: a cast without padding does not care for rows."""
        target, source = runs[0].target, ITEM_BYTES[runs[0].dtype]
        elements = (runs[-1].end - target) // self.item
        most = self.target.move_bytes // max(source, self.item)
        step = ceil(elements / ceil(elements / most))
        step = min(most, step + -step % _ELEMENTS)
        for first, pieces in zip(
            range(0, elements, step), portions(runs, step * source), strict=True
        ):
            count = min(step, elements - first)
            yield Convert(
                pieces[0].start,
                count * source,
                runs[0].dtype,
                rows=1,
                columns=count,
                target=target + first * self.item,
                row_pitch=count,
                pieces=tuple(pieces) if len(pieces) > 1 or pieces[0].rows > 1 else (),
            )
