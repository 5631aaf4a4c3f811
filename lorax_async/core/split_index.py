"""`adapter_model.safetensors.index.json`: which tensor is in which of several files of weights.

The form is that of huggingface_hub and transformers: `weight_map` has the file's name for each
tensor's; `metadata` (a total size, for people) is not looked at, and there is nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType

from lorax_async.config import Limits
from lorax_async.core.cache_names import INDEX_FILE
from lorax_async.core.strict_json import (
    decode_text,
    enter_object,
    expect_end,
    quoted,
    read_delimiter,
    read_name,
    read_string,
    read_value,
    skip_whitespace,
)
from lorax_async.errors import AdapterFormatError

INDEX = INDEX_FILE.file_name

MAX_FILES = 256
"""Each is an open file while it is read, of which a process commonly may have 1,024. The largest
adapter that is accepted by default (4 GiB), in so many files, has 16 MiB in each."""

_METADATA_CHARACTERS = 65_536
_FILE = re.compile(r"adapter_model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_REMEDY = "write the index again with the tool that split the weights"


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
    """Read an index, entry by entry.

    It may have as many bytes as a header, which says more of each tensor. What is malformed, names
    a file otherwise than `split_name` does, or leaves one out raises `AdapterFormatError`.
    """
    if len(data) > limits.max_header_bytes:
        raise AdapterFormatError(
            f"{INDEX}: {len(data):,} bytes, over the limit of {limits.max_header_bytes:,}"
        )
    try:
        return _complete(_weight_map(decode_text(data, what=INDEX), limits))
    except MemoryError:
        raise AdapterFormatError(f"{INDEX}: too large for the memory at hand") from None


def _weight_map(text: str, limits: Limits) -> _WeightMap:
    found: set[str] = set()
    weight_map = _WeightMap(text, limits.max_tensors)
    more, position = enter_object(text, skip_whitespace(text, 0), what=INDEX)
    while more:
        member, position = read_name(text, position, what=INDEX)
        if member in found or member not in {"metadata", "weight_map"}:
            fault = "stands there twice" if member in found else "is unknown"
            raise AdapterFormatError(f"{INDEX}: member {quoted(member)} {fault}; {_REMEDY}")
        found.add(member)
        if member == "weight_map":
            position = weight_map.read(position)
        else:
            position = _after_metadata(text, position, limits.max_json_depth - 1)
        more, position = read_delimiter(text, position, what=INDEX)
    expect_end(text, position, what=INDEX)
    if not weight_map.numbers:
        raise AdapterFormatError(f"{INDEX}: its weight_map names no tensors; {_REMEDY}")
    return weight_map


def _after_metadata(text: str, position: int, max_depth: int) -> int:
    """Cut first: one step decodes it."""
    what = f"{INDEX}, metadata (of {_METADATA_CHARACTERS:,} characters at most)"
    piece = text[position : position + _METADATA_CHARACTERS]
    _, end = read_value(piece, 0, what=what, max_depth=max_depth)
    return position + end


def _complete(found: _WeightMap) -> SplitIndex:
    """If every file from the first to the last has a tensor."""
    tensors_in = tuple(found.tensors_in[number] for number in range(1, found.count + 1))
    if 0 in tensors_in:
        empty = split_name(1 + tensors_in.index(0), found.count)
        raise AdapterFormatError(f"{INDEX}: no tensor is in {empty}; {_REMEDY}")
    return SplitIndex(MappingProxyType(found.numbers), tensors_in)


class _WeightMap:
    """The members of `weight_map`, with the number of files that their names tell."""

    def __init__(self, text: str, max_tensors: int) -> None:
        self.numbers: dict[str, int] = {}
        self.tensors_in = Counter[int]()
        self.count = 0
        self._text = text
        self._max_tensors = max_tensors
        self._known: dict[str, int] = {}

    def read(self, position: int) -> int:
        """Beginning at `position`; where it ends."""
        what = f"{INDEX}, weight_map"
        more, position = enter_object(self._text, position, what=what)
        while more:
            name, position = read_name(self._text, position, what=what)
            if name in self.numbers:
                raise _wrong(name, "stands there twice")
            if len(self.numbers) >= self._max_tensors:
                raise _wrong(name, f"is more than the limit of {self._max_tensors:,} tensors")
            if not self._text.startswith('"', position):
                raise _wrong(name, "has no name of a file")
            file, position = read_string(self._text, position, what=what)
            self.numbers[name] = number = self._known.get(file) or self._number(name, file)
            self.tensors_in[number] += 1
            more, position = read_delimiter(self._text, position, what=what)
        return position

    def _number(self, name: str, file: str) -> int:
        found = _FILE.fullmatch(file)
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            pattern = split_name(1, 3)
            raise _wrong(name, f"is in {quoted(file)}, which is no name of the form {pattern!r}")
        if count > MAX_FILES:
            raise _wrong(name, f"is in one of {count:,} files, over the limit of {MAX_FILES}")
        if self.count not in {0, count}:
            raise _wrong(name, f"is in one of {count} files, others in one of {self.count}")
        self.count = count
        self._known[file] = number
        return number


def _wrong(tensor: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{INDEX}: tensor {quoted(tensor)} {problem}; {_REMEDY}")
