"""The header of a safetensors file that is put together in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from lorax_async.core.header import DTYPE_BITS, LENGTH_BYTES

ALIGNMENT = 64
"""The tensors begin on a multiple of it: most then lie in the file as on a device."""


class Described(NamedTuple):
    """One tensor of a file to be: `dtype` in the format's spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_header(
    tensors: Iterable[Described], *, least: int = 0
) -> tuple[bytes, list[tuple[int, int]]]:
    """All of the file before its tensors; and where each of them lies in it, [start, stop).

    They lie in the order in which they are given, without gaps, from byte `least` on or later.
    """
    # One by one: to write thousands in one call would hold the GIL for as long as that takes.
    entries: list[str] = []
    lengths: list[int] = []
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        shape = ",".join(map(str, tensor.shape))
        entries.append(
            f'{json.dumps(tensor.name)}:{{"dtype":"{tensor.dtype}","shape":[{shape}],'
            f'"data_offsets":[{start},{end}]}}'
        )
        lengths.append(end - start)
    text = f"{{{','.join(entries)}}}".encode()
    end = max(least, LENGTH_BYTES + len(text))
    text = text.ljust(end + -end % ALIGNMENT - LENGTH_BYTES)
    prefix = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return prefix, _places(len(prefix), lengths)


def _places(first: int, lengths: Iterable[int]) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    for length in lengths:
        places.append((first, first + length))
        first += length
    return places
