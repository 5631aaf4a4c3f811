"""What sources answered last, for when they cannot be asked. Blocks."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress

from lorax_async.core.cache_names import CacheKey
from lorax_async.core.strict_json import parse_object
from lorax_async.errors import AdapterFormatError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.place import unique

_MOST = 64 << 10
_WHAT = "an answer of a source"


def note(folder: Folder, question: str, source: str, version: str) -> None:
    """Whoever is killed meanwhile leaves the answer before."""
    content = json.dumps({"source": source, "version": version}).encode()
    new = f"{unique()}.new"
    with translated_errors("note a version"):
        try:
            folder.write(new, content)
            os.rename(new, _name(question), src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        except BaseException:
            folder.unlink(new)
            raise


def recall(folder: Folder, question: str) -> tuple[str, str] | None:
    """Source and version; None if nobody noted it."""
    with translated_errors("look for a version"):
        key = _read(folder, _name(question))
    return None if key is None else (key.source, key.version)


def forget_others(folder: Folder, entries: set[str]) -> None:
    """Remove the answers that name none of these entries, for nobody could be served by them."""
    for name in folder.names():
        key = _read(folder, name)
        if key is None or key.name not in entries:
            folder.unlink(name)


def _read(folder: Folder, name: str) -> CacheKey | None:
    with suppress(FileNotFoundError):
        content = folder.read(name, _MOST)
        with suppress(AdapterFormatError):
            fields = parse_object(content, what=_WHAT, max_bytes=_MOST)
            source, version = fields.get("source"), fields.get("version")
            if isinstance(source, str) and isinstance(version, str):
                return CacheKey(source, version)
    return None


def _name(question: str) -> str:
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()
