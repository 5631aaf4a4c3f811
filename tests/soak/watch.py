"""Looks at a loader from outside: budgets, leases, what is open each second, and what is left."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from common import open_sockets
from lorax_async.core.policies import policy
from lorax_async.io.cache import maintenance
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.staging import StagingRing
from soak.callers import AT_ONCE, Callers
from soak.judging import Judge, SoakError, Tally
from soak.setting import CONNECTIONS, DEVICE_BYTES, HOST_BYTES, PINNED_BYTES, SLOTS, Setting

MOST = {
    "sockets": 2 * CONNECTIONS + 8,
    "threads": CONNECTIONS + 24,
    "descriptors": 6 * AT_ONCE,
    "tasks": 4 * AT_ONCE,
}
"""More than there were before; 16 connections are in use, and as many idle."""

RSS_SAMPLES = 60
"""In less time nothing can be said about growth."""
RSS_MARGIN = 48 << 20


@dataclass(frozen=True)
class Opened:
    """What the process has now."""

    sockets: int
    threads: int
    descriptors: int

    @classmethod
    def now(cls) -> Opened:
        descriptors = len(os.listdir("/proc/self/fd"))
        return cls(open_sockets(), threading.active_count(), descriptors)


class Watch:
    """`before` is what the process had before the loader; `threads` of the soak itself come on top."""

    def __init__(
        self, setting: Setting, callers: Callers, judge: Judge, tally: Tally, before: Opened
    ) -> None:
        self._setting = setting
        self._callers = callers
        self._judge = judge
        self._tally = tally
        self._before = before

    async def each_second(self, until: float) -> None:
        while monotonic() < until:
            await self.look()
            await asyncio.sleep(1)

    async def look(self) -> None:
        self._require_room()
        self._require_leased()
        self._require_few_open()
        self._tally.rss.append(_rss())
        await asyncio.to_thread(self._require_room_on_disk)

    def require_flat(self) -> None:
        """The process took in the second half what it took in the first, warmed up."""
        samples = self._tally.rss[len(self._tally.rss) // 4 :]
        if len(samples) < RSS_SAMPLES:
            return
        half = len(samples) // 2
        first, second = max(samples[:half]), max(samples[half:])
        if second > first + RSS_MARGIN:
            raise SoakError(f"the process grew from {first:,} to {second:,} bytes")

    def _require_room(self) -> None:
        residency = self._setting.loader.residency().values()
        slots = [where.slot.index for where in residency if where.slot is not None]
        self._require(len(slots) == len(set(slots)) <= SLOTS, f"slots {slots}")
        for what, most, taken in (
            ("device", DEVICE_BYTES, sum(where.device_bytes for where in residency)),
            ("host", HOST_BYTES, sum(where.host_bytes for where in residency)),
            ("pinned", PINNED_BYTES, sum(where.pinned_bytes for where in residency)),
        ):
            self._tally.peak(f"{what} bytes", taken)
            self._require(taken <= most, f"{taken:,} {what} bytes of {most:,}")

    def _require_leased(self) -> None:
        """Whoever holds a handle has his slot, but for what the loader told to be broken."""
        residency = self._setting.loader.residency()
        self._tally.peak("handles", len(self._callers.held))
        for handle in self._callers.held:
            where = residency.get(handle.key)
            there = where is not None and where.slot == handle.slot and not handle.released
            broken = (handle.key, handle.slot) in self._judge.broken
            if not there and not broken:
                story = self._setting.loader.story(handle.key)
                raise SoakError(f"{handle.id} is leased, and gone: {where}", story)

    def _require_few_open(self) -> None:
        now = Opened.now()
        for what, count in (
            ("sockets", now.sockets - self._before.sockets),
            ("threads", now.threads - self._before.threads),
            ("descriptors", now.descriptors - self._before.descriptors),
            ("tasks", len(asyncio.all_tasks())),
        ):
            self._tally.peak(what, count)
            self._require(count <= MOST[what], f"{count} {what} more than before")

    def _require_room_on_disk(self) -> None:
        used, budget = self._setting.cache.used(), self._setting.cache_bytes
        self._tally.peak("bytes on disk", used)
        self._require(used <= budget, f"the cache has {used:,} bytes of {budget:,}")

    def _require(self, right: object, problem: str) -> None:
        if not right:
            raise SoakError(problem)


def _rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


# -- at the end -----------------------------------------------------------------------------------


def require_nothing_left(setting: Setting) -> None:
    """On the loop, at the end."""
    tasks = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    threads = [each.name for each in threading.enumerate() if each.name.startswith("lorax")]
    rings = [each for each in gc.get_objects() if isinstance(each, StagingRing)]
    for what, left in (
        ("tasks", [task.get_name() for task in tasks]),
        ("threads", threads),
        ("staging buffers", [ring for ring in rings if ring.free < ring.buffers]),
        ("trash", _names(setting.folder / "trash")),
        ("answers half written", [n for n in _names(setting.folder / "answers") if "." in n]),
    ):
        if left:
            raise SoakError(f"{what} are left: {left}")


def require_right_on_disk(setting: Setting) -> int:
    """Every entry is within its budget, whole, and the source's; how many there are. Blocks."""
    cache = DiskCache(setting.folder, setting.cache_bytes, policy("lru"))
    try:
        if cache.used() > setting.cache_bytes:
            raise SoakError(f"{cache.used():,} bytes are left of {setting.cache_bytes:,}")
        in_use = [each.name for each in maintenance.ls(cache) if each.in_use]
        if in_use:
            raise SoakError(f"entries or downloads are in use still: {in_use}")
        entries = list(maintenance.verify(cache))
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
