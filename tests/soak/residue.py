"""What must not be there when a loader, its engine and its cache have ended."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from lorax_async.core.cache_names import partial_name
from lorax_async.core.policies import policy
from lorax_async.io.cache import upkeep
from lorax_async.io.disk_cache import DiskCache
from soak.setting import Setting
from soak.tally import SoakError


def require_nothing_left(setting: Setting) -> None:
    """On the loop, at the end."""
    tasks = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    threads = [each.name for each in threading.enumerate() if each.name.startswith("lorax")]
    ring = setting.loader._machinery.driver._copies._transfer._staging
    for what, left in (
        ("tasks", [task.get_name() for task in tasks]),
        ("threads", threads),
        ("staging buffers", list(range(ring.buffers - ring.free))),
        ("locks", _names(setting.folder / "locks")),
        ("trash", _names(setting.folder / "trash")),
        ("answers half written", [n for n in _names(setting.folder / "answers") if "." in n]),
        ("partials in use", [n for n in _names(setting.folder / "partials") if _is_used(n)]),
    ):
        if left:
            raise SoakError(f"{what} are left: {left}")


def require_right_on_disk(setting: Setting) -> int:
    """Every entry is within its budget, whole, and the source's; how many there are. Blocks."""
    cache = DiskCache(setting.folder, setting.cache_bytes, policy("lru"))
    try:
        if cache.used() > setting.cache_bytes:
            raise SoakError(f"{cache.used():,} bytes are left of {setting.cache_bytes:,}")
        entries = list(upkeep.verify(cache))
    finally:
        cache.close()
    for entry in entries:
        if entry.problem is not None or entry.record is None:
            raise SoakError(f"an entry of the cache is damaged: {entry}")
        stored = setting.stored(entry.record.source)
        found = [file.digest.value for file in sorted(entry.record.files, key=lambda f: f.role)]
        if found != list(stored.digests):
            raise SoakError(f"the cache has other bytes of {stored.name} than its source")
    return len(entries)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_used(name: str) -> bool:
    found = partial_name(name)
    return found is None or found.owner is not None
