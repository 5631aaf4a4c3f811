"""Looking after a disk cache: what it holds, whether that is right, and making it smaller.

For people and their command line. All of it blocks, and may run beside loaders that use the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from lorax_async.core.cache_names import is_entry_name, is_partial_name
from lorax_async.core.cache_record import Record
from lorax_async.core.disk_budget import Stored
from lorax_async.errors import IntegrityError
from lorax_async.io.cache.answers import forget_others
from lorax_async.io.cache.download import Shelves
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.sizes import Sizes
from lorax_async.io.disk_cache import DiskCache


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry, or a partial download (which has no record), as it is now.

    `nbytes` are those of the adapter's files, `age` the seconds since it was used last (a partial:
    begun); `record` is None also for an entry that cannot be read, which nobody will be given.
    """

    name: str
    nbytes: int
    age: float
    record: Record | None
    is_partial: bool
    in_use: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """An entry that was hashed again; with a `problem` it has been removed."""

    name: str
    record: Record | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Freed:
    """What was removed. Bytes are those of adapters' files."""

    entries: int
    partials: int
    nbytes: int


def ls(cache: DiskCache) -> list[Listed]:
    """All that is in the cache, the most recently used first."""
    shelves = cache.shelves
    now_ns = time.time_ns()
    with translated_errors("look at its folder"):
        entries = Sizes(shelves.place.entries, is_entry_name).look()
        partials = Sizes(shelves.place.partials, is_partial_name).look()
        found = [
            (stored.used_ns, _listed(shelves, name, stored, now_ns))
            for name, stored in (entries | partials).items()
        ]
    return [listed for _, listed in sorted(found, key=lambda item: -item[0])]


def verify(cache: DiskCache) -> Iterator[Verified]:
    """Hash every entry again, one at a time; what is damaged is removed."""
    entries = cache.shelves.entries
    with translated_errors("look at its folder"):
        names = sorted(filter(is_entry_name, entries.folder.names()))
    for name in names:
        with translated_errors("verify an entry"):
            record = entries.record(name)
            try:
                entry = entries.require(name, check=True)
            except IntegrityError as error:
                yield Verified(name, record, error.problem)
                continue
        if entry is not None:  # else another process has removed it
            entry.close()
            yield Verified(name, entry.record, None)


def rm(cache: DiskCache, name: str) -> bool:
    """Remove the entry or partial of that name, as `ls` gives it; False if it is in use or gone."""
    shelves = cache.shelves
    with translated_errors("remove an entry"):
        if is_entry_name(name):
            return shelves.entries.drop(name)
        return shelves.partials.drop(name)


def gc(cache: DiskCache, *, older_than: float = 0.0) -> Freed:
    """Remove what nobody will be served, and then what is over the budget.

    Nobody is served from partials that nobody writes to (if they were begun at least `older_than`
    seconds ago), from entries that cannot be read, and from leftovers of killed processes.
    """
    shelves = cache.shelves
    before = {listed.name: listed for listed in ls(cache)}
    with translated_errors("clean up"):
        for listed in before.values():
            if not listed.is_partial and listed.record is None:
                shelves.entries.condemn(listed.name)
            elif listed.is_partial and listed.age >= older_than:
                shelves.partials.drop(listed.name)
        shelves.room.trim()
        shelves.place.tidy()
        left = set(shelves.place.entries.names())
        forget_others(shelves.place.answers, left)
        after = left | set(shelves.place.partials.names())
    gone = [listed for name, listed in before.items() if name not in after]
    partials = sum(listed.is_partial for listed in gone)
    return Freed(len(gone) - partials, partials, sum(listed.nbytes for listed in gone))


def _listed(shelves: Shelves, name: str, stored: Stored, now_ns: int) -> Listed:
    age = max(0, now_ns - stored.used_ns) / 1e9
    if not is_entry_name(name):
        in_use = shelves.partials.is_written(name)
        return Listed(name, stored.nbytes, age, None, is_partial=True, in_use=in_use)
    record = shelves.entries.record(name)
    in_use = shelves.entries.in_use(name)
    return Listed(name, stored.nbytes, age, record, is_partial=False, in_use=in_use)
