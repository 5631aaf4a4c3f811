"""The entries of a safetensors header, read one by one from its JSON text.

What a span must be by itself is checked here; how the spans tile the file is `header.py`'s part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple, Self, TypeAlias

from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.core.strict_json import (
    MAX_DEPTH,
    JsonValue,
    enter_object,
    expect_end,
    quoted,
    read_delimiter,
    read_name,
    read_string,
    read_value,
)
from lorax_async.errors import AdapterFormatError

WHAT = "safetensors header"
RESAVE = "re-save the file with safetensors"

_METADATA = "__metadata__"
_INT64_MAX = 2**63 - 1
_MEMBERS = {"dtype", "shape", "data_offsets"}

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
"""Bits of one element, for every dtype of safetensors 0.8.0 in its own spelling."""

_INTEGER = r"(?:0|[1-9][0-9]{0,18})"
_SHAPE = re.compile(rf"(?:{_INTEGER}(?:,{_INTEGER}){{0,7}})?")
# An entry as safetensors writes it, the name printable ASCII without escapes, and the delimiter
# after it. Neighbouring parts share no character, so matching is linear.
_CANONICAL = re.compile(
    rf'"((?!{_METADATA}")[ !#-\[\]-~]{{1,512}})":'
    r'\{"dtype":"([A-Z0-9_]{1,16})","shape":\[([0-9,]{0,159})\],'
    rf'"data_offsets":\[({_INTEGER}),({_INTEGER})\]\}}([,}}])'
)
# No legal entry holds a brace; the bound keeps a hostile one from holding the GIL.
_ENTRY = re.compile(r"\{[^{}]{0,65534}\}")


class TensorSpan(NamedTuple):
    """Where one tensor lies: `start` and `stop` count bytes from the beginning of the file.

    Where only some of its bytes are meant (a shard's), `pieces` are these, and `shape` is what they
    make. A header's spans have none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    pieces: tuple[Span, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """What a stranger's header may ask for. `max_depth` counts the header's own object as 1."""

    max_header_bytes: int = 16 * 1024 * 1024
    max_tensors: int = 65_536
    max_name_bytes: int = 512
    max_dimensions: int = 8
    max_depth: int = MAX_DEPTH
    max_metadata_members: int = 65_536

    @classmethod
    def of(cls, limits: Limits) -> Self:
        """As the loader's settings have them."""
        return cls(
            max_header_bytes=limits.max_header_bytes,
            max_tensors=limits.max_tensors,
            max_name_bytes=limits.max_name_bytes,
            max_dimensions=limits.max_dimensions,
            max_depth=limits.max_json_depth,
        )


_Layout: TypeAlias = tuple[tuple[int, ...], int]
"""Shape and bytes."""


@dataclass(slots=True)
class Entries:
    """The members of the header's object, read one by one.

    `layouts` remembers the legal pairs of dtype and shape: few of them differ within a file.
    """

    text: str
    limits: HeaderLimits
    data_start: int
    spans: list[TensorSpan] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    layouts: dict[tuple[str, str | tuple[int, ...]], _Layout] = field(default_factory=dict)

    def read(self) -> None:
        more, position = enter_object(self.text, 0, what=WHAT)
        while more:
            more, position = self._canonical_entries(position)
            if more:
                more, position = self._member(position)
        expect_end(self.text, position, what=WHAT)

    def _canonical_entries(self, position: int) -> tuple[bool, int]:
        """Read legal entries in the ordinary spelling; stop before the first other member.

        It refuses nothing: what it does not take, `_member` reads, and refuses where it must.
        """
        names, layouts, base = self.names, self.layouts, self.data_start
        longest = self.limits.max_name_bytes
        for _ in range(self.limits.max_tensors - len(self.spans)):
            if (entry := _CANONICAL.match(self.text, position)) is None:
                break
            name, dtype, shape_text, start_text, stop_text, delimiter = entry.groups()
            layout = layouts.get((dtype, shape_text)) or self._canonical_layout(dtype, shape_text)
            start, stop = int(start_text), int(stop_text)
            if layout is None or stop - start != layout[1] or len(name) > longest or name in names:
                break
            names.add(name)
            self.spans.append(TensorSpan(name, dtype, layout[0], base + start, base + stop))
            position = entry.end()
            if delimiter == "}":
                return False, position
        return True, position

    def _canonical_layout(self, dtype: str, shape_text: str) -> _Layout | None:
        if not _SHAPE.fullmatch(shape_text):
            return None
        shape = tuple(map(int, shape_text.split(","))) if shape_text else ()
        if _layout_problem(dtype, shape, self.limits):
            return None
        layout = self.layouts[dtype, shape_text] = shape, _size(dtype, shape)
        return layout

    def _member(self, position: int) -> tuple[bool, int]:
        name, position = read_name(self.text, position, what=WHAT)
        if name == _METADATA:
            position = self._metadata(position)
        else:
            self._check_name(name)
            position = self._entry(name, position)
        return read_delimiter(self.text, position, what=WHAT)

    def _check_name(self, name: str) -> None:
        # A name of more characters than bytes are allowed need not be encoded to be too long.
        size = len(name) if len(name) > self.limits.max_name_bytes else len(name.encode())
        if not 1 <= size <= self.limits.max_name_bytes:
            raise malformed(
                name, f"a name of {size:,} bytes, not 1 to {self.limits.max_name_bytes}"
            )
        if name in self.names:
            raise malformed(name, "the name stands there twice")
        if len(self.spans) >= self.limits.max_tensors:
            raise malformed(name, f"more than the limit of {self.limits.max_tensors:,} tensors")

    def _metadata(self, position: int) -> int:
        what = f"{WHAT}, {_METADATA}"
        if _METADATA in self.names:
            raise AdapterFormatError(f"{what}: stands there twice; {RESAVE}")
        self.names.add(_METADATA)
        more, position = enter_object(self.text, position, what=what)
        while more:
            key, position = read_name(self.text, position, what=what)
            if key in self.metadata:
                raise AdapterFormatError(f"{what}: member {quoted(key)} appears twice; {RESAVE}")
            if len(self.metadata) >= self.limits.max_metadata_members:
                raise AdapterFormatError(
                    f"{what}: more than the limit of {self.limits.max_metadata_members:,} members"
                )
            if not self.text.startswith('"', position):
                raise AdapterFormatError(f"{what}: member {quoted(key)} is not a string; {RESAVE}")
            self.metadata[key], position = read_string(self.text, position, what=what)
            more, position = read_delimiter(self.text, position, what=what)
        return position

    def _entry(self, name: str, position: int) -> int:
        entry = _ENTRY.match(self.text, position)
        if entry is None:
            raise malformed(name, "not an object of just dtype, shape and data_offsets")
        try:
            value, _ = read_value(
                entry[0], 0, what="its entry", max_depth=self.limits.max_depth - 1
            )
        except AdapterFormatError as error:
            raise AdapterFormatError(f"tensor {quoted(name)}: {error.problem}") from None
        assert isinstance(value, dict)
        if odd := value.keys() ^ _MEMBERS:
            member = min(odd)
            fault = "unknown" if member in value else "missing"
            raise malformed(name, f"member {quoted(member)} is {fault}")
        dtype = value["dtype"]
        if not isinstance(dtype, str):
            raise malformed(name, "dtype is not a string")
        shape, nbytes = self._layout(name, dtype, _integers(name, "shape", value["shape"]))
        offsets = _integers(name, "data_offsets", value["data_offsets"])
        if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
            raise malformed(
                name, f"{dtype} {list(shape)} needs {nbytes:,} bytes, not {list(offsets)}"
            )
        start, stop = offsets
        self.names.add(name)
        self.spans.append(
            TensorSpan(name, dtype, shape, self.data_start + start, self.data_start + stop)
        )
        return entry.end()

    def _layout(self, name: str, dtype: str, shape: tuple[int, ...]) -> _Layout:
        if layout := self.layouts.get((dtype, shape)):
            return layout
        if problem := _layout_problem(dtype, shape, self.limits):
            raise malformed(name, problem)
        layout = self.layouts[dtype, shape] = shape, _size(dtype, shape)
        return layout


def _integers(name: str, member: str, value: JsonValue) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise malformed(name, f"{member} is not a list of integers")
    integers: list[int] = []
    for item in value:
        # Exactly int: to isinstance, True is one too.
        if type(item) is not int or item < 0:
            raise malformed(name, f"{member} holds something else than integers from 0 up")
        integers.append(item)
    return tuple(integers)


def _layout_problem(dtype: str, shape: tuple[int, ...], limits: HeaderLimits) -> str | None:
    if dtype not in DTYPE_BITS:
        return f"unknown dtype {quoted(dtype)}"
    if len(shape) > limits.max_dimensions:
        return f"{len(shape):,} dimensions, more than the limit of {limits.max_dimensions}"
    # Of the non-zero ones: torch multiplies strides even where a dimension is 0.
    if math.prod(size for size in shape if size) > _INT64_MAX:
        return "shape is beyond int64"
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        return f"{dtype} {list(shape)} does not fill whole bytes"
    return None


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def malformed(name: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"tensor {quoted(name)}: {problem}; {RESAVE}")
