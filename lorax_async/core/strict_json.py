"""One strict reader of strangers' JSON: the safetensors header and `adapter_config.json`.

Strict is RFC 8259 without its loopholes: one value, UTF-8 without a byte order mark, no NaN or
Infinity (nor a number that becomes one), no lone surrogate, no member twice in an object once
escapes are resolved, a bounded depth. Everything else raises :class:`AdapterFormatError`;
ValueError, RecursionError and MemoryError never leave this module.

:func:`parse_object` reads a small document in one go. A large object is walked member by member
with :func:`enter_object`, :func:`read_name`, :func:`read_string` or :func:`read_value`, and
:func:`read_delimiter`, so that no single step holds the GIL for long.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from typing import Any, NoReturn, TypeAlias

from lorax_async.errors import AdapterFormatError, shorten

JsonValue: TypeAlias = str | int | float | bool | list["JsonValue"] | dict[str, "JsonValue"] | None

MAX_DEPTH = 16
MAX_NUMBER_CHARACTERS = 100
"""Longer than any float64 or int64 is ever written; converting longer ones costs quadratic time."""

_DECODE_PIECE = 1 << 20
# Every repetition is bounded: one match holds the GIL.
_WHITESPACE = re.compile(r"[ \t\n\r]{1,65536}")
_PLAIN_STRING = re.compile(r'"([^"\\\x00-\x1f]{0,65536})"')
# Runs and escapes, the surrogates among the escapes only in pairs. Nothing follows the repetition,
# so it cannot backtrack.
_STRING_PIECE = re.compile(
    r"""(?: [^"\\\x00-\x1f]{1,256}
          | \\["\\/bfnrt]
          | \\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}
          | \\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}
        ){1,1024}""",
    re.VERBOSE,
)


class _ViolationError(ValueError):
    """Raised by the decoder's hooks, which do not know whose text they read."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _ViolationError(f"member {quoted(twice)} appears twice")
    return members


def _integer(text: str) -> int | float:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise _ViolationError(f"a number of {len(text)} characters")
    # As safetensors reads it: a sign on zero only floats have, so it is no integer.
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


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def quoted(name: str) -> str:
    """A stranger's name for an error text; cut first, for it may be as long as the document."""
    return repr(shorten(name[:201], 200))


def decode_text(data: bytes | memoryview, *, what: str) -> str:
    """The UTF-8 `data` as text; a byte order mark and invalid bytes are refused."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    view = memoryview(data)
    try:
        pieces = [
            decoder.decode(view[start : start + _DECODE_PIECE])
            for start in range(0, len(view), _DECODE_PIECE)
        ]
        text = "".join([*pieces, decoder.decode(b"", final=True)])
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 ({error.reason})"
    except MemoryError:
        problem = "too large for the memory at hand"
    else:
        if not text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
            return text
        problem = "begins with a byte order mark"
    raise _malformed(what, problem)


def parse_object(
    data: bytes, *, what: str, max_bytes: int, max_depth: int = MAX_DEPTH
) -> dict[str, JsonValue]:
    """The one JSON object that `data` holds, white space around it allowed.

    `what` names the document in errors. For documents of at most some 100 KiB: the whole is
    decoded in one step. The outermost object counts as depth 1.
    """
    if len(data) > max_bytes:
        raise _malformed(what, f"{len(data):,} bytes, more than the limit of {max_bytes:,}")
    text = decode_text(data, what=what)
    value, end = read_value(text, skip_whitespace(text, 0), what=what, max_depth=max_depth)
    expect_end(text, end, what=what)
    if not isinstance(value, dict):
        raise _malformed(what, "not a JSON object")
    return value


def read_value(
    text: str, position: int, *, what: str, max_depth: int = MAX_DEPTH
) -> tuple[JsonValue, int]:
    """The value that begins at `position`, and where it ends. Decoded in one step."""
    value: JsonValue
    try:
        value, end = _DECODER.raw_decode(text, position)
        # Brackets bound the depth and only escapes make surrogates: ordinary values skip the walk.
        brackets = text.count("{", position, end) + text.count("[", position, end)
        if brackets > max_depth or text.find("\\", position, end) >= 0:
            _check(value, max_depth)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos:,}"
    except _ViolationError as error:
        problem = str(error)
    except RecursionError:
        problem = f"nests deeper than {max_depth}"
    except MemoryError:
        problem = "too large for the memory at hand"
    else:
        return value, end
    # Outside the handlers: a chained JSONDecodeError would keep the whole text alive.
    raise _malformed(what, problem)


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


def enter_object(text: str, position: int, *, what: str) -> tuple[bool, int]:
    """Step over the `{` at `position`: whether members follow, and where (else: after the `}`)."""
    if not text.startswith("{", position):
        raise _malformed(what, f"expected an object at character {position:,}")
    position = skip_whitespace(text, position + 1)
    empty = text.startswith("}", position)
    return not empty, position + empty


def read_name(text: str, position: int, *, what: str) -> tuple[str, int]:
    """The name of the member at `position`, and where its value begins."""
    name, end = read_string(text, skip_whitespace(text, position), what=what)
    colon = skip_whitespace(text, end)
    if not text.startswith(":", colon):
        raise _malformed(what, f"expected ':' at character {colon:,}")
    return name, skip_whitespace(text, colon + 1)


def read_string(text: str, position: int, *, what: str) -> tuple[str, int]:
    """The string that begins at `position`, and where it ends."""
    if plain := _PLAIN_STRING.match(text, position):
        return plain[1], plain.end()
    if not text.startswith('"', position):
        raise _malformed(what, f"expected a string at character {position:,}")
    pieces = []
    position += 1
    while piece := _STRING_PIECE.match(text, position):
        string, _ = read_value(f'"{piece[0]}"', 0, what=what)
        pieces.append(str(string))
        position = piece.end()
    if not text.startswith('"', position):
        raise _malformed(
            what,
            "a string with a lone surrogate, a bad escape, a control character or no end"
            f" at character {position:,}",
        )
    return "".join(pieces), position + 1


def read_delimiter(text: str, position: int, *, what: str) -> tuple[bool, int]:
    """Step over the `,` or `}` after a value: whether another member follows, and where."""
    position = skip_whitespace(text, position)
    delimiter = text[position : position + 1]
    if delimiter not in {",", "}"}:
        raise _malformed(what, f"expected ',' or '}}' at character {position:,}")
    return delimiter == ",", position + 1


def expect_end(text: str, position: int, *, what: str) -> None:
    """Nothing but white space may follow."""
    position = skip_whitespace(text, position)
    if position != len(text):
        raise _malformed(what, f"more than one value: text goes on at character {position:,}")


def skip_whitespace(text: str, position: int) -> int:
    """The position of the next character that is not JSON white space."""
    while match := _WHITESPACE.match(text, position):
        position = match.end()
    return position


def _malformed(what: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"{what}: {problem}; write it again as standard JSON")
