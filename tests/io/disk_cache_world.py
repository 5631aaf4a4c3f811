"""A disk cache in a folder of its own; afterwards nothing of it may be open or half done."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_inputs import below

from lorax_async.core.cache_names import CacheKey, FileRole
from lorax_async.core.policies import PolicyName, policy
from lorax_async.io.disk_cache import DiskCache


class DiskWorld:
    def __init__(self, folder: Path, nbytes: int = 1 << 30, name: PolicyName = "lru") -> None:
        self.folder = folder
        self.cache = DiskCache(folder, nbytes, policy(name))

    def entry(self, key: CacheKey) -> Path:
        return self.folder / "entries" / key.name

    def alter(self, key: CacheKey, role: FileRole, content: bytes) -> None:
        """The file's times are as before, so that only its bytes tell."""
        path = self.entry(key) / role.file_name
        before = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextmanager
def opened(folder: Path, nbytes: int = 1 << 30, name: PolicyName = "lru") -> Iterator[DiskWorld]:
    world = DiskWorld(folder, nbytes, name)
    try:
        yield world
    finally:
        world.cache.close()


def nothing_odd(folder: Path) -> None:
    """All is private, entries are whole, nothing is locked, in the trash, or being written to."""
    assert open_below(folder) == []
    for path in folder.rglob("*"):
        status = path.lstat()
        assert status.st_uid == os.geteuid()
        assert stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600), path
    for name in below(folder):
        kind, _, rest = name.partition("/")
        assert kind in {"entries", "partials", "answers"}, name
        assert kind != "partials" or ".free." in rest.split("/")[0], name
        assert kind != "answers" or len(rest) == 64, "only whole ones"
        assert kind == "partials" or not name.endswith(".chunks"), name


def open_below(folder: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(target)
    return found
