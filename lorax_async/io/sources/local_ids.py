"""Which ids name a local folder, and which places they mean; touches no file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from lorax_async.adapter import AdapterRef
from lorax_async.errors import ConfigError, InvalidAdapterIdError

MAX_ID_BYTES = 4096

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_RELATIVE = ("./", "../")


class Place(NamedTuple):
    """Where to look, in this order. `trusted` paths may be anywhere and lead anywhere."""

    paths: tuple[str, ...]
    trusted: bool


def parse_place(ref: AdapterRef, roots: Sequence[str]) -> Place:
    """The places that `ref` means; a relative `str` is looked for in each of the roots.

    Raises `InvalidAdapterIdError` for a text that is no id, and `ConfigError` for sources that are
    not available and for a revision, which a local folder does not have.
    """
    if isinstance(ref.id, Path):
        place = Place((_checked(os.fspath(ref.id), os.fsencode),), trusted=True)
    else:
        place = _untrusted(ref.id, ref.source, roots)
    if ref.source not in {None, "local"}:
        raise _unavailable(f"source {ref.source!r}")
    if ref.revision is not None:
        raise ConfigError("a local folder has no revisions; leave the revision out")
    return place


def _untrusted(id: object, source: str | None, roots: Sequence[str]) -> Place:
    if not isinstance(id, str):
        raise InvalidAdapterIdError(f"an id is a str or a pathlib.Path, not {type(id).__name__}")
    text = _readable(_checked(id, str.encode))
    if text[:5].lower() == "file:":
        text = _readable(_path_of_url(text))
    elif _SCHEME.match(text) or not (source == "local" or text.startswith(("/", *_RELATIVE))):
        raise _unavailable("the source of this id")
    if text.startswith("/"):
        return Place((text,), trusted=False)
    return Place(tuple(os.path.join(root, text) for root in roots), trusted=False)


def _checked(text: str, encode: Callable[[str], bytes]) -> str:
    try:
        encoded = encode(text)
    except UnicodeEncodeError:
        raise InvalidAdapterIdError("the id is not valid Unicode text") from None
    if len(encoded) > MAX_ID_BYTES:
        raise InvalidAdapterIdError(f"the id is longer than {MAX_ID_BYTES} bytes")
    if not encoded or b"\0" in encoded:
        raise InvalidAdapterIdError("the id is empty or holds a NUL character")
    return text


def _readable(text: str) -> str:
    if _CONTROL.search(text):
        raise InvalidAdapterIdError("the id holds a control character")
    return text


def _path_of_url(url: str) -> str:
    """The path of file:/path, file:///path or file://localhost/path (RFC 8089)."""
    path = url[5:]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in {"", "localhost"}:
            raise InvalidAdapterIdError("a file: URL names no other host; use file:///path")
        path = slash + path
    if not path.startswith("/") or "?" in path or "#" in path or _BARE_PERCENT.search(path):
        raise InvalidAdapterIdError(
            "a file: URL is file:///path, with '?', '#' and '%' in it written as %3F, %23 and %25"
        )
    try:
        return unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise InvalidAdapterIdError("the file: URL does not decode to UTF-8") from None


def _unavailable(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is not available in this version; name a local folder: a pathlib.Path, or a path"
        " inside LoaderConfig.local_roots"
    )
