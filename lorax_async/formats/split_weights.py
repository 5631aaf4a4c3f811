"""Several files of weights with an index, as the one safetensors file that they stand for."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Literal, NamedTuple

from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, InternalError, UsageError
from lorax_async.formats.safetensors import (
    LENGTH_BYTES,
    Header,
    TensorDescription,
    parse_header,
    write_header,
)
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.strict_json import parse_object, quoted

MAX_SHARDS = 99_999
_ADAPTER_FILE = re.compile(
    r"(?P<config>adapter_config\.json)"
    r"|(?P<index>adapter_model\.safetensors\.index\.json)"
    r"|(?P<weights>adapter_model(?:-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5}))?\.safetensors)"
)


@dataclass(frozen=True, slots=True, order=True)
class FileRole:
    """One of an adapter's files. Weights in one file have number 0; `count` shards count from 1.

    Raises `UsageError` for any other number.
    """

    kind: Literal["config", "index", "weights"]
    number: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        most = MAX_SHARDS if self.kind == "weights" else 0
        if not min(self.count, 1) <= self.number <= self.count <= most:
            raise UsageError(f"there is no {self.kind} file {self.number} of {self.count}")

    @property
    def file_name(self) -> str:
        if self.kind == "config":
            return "adapter_config.json"
        if self.kind == "index":
            return "adapter_model.safetensors.index.json"
        shard = f"-{self.number:05d}-of-{self.count:05d}" if self.number else ""
        return f"adapter_model{shard}.safetensors"


CONFIG_FILE = FileRole("config")
INDEX_FILE = FileRole("index")
WEIGHTS_FILE = FileRole("weights")


def role_of(file_name: str) -> FileRole | None:
    """Return the role of a file name; None if no adapter has such a file."""
    found = _ADAPTER_FILE.fullmatch(file_name)
    if found is None:
        return None
    if found["weights"] is None:
        return CONFIG_FILE if found["config"] else INDEX_FILE
    number, count = int(found["number"] or 0), int(found["count"] or 0)
    is_shard = 1 <= number <= count
    return FileRole("weights", number, count) if is_shard or found["number"] is None else None


INDEX = INDEX_FILE.file_name

MAX_FILES = 256
"""Each is an open file while it is read, of which a process commonly may have 1,024. The largest
adapter that is accepted by default (4 GiB), in so many files, has 16 MiB in each."""

_FILE = re.compile(r"adapter_model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_INDEX_REMEDY = "write the index again with the tool that split the weights"


def split_name(number: int, count: int) -> str:
    """The name of one of `count` files of weights, numbered from 1."""
    return f"adapter_model-{number:05d}-of-{count:05d}.safetensors"


def joined_digest(digests: Sequence[str]) -> str:
    """The sha256 of weights, given that of each file in the order of their numbers.

    Of several files it is that of the lines "digest  file name", as `sha256sum` writes them.
    """
    if len(digests) == 1:
        return digests[0]
    names = (split_name(number, len(digests)) for number in range(1, len(digests) + 1))
    lines = (f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SplitIndex:
    """The number of the file that has it, from 1, for every tensor; each file has one or more.

    `tensors_in` counts each file's, the first file's first.
    """

    numbers: Mapping[str, int]
    tensors_in: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many files there are."""
        return len(self.tensors_in)

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(split_name(number, self.count) for number in range(1, self.count + 1))


def parse_index(data: bytes, limits: Limits) -> SplitIndex:
    """Parse an index. It may have as many bytes as a header, which says more of each tensor.

    What is malformed, names a file otherwise than `split_name` does, or leaves one out raises
    `AdapterFormatError`.
    """
    members = parse_object(
        data, what=INDEX, max_bytes=limits.max_header_bytes, max_depth=limits.max_json_depth
    )
    if unknown := members.keys() - {"metadata", "weight_map"}:
        raise AdapterFormatError(
            f"{INDEX}: member {quoted(min(unknown))} is unknown; {_INDEX_REMEDY}"
        )
    weight_map = members.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFormatError(f"{INDEX}: its weight_map names no tensors; {_INDEX_REMEDY}")
    if len(weight_map) > limits.max_tensors:
        raise AdapterFormatError(
            f"{INDEX}: {len(weight_map):,} tensors, over the limit of {limits.max_tensors:,}"
        )
    files: dict[str, tuple[int, int]] = {}
    numbers: dict[str, int] = {}
    counts: set[int] = set()
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise _wrong(tensor, "has no name of a file")
        if file not in files:
            files[file] = _parse_split_name(tensor, file)
        numbers[tensor], count = files[file]
        counts.add(count)
        if other := counts - {count}:
            raise _wrong(tensor, f"is in one of {count} files, others in one of {other.pop()}")
    return _complete(numbers, counts.pop())


