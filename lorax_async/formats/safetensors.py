"""Read, check and write the header of a safetensors file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter, sub
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.strict_json import (
    LFS_REMEDY,
    JsonValue,
    is_lfs_pointer,
    parse_object,
    quoted,
)

LENGTH_BYTES = 8
_WHAT = "safetensors header"
_RESAVE = "re-save the file with safetensors"
_METADATA = "__metadata__"
_MEMBERS = {"dtype", "shape", "data_offsets"}
_PLACE = itemgetter(3, 4, 0)
"""The sort key of a `TensorSpan`: start, stop, name."""
_INTEGER = "(0|[1-9][0-9]{0,18})"
# An entry as safetensors writes it, with a name of printable ASCII without escapes. Adjacent parts
# of the pattern share no character, so that matching is linear.
_ENTRY = re.compile(
    r'"([ !#-\[\]-~]{1,512})":'
    r'\{"dtype":"([A-Z0-9_]{1,16})","shape":\[([0-9,]{0,159})\],'
    rf'"data_offsets":\[{_INTEGER},{_INTEGER}\]\}}'
)
_INT64_MAX = 2**63 - 1
_DEFAULT_LIMITS = Limits()

_Entry: TypeAlias = tuple[str, str, tuple[int, ...], int, int]
"""Name, dtype, shape and both offsets, of checked types."""

_DTYPES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "C64 F64 I64 U64",
}
DTYPE_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {dtype: bits for bits, dtypes in _DTYPES_BY_BITS.items() for dtype in dtypes.split()}
)
"""Bits per element of every dtype of safetensors 0.8.0, in its spelling."""


class TensorSpan(NamedTuple):
    """The position of one tensor, in bytes from the start of the file.

    The tensor of a shard has `pieces`, the bytes it consists of, and the `shape` of those. Spans
    of a header have none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    pieces: tuple[ByteSpan, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header, whose tensors tile the file from `data_start` to its end.

    `tensors` are in file order. An empty tensor comes before the one that starts at its offset;
    empty tensors at the same offset are sorted by name.
    """

    tensors: tuple[TensorSpan, ...]
    metadata: Mapping[str, str]
    data_start: int


def header_end(start: bytes | memoryview) -> int:
    """Return the unchecked end of the header, in bytes.

    If `start`, the first bytes of the file, has fewer than 8 bytes, return 8.
    """
    if len(start) < LENGTH_BYTES:
        return LENGTH_BYTES
    return LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")


def header_size(
    first_eight: bytes | memoryview, file_size: int, limits: Limits = _DEFAULT_LIMITS
) -> int:
    """Return the number of leading bytes of the file that `parse_header` needs.

    `first_eight` holds at least the file's first eight bytes, or all of a shorter file.
    """
    if file_size < LENGTH_BYTES or len(first_eight) < LENGTH_BYTES:
        raise AdapterFormatError(
            f"{_WHAT}: the file has {min(file_size, len(first_eight))} bytes and cannot be a"
            " safetensors file; fetch it again"
        )
    if is_lfs_pointer(first_eight):
        raise AdapterFormatError(
            f"{_WHAT}: the file is a Git LFS pointer, not the weights; {LFS_REMEDY}"
        )
    size = int.from_bytes(first_eight[:LENGTH_BYTES], "little")
    is_cut = LENGTH_BYTES + size > file_size
    if size > limits.max_header_bytes:
        if is_cut:
            raise AdapterFormatError(
                f"{_WHAT}: this is not a safetensors file, as its first bytes show; fetch it again,"
                f" or {_RESAVE}"
            )
        raise AdapterFormatError(
            f"{_WHAT}: a header of {size:,} bytes is over the limit of"
            f" {limits.max_header_bytes:,}, or this is not a safetensors file; raise"
            f" Limits.max_header_bytes, or {_RESAVE}"
        )
    if is_cut:
        raise AdapterFormatError(
            f"{_WHAT}: the file has {file_size:,} bytes and ends inside its header of {size:,};"
            " fetch it again"
        )
    return LENGTH_BYTES + size


def parse_header(
    prefix: bytes | memoryview, file_size: int, limits: Limits = _DEFAULT_LIMITS
) -> Header:
    """Check the header at the beginning of a file of `file_size` bytes.

    `prefix` holds at least `header_size` bytes. Raises `AdapterFormatError`, which names the
    tensor, for any violation of the format.
    """
    data_start = header_size(prefix, file_size, limits)
    if len(prefix) < data_start:
        raise AdapterFormatError(
            f"{_WHAT}: only {len(prefix):,} of its {data_start:,} bytes could be read; fetch the"
            " file again"
        )
    text = memoryview(prefix)[LENGTH_BYTES:data_start]
    if bytes(text[:1]) != b"{":
        raise AdapterFormatError(f"{_WHAT}: does not begin with '{{'; {_RESAVE}")
    try:
        metadata, tensors = _parse_canonical(text, data_start, limits) or _parse_any(
            text, data_start, limits
        )
        tensors.sort(key=_PLACE)
        _check_tiling(tensors, data_start, file_size)
    except MemoryError:
        raise AdapterFormatError(f"{_WHAT}: too large for the memory at hand") from None
    return Header(tuple(tensors), MappingProxyType(metadata), data_start)


_Parsed: TypeAlias = tuple[dict[str, str], list[TensorSpan]]
"""The metadata, and the tensors, each of which was checked."""


def _parse_canonical(text: memoryview, data_start: int, limits: Limits) -> _Parsed | None:
    """Parse a header in safetensors' own spelling by columns, in a third of `_parse_any`'s time.

    Return None for any other spelling, and for a malformed header, which `_parse_any` refuses.
    """
    try:
        first, *columns, last = _ENTRY.split(str(text, "ascii"))
        names, dtypes, shapes, starts, stops, between = (columns[n::6] for n in range(6))
        metadata = {}
        if first != "{":
            head, comma = first[:-1], first[-1:]
            members = parse_object(f"{head}}}".encode(), what=_WHAT, max_bytes=len(text))
            metadata = _pop_metadata(members)
            if members or comma != "," or head == "{":
                return None
        if not between.count(",") == len(between) == len(names) - 1 or last.rstrip(" ") != "}":
            return None
        lists = {shape: tuple(json.loads(f"[{shape}]")) for shape in set(shapes)}
        kinds = list(zip(dtypes, shapes, strict=True))
        sizes = {kind: _nbytes("", kind[0], lists[kind[1]], limits) for kind in set(kinds)}
    except (ValueError, AdapterFormatError):
        return None
    if len(set(names)) < len(names) or _METADATA in names or len(names) > limits.max_tensors:
        return None
    first, last = list(map(int, starts)), list(map(int, stops))
    if list(map(sub, last, first)) != [sizes[kind] for kind in kinds]:
        return None
    if max(map(len, names)) > limits.max_name_bytes:
        return None
    offsets = map(data_start.__add__, first), map(data_start.__add__, last)
    fields = zip(names, dtypes, map(lists.__getitem__, shapes), *offsets, repeat(()), strict=False)
    # As `TensorSpan._make` does, without a call of Python code for each of hundreds.
    return metadata, list(map(tuple.__new__, repeat(TensorSpan), fields))


def _parse_any(text: memoryview, data_start: int, limits: Limits) -> _Parsed:
    """Parse any header, and refuse malformed JSON, wrong types and wrong sizes."""
    # Checking the types bounds the depth.
    members = parse_object(text, what=_WHAT, max_bytes=limits.max_header_bytes, max_depth=None)
    metadata = _pop_metadata(members)
    entries = [(name, *_parse_entry(name, value)) for name, value in members.items()]
    return metadata, _spans(entries, data_start, limits)


def _pop_metadata(members: dict[str, JsonValue]) -> dict[str, str]:
    """Remove the metadata from the header's members and return it."""
    value = members.pop(_METADATA, {})
    what = f"{_WHAT}, {_METADATA}"
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{what}: not an object; {_RESAVE}")
    metadata = {key: text for key, text in value.items() if isinstance(text, str)}
    for key in value:
        if key not in metadata:
            raise AdapterFormatError(f"{what}: member {quoted(key)} is not a string; {_RESAVE}")
    return metadata


def _parse_entry(name: str, value: JsonValue) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(value, dict):
        raise _malformed_error(name, "not an object of just dtype, shape and data_offsets")
    if odd := value.keys() ^ _MEMBERS:
        member = min(odd)
        fault = "unknown" if member in value else "missing"
        raise _malformed_error(name, f"member {quoted(member)} is {fault}")
    dtype = value["dtype"]
    if not isinstance(dtype, str):
        raise _malformed_error(name, "dtype is not a string")
    shape, offsets = (_integers(name, key, value[key]) for key in ("shape", "data_offsets"))
    if len(offsets) != 2:
        raise _malformed_error(name, f"data_offsets has {len(offsets):,} entries, not 2")
    return dtype, shape, *offsets


def _integers(name: str, member: str, value: JsonValue) -> tuple[int, ...]:
    # Not isinstance, which accepts bool.
    integers = [n for n in value if type(n) is int] if isinstance(value, list) else []
    if not isinstance(value, list) or len(integers) < len(value):
        raise _malformed_error(name, f"{member} is not a list of integers")
    return tuple(integers)


def _spans(entries: list[_Entry], data_start: int, limits: Limits) -> list[TensorSpan]:
    """Check each tensor separately."""
    if len(entries) > limits.max_tensors:
        raise AdapterFormatError(
            f"{_WHAT}: {len(entries):,} tensors, more than the limit of {limits.max_tensors:,}"
        )
    spans: list[TensorSpan] = []
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # few pairs differ within a file
    for name, dtype, shape, start, stop in entries:
        # Only ASCII has one byte per character.
        if not (0 < len(name) <= limits.max_name_bytes and name.isascii()):
            _check_name(name, limits)
        nbytes = sizes.get((dtype, shape))
        if nbytes is None:
            nbytes = sizes[dtype, shape] = _nbytes(name, dtype, shape, limits)
        if start < 0 or stop - start != nbytes:
            raise _malformed_error(
                name, f"{dtype} {list(shape)} needs {nbytes:,} bytes, not {[start, stop]}"
            )
        spans.append(TensorSpan(name, dtype, shape, data_start + start, data_start + stop))
    return spans


def _check_name(name: str, limits: Limits) -> None:
    # Do not encode a name that has more characters than bytes are allowed.
    size = len(name) if len(name) > limits.max_name_bytes else len(name.encode())
    if not 1 <= size <= limits.max_name_bytes:
        raise _malformed_error(name, f"a name of {size:,} bytes, not 1 to {limits.max_name_bytes}")


def _nbytes(name: str, dtype: str, shape: tuple[int, ...], limits: Limits) -> int:
    if dtype not in DTYPE_BITS:
        raise _malformed_error(name, f"unknown dtype {quoted(dtype)}")
    if len(shape) > limits.max_dimensions:
        raise _malformed_error(
            name, f"{len(shape):,} dimensions, more than the limit of {limits.max_dimensions}"
        )
    # Over the non-zero ones: torch multiplies strides even if a dimension is 0.
    if min(shape, default=0) < 0 or math.prod(filter(None, shape)) > _INT64_MAX:
        raise _malformed_error(name, "shape is negative or beyond int64")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise _malformed_error(name, f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8


def _check_tiling(spans: list[TensorSpan], data_start: int, file_size: int) -> None:
    """Check that the sorted spans tile the file's data without holes, overlaps or a rest."""
    end, before = data_start, ""
    for span in spans:
        if span.start < end:
            raise _malformed_error(span.name, f"bytes overlap those of {quoted(before)}")
        if span.start > end:
            raise _malformed_error(span.name, f"a hole of {span.start - end:,} bytes before it")
        end, before = span.stop, span.name
    if end < file_size:
        raise AdapterFormatError(
            f"{_WHAT}: {file_size - end:,} bytes after the last tensor; {_RESAVE}"
        )
    if end > file_size:
        raise AdapterFormatError(
            f"tensor {quoted(before)}: the file ends {end - file_size:,} bytes before it"
            " does; fetch it again"
        )


def _malformed_error(name: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"tensor {quoted(name)}: {problem}; {_RESAVE}")


ALIGNMENT = 64
"""Tensor data starts at a multiple of this, so that most files need no rearranging."""


class TensorDescription(NamedTuple):
    """A tensor to write, with `dtype` in the format's spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_header(tensors: Iterable[TensorDescription]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the bytes before the tensor data, and the [start, stop) of each tensor.

    The tensors are contiguous and in the same order.
    """
    # One by one: encoding thousands of entries in one call would hold the GIL throughout.
    entries: list[str] = []
    bounds: list[tuple[int, int]] = []
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        shape = ",".join(map(str, tensor.shape))
        entries.append(
            f'{json.dumps(tensor.name)}:{{"dtype":"{tensor.dtype}","shape":[{shape}],'
            f'"data_offsets":[{start},{end}]}}'
        )
        bounds.append((start, end))
    text = f"{{{','.join(entries)}}}".encode()
    first = LENGTH_BYTES + len(text)
    first += -first % ALIGNMENT
    text = text.ljust(first - LENGTH_BYTES)
    prefix = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return prefix, [(first + start, first + end) for start, end in bounds]
