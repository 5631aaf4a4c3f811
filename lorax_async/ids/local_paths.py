"""Paths and `file:` URLs, which name local folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from lorax_async.errors import InvalidAdapterIdError
from lorax_async.ids.texts import checked, readable

_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def is_local_text(text: str) -> bool:
    """Whether a text says by itself that it names a local folder."""
    return text.startswith(("/", "./", "../")) or text[:5].lower() == "file:"


def parse_local(text: str) -> str:
    """A path from "/", "./" or "../" on. Links may lie on it, so ".." stays.

    Raises `InvalidAdapterIdError`.
    """
    path = readable(_path_of_url(text)) if text[:5].lower() == "file:" else text
    parts = [part for part in path.split("/") if part not in {"", "."}]
    inner = "/".join(parts)
    if path.startswith("/"):
        return f"/{inner}"
    if parts[:1] == [".."]:
        return inner if len(parts) > 1 else "../"
    return f"./{inner}"


def checked_path(path: Path) -> Path:
    """Of a program's own; raises `InvalidAdapterIdError` where the system has no such paths."""
    checked(os.fspath(path), os.fsencode)
    return path


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
