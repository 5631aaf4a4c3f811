"""What the disk cache's tests put in, and look at."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path

from source_inputs import read

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span
from lorax_async.io.cache.ports import Cache, CacheDownload, CacheEntry, CacheFile
from lorax_async.io.ports import Demand

CONFIG = b'{"peft_type": "LORA"}'
SCOPE = "somebody"
KEY = CacheKey("hub:org/name", "c0ffee")
OWN = {"entries", "partials", "locks", "trash", "answers"}
NBYTES = 5 * CHUNK_BYTES + 1_000


def weights(seed: int = 1, nbytes: int = NBYTES) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def key(number: int) -> CacheKey:
    return CacheKey("hub:org/name", f"version {number}")


def sha256(content: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(content).hexdigest())


def put(file: CacheFile, content: bytes, spans: Iterable[Span]) -> None:
    for start, stop in spans:
        file.write([memoryview(content)[start:stop]], start)


def begun(cache: Cache, of: CacheKey = KEY, scope: str = SCOPE) -> CacheDownload:
    found = cache.begin(of, scope, Demand())
    assert not hasattr(found, "record"), "there is an entry already"
    return found


def stored(cache: Cache, of: CacheKey, content: bytes, config: bytes = CONFIG) -> CacheEntry:
    """Download it as a whole."""
    download = begun(cache, of)
    try:
        for role, each in ((CONFIG_FILE, config), (WEIGHTS_FILE, content)):
            file = download.file(role, len(each))
            put(file, each, file.missing())
        return download.publish()
    finally:
        download.close()


def keep(cache: Cache, of: CacheKey, content: bytes) -> None:
    stored(cache, of, content).close()


def content_of(entry: CacheEntry, role: FileRole = WEIGHTS_FILE) -> bytes:
    reader = entry.reader(role)
    try:
        return read(reader, 0, reader.nbytes)
    finally:
        reader.close()


def is_there(cache: Cache, of: CacheKey) -> bool:
    entry = cache.open(of)
    if entry is not None:
        entry.close()
    return entry is not None


def below(folder: Path) -> set[str]:
    """Files and folders in there, as paths from it, but for the cache's own five."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.parent != folder
        or path.name not in {"entries", "partials", "locks", "trash", "answers"}
    }
