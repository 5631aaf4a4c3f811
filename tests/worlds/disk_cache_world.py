"""A disk cache in its own folder, for tests to fill and inspect."""

import hashlib
import os
import random
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep

from leaks import open_files
from source_inputs import read

from lorax_async.cache.base import CacheEntry, CacheKey
from lorax_async.cache.disk_cache import DiskCache, DiskDownload, ls, rm
from lorax_async.cache.partials import CHUNK_BYTES, PartialFile
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.formats.spans import ByteRange
from lorax_async.lifecycle.policies import PolicyName, policy

CONFIG = b'{"peft_type": "LORA"}'
SCOPE = "somebody"
KEY = CacheKey("hub:org/name", "c0ffee")
NBYTES = 5 * CHUNK_BYTES + 1_000


class DiskWorld:
    def __init__(self, folder: Path, nbytes: int = 1 << 30, name: PolicyName = "lru") -> None:
        self.folder = folder
        self.cache = DiskCache(folder, nbytes, policy(name))

    def entry(self, key: CacheKey) -> Path:
        return self.folder / "entries" / key.name

    def alter(self, key: CacheKey, name: str, content: bytes) -> None:
        """Change bytes, but not the file's times, so that only the bytes show it."""
        path = self.entry(key) / name
        before = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextmanager
def opened(folder: Path, nbytes: int = 1 << 30, name: PolicyName = "lru") -> Iterator[DiskWorld]:
    yield DiskWorld(folder, nbytes, name)


def weights(seed: int = 1, nbytes: int = NBYTES) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def key(number: int) -> CacheKey:
    return CacheKey("hub:org/name", f"version {number}")


def sha256(content: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(content).hexdigest())


def put(file: PartialFile, content: bytes, spans: Iterable[ByteRange]) -> None:
    for start, stop in spans:
        file.write(start, memoryview(content)[start:stop])


def begin(
    cache: DiskCache, of: CacheKey, scope: str = SCOPE, patience: float = 10.0
) -> CacheEntry | DiskDownload:
    """Wait, as a fetch does, for another download while it makes progress."""
    progress, since, alone = -1, monotonic(), False
    while isinstance(found := cache.try_begin(of, scope, alone=alone), int):
        if found != progress:
            progress, since = found, monotonic()
        alone = monotonic() - since > patience
        sleep(0.02)
    return found


def begun(cache: DiskCache, of: CacheKey = KEY, scope: str = SCOPE) -> DiskDownload:
    found = begin(cache, of, scope)
    assert isinstance(found, DiskDownload), "there is an entry already"
    return found


def left(cache: DiskCache, of: CacheKey, content: bytes, spans: Iterable[ByteRange]) -> None:
    """Interrupt a download of the weights after these spans."""
    with closing(begun(cache, of)) as download:
        put(download.file(WEIGHTS_FILE, len(content)), content, spans)


def stored(cache: DiskCache, of: CacheKey, content: bytes) -> CacheEntry:
    """Download the whole adapter."""
    with closing(begun(cache, of)) as download:
        for name, each in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, content)):
            file = download.file(name, len(each))
            put(file, each, file.missing())
        return download.publish()


def keep(cache: DiskCache, of: CacheKey, content: bytes) -> None:
    stored(cache, of, content).close()


def removed(cache: DiskCache, of: CacheKey) -> bool:
    """Remove its entry and downloads; return False if any is in use."""
    names = [listed.name for listed in ls(cache) if listed.name[:64] == of.name]
    return all(rm(cache, name) for name in names)


def content_of(entry: CacheEntry, name: str = WEIGHTS_FILE) -> bytes:
    with closing(entry.reader(name)) as reader:
        return read(reader, 0, reader.nbytes)


def read_back(cache: DiskCache, of: CacheKey = KEY, *, check: bool = False) -> bytes | None:
    """Return the weights of an entry; None if there is none."""
    entry = cache.open(of, check=check)
    if entry is None:
        return None
    with closing(entry):
        return content_of(entry)


def is_there(cache: DiskCache, of: CacheKey) -> bool:
    entry = cache.open(of)
    if entry is not None:
        entry.close()
    return entry is not None


def below(folder: Path) -> set[str]:
    """Return all paths in the folder, without the cache's own folders and lock."""
    own = {"entries", "partials", "trash", "answers", "lock"}
    paths = [path for path in folder.rglob("*") if path.parent != folder or path.name not in own]
    return {str(path.relative_to(folder)) for path in paths}


def nothing_odd(folder: Path) -> None:
    """Assert that nothing is open, and all is private and whole."""
    assert open_below(folder) == []
    private_and_whole(folder)


def private_and_whole(folder: Path) -> None:
    """Assert that files are private, entries whole, and nothing is trashed or partly written."""
    for path in folder.rglob("*"):
        status = path.lstat()
        assert status.st_uid == os.geteuid()
        assert stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600), path
    for name in below(folder):
        kind, _, rest = name.partition("/")
        assert kind in {"entries", "partials", "answers"}, name
        assert kind != "answers" or len(rest) == 64, "only whole ones"
        assert kind == "partials" or not name.endswith((".chunks", "/lock")), name


def open_below(folder: Path) -> list[str]:
    found = [file.partition(" ")[2] for file in open_files()]
    return [target for target in found if target.startswith(f"{folder}/")]
