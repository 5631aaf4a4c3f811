"""Weights in several files with an index, presented as a single safetensors file."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
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
    """The role of a file in an adapter. Shards are numbered from 1 to `count`; other files are 0.

    Raises `UsageError` for an invalid number.
    """

    kind: Literal["config", "index", "weights"]
    number: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        limit = MAX_SHARDS if self.kind == "weights" else 0
        if not min(self.count, 1) <= self.number <= self.count <= limit:
            raise UsageError(f"invalid {self.kind} file {self.number} of {self.count}")

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
    """Return the role of a file name, or None if it is not an adapter file."""
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
"""The limit of shards. Each is an open file while it is read, and a process commonly may have
1,024. The largest adapter accepted by default (4 GiB) has 16 MiB per file then."""

_INDEX_REMEDY = "write the index again with the tool that split the weights"


def split_name(number: int, count: int) -> str:
    """Return the name of shard `number`, from 1, of `count`."""
    return FileRole("weights", number, count).file_name


def join_digests(digests: Sequence[str]) -> str:
    """Return the SHA-256 of weights from that of each file, in order.

    For several files, hash the lines "digest  file name", as `sha256sum` writes them.
    """
    if len(digests) == 1:
        return digests[0]
    names = (split_name(number, len(digests)) for number in range(1, len(digests) + 1))
    lines = (f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SplitIndex:
    """A checked index: the file number, from 1, of each tensor. Every file has a tensor.

    `tensors_in` is the number of tensors of each file, in order.
    """

    numbers: Mapping[str, int]
    tensors_in: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of files."""
        return len(self.tensors_in)

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(split_name(number, self.count) for number in range(1, self.count + 1))


def parse_index(data: bytes, limits: Limits) -> SplitIndex:
    """Parse an index, of at most `max_header_bytes`.

    Raises `AdapterFormatError` for a malformed index, a file name that is not `split_name`'s, and
    a file without tensors.
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
            raise _index_error(tensor, "has no file name")
        if file not in files:
            files[file] = _parse_split_name(tensor, file)
        numbers[tensor], count = files[file]
        counts.add(count)
        if other := counts - {count}:
            raise _index_error(
                tensor, f"is in one of {count} files, others in one of {other.pop()}"
            )
    count, found = counts.pop(), Counter(numbers.values())
    tensors_in = tuple(found[number] for number in range(1, count + 1))
    if 0 in tensors_in:
        empty = split_name(1 + tensors_in.index(0), count)
        raise AdapterFormatError(f"{INDEX}: no tensor is in {empty}; {_INDEX_REMEDY}")
    return SplitIndex(MappingProxyType(numbers), tensors_in)


def _parse_split_name(tensor: str, file: str) -> tuple[int, int]:
    """Return the number and the count in a shard's file name."""
    role = role_of(file)
    if role is None or not role.count:
        pattern = split_name(1, 3)
        raise _index_error(tensor, f"is in {quoted(file)}, which is not a name like {pattern!r}")
    if role.count > MAX_FILES:
        raise _index_error(
            tensor, f"is in one of {role.count:,} files, over the limit of {MAX_FILES}"
        )
    return role.number, role.count


def _index_error(tensor: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{INDEX}: tensor {quoted(tensor)} {problem}; {_INDEX_REMEDY}")


_REMEDY = "save or fetch all of the adapter again"


class FileHead(NamedTuple):
    """The start of a shard, with its whole header, and its size."""

    prefix: bytes | memoryview
    nbytes: int


class FilePlace(NamedTuple):
    """A shard's place: its data, from `data_start` on, are [start, stop) of the joined file."""

    start: int
    stop: int
    data_start: int


class FileGroups(NamedTuple):
    """The layer groups with bytes in one shard, and the spans of the shard for each."""

    groups: tuple[int, ...]
    spans: tuple[tuple[ByteSpan, ...], ...]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The joined file: its prefix with the header, its size, and the place of each shard.

    It is at least as large as the shards together, so that it bounds their size. Shards are
    numbered from 1; `places[0]` is the prefix, which is in no shard.
    """

    prefix: bytes
    nbytes: int
    places: tuple[FilePlace, ...]

    def pieces(self, span: ByteSpan) -> Iterator[tuple[int, ByteSpan]]:
        """Yield shard numbers and spans of the shards that make up `span`, in order.

        The prefix has number 0. Raises `InternalError` for bytes beyond the end.
        """
        if span.end > self.nbytes:
            raise InternalError(f"bytes up to {span.end:,} of a file of {self.nbytes:,}")
        start, stop, rows, pitch = span
        while rows and start < stop:
            number = bisect_right(self.places, start, key=itemgetter(0)) - 1
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
        """Return each shard's part of the groups, in order of shards; omit the prefix."""
        found: list[dict[int, list[ByteSpan]]] = [{} for _ in self.places]
        for n, group in enumerate(groups):
            for span in group:
                for number, piece in self.pieces(span):
                    found[number].setdefault(n, []).append(piece)
        return tuple(
            FileGroups(tuple(spans), tuple(map(tuple, spans.values()))) for spans in found[1:]
        )


def plan_split(index: SplitIndex, heads: Iterable[FileHead], limits: Limits) -> SplitPlan:
    """Check the shards' headers against each other and the index, and join them.

    `heads` has one per shard, in order; each is released before the next is requested. Raise
    `AdapterFormatError`, which names the shard and the tensor, for a shard that breaks the format
    or disagrees with the index, and for a total over a limit.
    """
    tensors: list[TensorDescription] = []
    headers: list[tuple[int, int]] = []
    header_bytes = nbytes = 0
    for number, head in zip(range(1, index.count + 1), heads, strict=True):
        header = _check_header(index, number, head, limits)
        tensors += (TensorDescription(span.name, span.dtype, span.shape) for span in header.tensors)
        headers.append((header.data_start, head.nbytes))
        header_bytes, nbytes = header_bytes + header.data_start, nbytes + head.nbytes
        for what, sum_, limit in (
            ("header bytes", header_bytes, limits.max_header_bytes),
            ("bytes", nbytes, limits.max_adapter_bytes),
        ):
            if sum_ > limit:
                raise AdapterFormatError(
                    f"{INDEX}: the first {number} files have {sum_:,} {what}, over the limit of"
                    f" {limit:,}"
                )
    prefix, _ = write_header(tensors, least=header_bytes)
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


def _check_header(index: SplitIndex, number: int, head: FileHead, limits: Limits) -> Header:
    name = split_name(number, index.count)
    try:
        header = parse_header(head.prefix, head.nbytes, limits)
    except AdapterFormatError as error:
        raise error.prefixed(f"{name}: ") from None
    for span in header.tensors:
        indexed = index.numbers.get(span.name)
        if indexed != number:
            where = f"in {split_name(indexed, index.count)}" if indexed else "nowhere"
            raise AdapterFormatError(
                f"{name}: has tensor {quoted(span.name)}, which by {INDEX} is {where}; {_REMEDY}"
            )
    if len(header.tensors) != index.tensors_in[number - 1]:
        present = {span.name for span in header.tensors}
        missing = min(
            name for name, n in index.numbers.items() if n == number and name not in present
        )
        raise AdapterFormatError(
            f"{name}: has no tensor {quoted(missing)}, which by {INDEX} is in it; {_REMEDY}"
        )
    return header
