"""The safetensors file format, and the one validator for everything downstream.

A file is 8 bytes of little-endian header size, the header (a JSON object: tensor name → dtype,
shape, data_offsets; optionally `__metadata__`), and the tensors' bytes without holes. Source:
https://huggingface.co/docs/safetensors, version 0.8.0; stricter than its reader where that one
guesses (a name twice, unknown members, entries that are not objects, more than 8 dimensions).

The header is read entry by entry, so that a huge one never holds the GIL for long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import chain
from operator import attrgetter
from types import MappingProxyType

from lorax_async.core.header_entries import (
    DTYPE_BITS,
    RESAVE,
    WHAT,
    Entries,
    HeaderLimits,
    TensorSpan,
    malformed,
)
from lorax_async.core.strict_json import decode_text, quoted
from lorax_async.errors import AdapterFormatError

__all__ = [
    "DTYPE_BITS",
    "LENGTH_BYTES",
    "Header",
    "HeaderLimits",
    "TensorSpan",
    "header_end",
    "header_size",
    "parse_header",
]

LENGTH_BYTES = 8
_DEFAULT_LIMITS = HeaderLimits()


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: its spans tile the file from `data_start` to its end.

    `tensors` are in file order; those without bytes stand before the one that begins where they
    lie, by name among themselves.
    """

    tensors: tuple[TensorSpan, ...]
    metadata: Mapping[str, str]
    data_start: int


def header_end(start: bytes | memoryview) -> int:
    """How many bytes the header needs by its own word, which nobody has checked.

    `start` is what is there of the file; before it has the word, that is what is needed.
    """
    if len(start) < LENGTH_BYTES:
        return LENGTH_BYTES
    return LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")


def header_size(
    first_eight: bytes | memoryview, file_size: int, limits: HeaderLimits = _DEFAULT_LIMITS
) -> int:
    """How many bytes from the beginning of the file `parse_header` needs.

    `first_eight` holds at least the file's first eight bytes, or all of a shorter file.
    """
    if file_size < LENGTH_BYTES or len(first_eight) < LENGTH_BYTES:
        raise AdapterFormatError(
            f"{WHAT}: the file has {min(file_size, len(first_eight))} bytes and cannot be a"
            " safetensors file; fetch it again"
        )
    size = int.from_bytes(first_eight[:LENGTH_BYTES], "little")
    if size > limits.max_header_bytes:
        raise AdapterFormatError(
            f"{WHAT}: a header of {size:,} bytes is over the limit of"
            f" {limits.max_header_bytes:,}, or this is no safetensors file; {RESAVE}"
        )
    if LENGTH_BYTES + size > file_size:
        raise AdapterFormatError(
            f"{WHAT}: the file has {file_size:,} bytes and ends inside its header of {size:,};"
            " fetch it again"
        )
    return LENGTH_BYTES + size


def parse_header(
    prefix: bytes | memoryview, file_size: int, limits: HeaderLimits = _DEFAULT_LIMITS
) -> Header:
    """Check the header at the beginning of a file of `file_size` bytes.

    `prefix` holds at least `header_size` bytes. Whatever breaks the format raises
    `AdapterFormatError`, which names the tensor.
    """
    data_start = header_size(prefix, file_size, limits)
    if len(prefix) < data_start:
        raise AdapterFormatError(
            f"{WHAT}: only {len(prefix):,} of its {data_start:,} bytes could be read; fetch the"
            " file again"
        )
    try:
        text = decode_text(memoryview(prefix)[LENGTH_BYTES:data_start], what=WHAT)
        entries = Entries(text, limits, data_start)
        entries.read()
        tensors = _in_file_order(entries.spans, data_start, file_size)
    except MemoryError:
        raise AdapterFormatError(f"{WHAT}: too large for the memory at hand") from None
    return Header(tuple(tensors), MappingProxyType(entries.metadata), data_start)


def _in_file_order(spans: list[TensorSpan], data_start: int, file_size: int) -> list[TensorSpan]:
    """The spans in file order, if they tile the file's data."""
    position = data_start
    for span in spans:
        if span.start != position or span.stop == position:
            return _chained(spans, data_start, file_size)
        position = span.stop
    _check_complete(spans, [], position, file_size)
    return spans


def _chained(spans: list[TensorSpan], data_start: int, file_size: int) -> list[TensorSpan]:
    """Follow the spans from end to beginning: one sort of 65,536 would hold the GIL."""
    follower: dict[int, TensorSpan] = {}
    empty: dict[int, list[TensorSpan]] = {}
    for span in spans:
        if span.start == span.stop:
            empty.setdefault(span.start, []).append(span)
        elif (other := follower.setdefault(span.start, span)) is not span:
            raise malformed(span.name, f"bytes overlap those of {quoted(other.name)}")
    ordered: list[TensorSpan] = []
    position = data_start
    while True:
        if position in empty:
            ordered.extend(_by_name(empty.pop(position)))
        if (next_span := follower.pop(position, None)) is None:
            break
        ordered.append(next_span)
        position = next_span.stop
    _check_complete(ordered, [*follower.values(), *chain(*empty.values())], position, file_size)
    return ordered


def _by_name(spans: list[TensorSpan]) -> Iterator[TensorSpan]:
    key = attrgetter("name")
    runs = (sorted(spans[at : at + 4096], key=key) for at in range(0, len(spans), 4096))
    return merge(*runs, key=key)


def _check_complete(
    ordered: list[TensorSpan], rest: list[TensorSpan], position: int, file_size: int
) -> None:
    """Refuse what could not be placed, and an end that is not the file's."""
    if rest:
        stray = min(rest, key=lambda span: span.start)
        if stray.start > position:
            raise malformed(stray.name, f"a hole of {stray.start - position:,} bytes before it")
        other = next(span for span in ordered if span.start < stray.start < span.stop)
        raise malformed(stray.name, f"bytes overlap those of {quoted(other.name)}")
    if position < file_size:
        raise AdapterFormatError(
            f"{WHAT}: {file_size - position:,} bytes after the last tensor; {RESAVE}"
        )
    if position > file_size:
        last = quoted(ordered[-1].name)
        raise AdapterFormatError(
            f"tensor {last}: the file ends {position - file_size:,} bytes before it does;"
            " fetch it again"
        )
