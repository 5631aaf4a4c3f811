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
from lorax_async.core.strict_json import parse_object, quoted
from lorax_async.errors import AdapterFormatError

INDEX = INDEX_FILE.file_name

MAX_FILES = 256
"""Each is an open file while it is read, of which a process commonly may have 1,024. The largest
adapter that is accepted by default (4 GiB), in so many files, has 16 MiB in each."""

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
    """Parse an index. It may have as many bytes as a header, which says more of each tensor.

    What is malformed, names a file otherwise than `split_name` does, or leaves one out raises
    `AdapterFormatError`.
    """
    members = parse_object(
        data, what=INDEX, max_bytes=limits.max_header_bytes, max_depth=limits.max_json_depth
    )
    if unknown := members.keys() - {"metadata", "weight_map"}:
        raise AdapterFormatError(f"{INDEX}: member {quoted(min(unknown))} is unknown; {_REMEDY}")
    weight_map = members.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFormatError(f"{INDEX}: its weight_map names no tensors; {_REMEDY}")
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
        raise AdapterFormatError(f"{INDEX}: no tensor is in {empty}; {_REMEDY}")
    return SplitIndex(MappingProxyType(numbers), tensors_in)


def _wrong(tensor: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{INDEX}: tensor {quoted(tensor)} {problem}; {_REMEDY}")
