"""Parse untrusted JSON strictly: the safetensors header, `adapter_config.json`.

The grammar is the standard library's, with hooks for what it leaves open. Accept one object in
UTF-8 without a byte order mark, without NaN, Infinity or a number that overflows to one, without
lone surrogates or duplicate members, and of bounded depth. Anything else raises
`AdapterFormatError`; ValueError, RecursionError and MemoryError never leave this module.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from typing import Any, NoReturn, TypeAlias

from lorax_async.errors import AdapterFormatError, shorten

JsonValue: TypeAlias = str | int | float | bool | list["JsonValue"] | dict[str, "JsonValue"] | None

MAX_DEPTH = 16
MAX_NUMBER_CHARACTERS = 100
"""No float64 or int64 needs more. Converting long numbers takes quadratic time."""


class _ViolationError(ValueError):
    """An error of a decoder hook, which does not know the document's name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A hook per object lets other threads run while a long document is parsed.
    members = dict(pairs)
    if len(members) != len(pairs):
        duplicate, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _ViolationError(f"member {quoted(duplicate)} appears twice")
    return members


def _integer(text: str) -> int | float:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise _ViolationError(f"a number of {len(text)} characters")
    # As in safetensors: only a float has a signed zero.
    return -0.0 if text == "-0" else int(text)


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise _ViolationError(f"a number of {len(text)} characters")
    number = float(text)
    if math.isinf(number):
        raise _ViolationError(f"the number {text} is beyond float64")
    return number


def _constant(text: str) -> NoReturn:
    raise _ViolationError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
_CAREFUL_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
"""Four times slower on a header, because each integer is a call."""


def quoted(name: str) -> str:
    """Quote an untrusted name for an error text. Truncate it first, as it may be very long."""
    return repr(shorten(name[:201], 200))


_LFS_POINTER = b"version https://git-lfs.github.com/"
LFS_REMEDY = "run `git lfs pull` in its repository, or download the adapter with `hf download`"


def is_lfs_pointer(data: bytes | memoryview) -> bool:
    """Return whether a file that begins with `data` is what Git LFS puts in a large file's place.

    At least eight bytes.
    """
    return len(data) > 0 and bytes(data[: len(_LFS_POINTER)]) == _LFS_POINTER[: len(data)]


def parse_object(
    data: bytes | memoryview, *, what: str, max_bytes: int, max_depth: int | None = MAX_DEPTH
) -> dict[str, JsonValue]:
    """Parse a JSON object; white space around it is allowed.

    `what` names the document in errors. The outermost object counts as depth 1; `max_depth=None`
    suits a caller that checks the type of every value.
    """
    if len(data) > max_bytes:
        raise _malformed_error(what, f"{len(data):,} bytes, more than the limit of {max_bytes:,}")
    if is_lfs_pointer(data):
        raise AdapterFormatError(f"{what}: it is a Git LFS pointer, not the file; {LFS_REMEDY}")
    try:
        return _decode(data, max_depth)
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos:,}"
    except _ViolationError as error:
        problem = str(error)
    except ValueError:
        problem = f"a number of more than {sys.get_int_max_str_digits():,} digits"
    except RecursionError:
        problem = f"nests deeper than {max_depth or MAX_DEPTH}"
    except MemoryError:
        problem = "too large for the memory at hand"
    # Outside the handlers: a chained JSONDecodeError would keep the whole text alive.
    raise _malformed_error(what, problem)


def _decode(data: bytes | memoryview, max_depth: int | None) -> dict[str, JsonValue]:
    text = str(data, "utf-8")
    if text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
        raise _ViolationError("begins with a byte order mark")
    # The slow decoder is needed for -0, and if the program has lifted Python's digit limit.
    careful = "-0" in text or not sys.get_int_max_str_digits()
    value = (_CAREFUL_DECODER if careful else _DECODER).decode(text)
    if not isinstance(value, dict):
        raise _ViolationError("not a JSON object")
    # Few documents need a walk: brackets bound the depth, and only escapes make surrogates.
    if "\\" in text or (max_depth and text.count("{") + text.count("[") > max_depth):
        _check(value, max_depth or sys.getrecursionlimit())
    return value


def _check(value: JsonValue, levels: int) -> None:
    if isinstance(value, str):
        _check_surrogates(value)
    elif isinstance(value, dict | list):
        if not levels:
            raise RecursionError
        for child in value if isinstance(value, list) else value.values():
            _check(child, levels - 1)
        for name in value if isinstance(value, dict) else ():
            _check_surrogates(name)


def _check_surrogates(string: str) -> None:
    try:
        string.encode()
    except UnicodeEncodeError:
        raise _ViolationError("a string holds a lone surrogate") from None


def _malformed_error(what: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{what}: {problem}; write it again as standard JSON")
