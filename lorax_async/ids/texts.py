"""What every id must be, whatever it names."""

from __future__ import annotations

import re
from collections.abc import Callable

from lorax_async.errors import InvalidAdapterIdError

MAX_ID_BYTES = 4096

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOCAL = re.compile(r"/|\.\.?/|file:", re.IGNORECASE)
_URL = re.compile(r"\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://")
_USER = re.compile(r"(?:\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://)/*[^/?#]*@")
_PLACES = frozenset({"s3", "gs", "az", "http", "https"})
"""Sources whose ids are URLs, of which the beginning may be left out."""


def checked(text: str, encode: Callable[[str], bytes]) -> str:
    try:
        encoded = encode(text)
    except UnicodeEncodeError:
        raise InvalidAdapterIdError("the id is not valid Unicode text") from None
    if len(encoded) > MAX_ID_BYTES:
        raise InvalidAdapterIdError(f"the id is longer than {MAX_ID_BYTES} bytes")
    if not encoded or b"\0" in encoded:
        raise InvalidAdapterIdError("the id is empty or holds a NUL character")
    return text


def readable(text: str) -> str:
    if _CONTROL.search(text):
        raise InvalidAdapterIdError("the id holds a control character")
    return text


def refuse_secrets(text: str, source: str | None) -> None:
    """Refuse a URL with a user name, a password, a query or a fragment, without repeating it.

    An id stands in errors, events and logs; so no value that holds one may come about.
    """
    if source == "local" or (source is None and _LOCAL.match(text)):
        return
    if source in _PLACES and "://" not in text:
        text = f"{source}://{text}"
    url = _URL.search(text)
    if url is None:
        return
    if _USER.search(text):
        raise InvalidAdapterIdError(
            "a URL in an id has no user name and no password; give a token by token="
        )
    if "?" in text[url.end() :] or "#" in text[url.end() :]:
        raise InvalidAdapterIdError(
            "a URL in an id has no '?' and no '#': signatures and keys must not stand in ids"
        )
