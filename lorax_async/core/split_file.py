"""Weights in several files with an index, as the one safetensors file that they stand for.

`adapter_model.safetensors.index.json` tells of each tensor in which of the files
`adapter_model-00001-of-0000N.safetensors` it is. Behind one header, made of theirs, the files' data
follow each other, so that plans, copies and tiers know of one file only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorax_async.config import Limits
from lorax_async.core.header import LENGTH_BYTES, Header, parse_header
from lorax_async.core.header_writing import Described, write_header
from lorax_async.core.runs import Span
from lorax_async.core.split_index import INDEX, SplitIndex, split_name
from lorax_async.core.strict_json import quoted
from lorax_async.errors import AdapterFormatError, InternalError

_REMEDY = "save or fetch all of the adapter again"


class Head(NamedTuple):
    """One of the files: its beginning, with the whole header, and its size."""

    prefix: bytes | memoryview
    nbytes: int


class Place(NamedTuple):
    """One file's data, which begin at `data_start` in it, are the bytes [start, stop) of all."""

    start: int
    stop: int
    data_start: int


class FileGroups(NamedTuple):
    """What of each group lies in one file: spans of the file, for each of `groups` in their order.

    Groups that have no byte in it are left out.
    """

    groups: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The one file: its beginning with the header, its size, and where in it the files' data are.

    It is no smaller than the files together, so that who holds them holds no more than it has.
    Files are numbered from 1, as their names are; `places[0]` is the prefix, which is in none.
    """

    prefix: bytes
    nbytes: int
    places: tuple[Place, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(place.start for place in self.places))

    def pieces(self, span: Span) -> Iterator[tuple[int, Span]]:
        """The number of a file and a span of it, one after the other, for these bytes in order.

        Of the prefix the number is 0. Raises `InternalError` for bytes beyond the end.
        """
        if span.end > self.nbytes:
            raise InternalError(f"bytes up to {span.end:,} of a file of {self.nbytes:,}")
        start, stop, rows, pitch = span
        while rows and start < stop:
            number = bisect_right(self._starts, start) - 1
            first, last, data_start = self.places[number]
            if stop <= last:
                whole = min(rows, 1 + (last - stop) // pitch) if pitch else 1
                moved = start - first + data_start
                step = pitch if whole > 1 else 0
                yield number, Span(moved, moved + stop - start, whole, step)
            else:
                whole = 1
                yield from self.pieces(Span(start, last))
                yield from self.pieces(Span(last, stop))
            start, stop, rows = start + whole * pitch, stop + whole * pitch, rows - whole

    def by_file(self, groups: Sequence[Sequence[Span]]) -> tuple[FileGroups, ...]:
        """What each file, the first first, has of the groups; what is of the prefix is here."""
        found: list[dict[int, list[Span]]] = [{} for _ in self.places]
        for n, group in enumerate(groups):
            for span in group:
                for number, piece in self.pieces(span):
                    found[number].setdefault(n, []).append(piece)
        return tuple(
            FileGroups(tuple(spans), tuple(map(tuple, spans.values()))) for spans in found[1:]
        )


class SplitArrivals:
    """Which groups are whole, told in their order, while each file tells of its own.

    `files` are of `SplitPlan.by_file`, of `count` groups. A group without bytes is whole as soon as
    those before it are. One thread at a time.
    """

    def __init__(self, count: int, files: Sequence[FileGroups]) -> None:
        self._files = files
        self._missing = Counter(group for file in files for group in file.groups)
        self._count = count
        self._told = 0

    def landed(self, number: int, n: int) -> list[int]:
        """All that the file has of the nth of its groups is here, for the first time; `take`."""
        group = self._files[number - 1].groups[n]
        self._missing[group] -= 1
        if self._missing[group] < 0:
            raise InternalError(f"group {group} of file {number} landed twice")
        return self.take()

    def take(self) -> list[int]:
        """The groups that are whole, as are all before them, and were not taken yet."""
        first = self._told
        while self._told < self._count and not self._missing[self._told]:
            self._told += 1
        return list(range(first, self._told))


def plan_split(index: SplitIndex, heads: Iterable[Head], limits: Limits) -> SplitPlan:
    """Check the files' headers against each other and the index, and put them together.

    Parameters
    ----------
    heads
        Of every file in the order of their numbers. Each is let go before the next is asked for.

    Raises
    ------
    AdapterFormatError
        A file breaks the format, lacks a tensor that the index promises or has another one, or all
        together are over a limit. It names the file, and the tensor.
    """
    tensors: list[Described] = []
    headers: list[tuple[int, int]] = []
    sizes = Counter[str]()
    for number, head in zip(range(1, index.count + 1), heads, strict=True):
        header = _checked_header(index, number, head, limits)
        tensors += (Described(span.name, span.dtype, span.shape) for span in header.tensors)
        headers.append((header.data_start, head.nbytes))
        sizes["header bytes"] += header.data_start
        sizes["bytes"] += head.nbytes
        _check_sum("header bytes", sizes, limits.max_header_bytes, number)
        _check_sum("bytes", sizes, limits.max_adapter_bytes, number)
    prefix, _ = write_header(tensors, least=sizes["header bytes"])
    if len(prefix) - LENGTH_BYTES > limits.max_header_bytes:
        raise AdapterFormatError(
            f"{INDEX}: one header of all files has {len(prefix):,} bytes, over the limit of"
            f" {limits.max_header_bytes:,}"
        )
    places = [Place(0, len(prefix), 0)]
    for data_start, nbytes in headers:
        start = places[-1].stop
        places.append(Place(start, start + nbytes - data_start, data_start))
    return SplitPlan(prefix, places[-1].stop, tuple(places))


def _checked_header(index: SplitIndex, number: int, head: Head, limits: Limits) -> Header:
    name = split_name(number, index.count)
    try:
        header = parse_header(head.prefix, head.nbytes, limits)
    except AdapterFormatError as error:
        raise error.prefixed(f"{name}: ") from None
    for span in header.tensors:
        said = index.numbers.get(span.name)
        if said != number:
            where = f"in {split_name(said, index.count)}" if said else "nowhere"
            raise AdapterFormatError(
                f"{name}: has tensor {quoted(span.name)}, which by {INDEX} is {where}; {_REMEDY}"
            )
    if len(header.tensors) != index.tensors_in[number - 1]:
        here = {span.name for span in header.tensors}
        lost = min(each for each, n in index.numbers.items() if n == number and each not in here)
        raise AdapterFormatError(
            f"{name}: has no tensor {quoted(lost)}, which by {INDEX} is in it; {_REMEDY}"
        )
    return header


def _check_sum(what: str, sizes: Counter[str], limit: int, number: int) -> None:
    if sizes[what] > limit:
        raise AdapterFormatError(
            f"{INDEX}: the first {number} files have {sizes[what]:,} {what}, over the limit of"
            f" {limit:,}"
        )