def _parse_split_name(tensor: str, file: str) -> tuple[int, int]:
    """Return the number of a file, from 1, and how many there are by its name."""
    found = _FILE.fullmatch(file)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        pattern = split_name(1, 3)
        raise _wrong(tensor, f"is in {quoted(file)}, which is no name of the form {pattern!r}")
    if count > MAX_FILES:
        raise _wrong(tensor, f"is in one of {count:,} files, over the limit of {MAX_FILES}")
    return number, count


def _complete(numbers: dict[str, int], count: int) -> SplitIndex:
    """Check that every file from the first to the last has a tensor."""
    found = Counter(numbers.values())
    tensors_in = tuple(found[number] for number in range(1, count + 1))
    if 0 in tensors_in:
        empty = split_name(1 + tensors_in.index(0), count)
        raise AdapterFormatError(f"{INDEX}: no tensor is in {empty}; {_INDEX_REMEDY}")
    return SplitIndex(MappingProxyType(numbers), tensors_in)


def _wrong(tensor: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{INDEX}: tensor {quoted(tensor)} {problem}; {_INDEX_REMEDY}")


_REMEDY = "save or fetch all of the adapter again"


class FileHead(NamedTuple):
    """One of the files: its beginning, with the whole header, and its size."""

    prefix: bytes | memoryview
    nbytes: int


class FilePlace(NamedTuple):
    """One file's data, which begin at `data_start` in it, are the bytes [start, stop) of all."""

    start: int
    stop: int
    data_start: int


class FileGroups(NamedTuple):
    """What of each group lies in one file: spans of the file, for each of `groups` in their order.

    Groups that have no byte in it are left out.
    """

    groups: tuple[int, ...]
    spans: tuple[tuple[ByteSpan, ...], ...]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The one file: its beginning with the header, its size, and where in it the files' data are.

    It is no smaller than the files together, so that who holds them holds no more than it has.
    Files are numbered from 1, as their names are; `places[0]` is the prefix, which is in none.
    """

    prefix: bytes
    nbytes: int
    places: tuple[FilePlace, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(place.start for place in self.places))

    def pieces(self, span: ByteSpan) -> Iterator[tuple[int, ByteSpan]]:
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
                yield number, ByteSpan(moved, moved + stop - start, whole, step)
            else:
                whole = 1
                yield from self.pieces(ByteSpan(start, last))
                yield from self.pieces(ByteSpan(last, stop))
            start, stop, rows = start + whole * pitch, stop + whole * pitch, rows - whole

    def by_file(self, groups: Sequence[Sequence[ByteSpan]]) -> tuple[FileGroups, ...]:
        """What each file, the first first, has of the groups; what is of the prefix is here."""
        found: list[dict[int, list[ByteSpan]]] = [{} for _ in self.places]
        for n, group in enumerate(groups):
            for span in group:
                for number, piece in self.pieces(span):
                    found[number].setdefault(n, []).append(piece)
        return tuple(
            FileGroups(tuple(spans), tuple(map(tuple, spans.values()))) for spans in found[1:]
        )


class SplitGroupArrivals:
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


def plan_split(index: SplitIndex, heads: Iterable[FileHead], limits: Limits) -> SplitPlan:
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
    tensors: list[TensorDescription] = []
    headers: list[tuple[int, int]] = []
    sizes = Counter[str]()
    for number, head in zip(range(1, index.count + 1), heads, strict=True):
        header = _checked_header(index, number, head, limits)
        tensors += (TensorDescription(span.name, span.dtype, span.shape) for span in header.tensors)
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
    places = [FilePlace(0, len(prefix), 0)]
    for data_start, nbytes in headers:
        start = places[-1].stop
        places.append(FilePlace(start, start + nbytes - data_start, data_start))
    return SplitPlan(prefix, places[-1].stop, tuple(places))


def _checked_header(index: SplitIndex, number: int, head: FileHead, limits: Limits) -> Header:
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
