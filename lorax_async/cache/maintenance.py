"""Maintenance of a disk cache: listing, verifying and shrinking it. Blocks.

For operators and the command line; loaders may use the cache meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from lorax_async.cache.budget import Sizes
from lorax_async.cache.directory import translated_errors
from lorax_async.cache.disk_cache import DiskCache, read_answer
from lorax_async.cache.records import EntryRecord, is_entry_name, is_partial_name
from lorax_async.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry or a partial download.

    `nbytes` counts the adapter's files; `age` is the seconds since it was used last (a partial:
    begun). `record` is None for a partial, and for a damaged entry, which is never served.
    """

    name: str
    nbytes: int
    age: float
    record: EntryRecord | None
    is_partial: bool
    in_use: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """An entry that was hashed again; with a `problem` it has been removed."""

    name: str
    record: EntryRecord | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Freed:
    """What was removed. `nbytes` counts adapters' files."""

    entries: int
    partials: int
    nbytes: int


def ls(cache: DiskCache) -> list[Listed]:
    """List entries and partials, the most recently used first."""
    directory, now_ns = cache.directory, time.time_ns()
    with translated_errors("look at its folder"), directory.locked():
        entries = Sizes(directory.entries, is_entry_name).look()
        partials = Sizes(directory.partials, is_partial_name).look()
        items = []
        for name, stored in sorted((entries | partials).items(), key=lambda item: -item[1].used_ns):
            is_partial = name in partials
            in_use = cache.partials.is_busy if is_partial else cache.entries.is_leased
            record = None if is_partial else cache.entries.record(name)
            age = max(0, now_ns - stored.used_ns) / 1e9
            items.append(Listed(name, stored.nbytes, age, record, is_partial, in_use(name)))
    return items


def verify(cache: DiskCache) -> Iterator[Verified]:
    """Hash every entry again, one at a time; remove what is damaged."""
    with translated_errors("look at its folder"):
        names = sorted(filter(is_entry_name, cache.directory.entries.names()))
    for name in names:
        with translated_errors("verify an entry"):
            record = cache.entries.record(name)
            try:
                entry = cache.entries.require(name, check=True)
            except IntegrityError as error:
                yield Verified(name, record, error.problem)
                continue
        if entry is not None:  # else another process has removed it
            entry.close()
            yield Verified(name, entry.record, None)


def rm(cache: DiskCache, name: str) -> bool:
    """Remove the entry or partial of that name; False if it is in use or gone."""
    with translated_errors("remove an entry"), cache.directory.locked():
        return (cache.entries if is_entry_name(name) else cache.partials).drop(name)


def gc(cache: DiskCache, *, older_than: float = 0.0) -> Freed:
    """Remove unusable files, then evict down to the budget.

    Unusable are partial downloads (begun at least `older_than` seconds ago), damaged entries,
    answers about neither, leftovers of killed processes, and a former version's folder of locks.
    """
    directory = cache.directory
    before = ls(cache)
    with translated_errors("clean up"):
        for listed in before:
            if not listed.is_partial and listed.record is None:
                cache.entries.condemn(listed.name)
            elif listed.is_partial and listed.age >= older_than:
                rm(cache, listed.name)
        cache.budget.trim()
        directory.remove_former()
        left = set(directory.entries.names())
        for name in directory.answers.names():
            key = read_answer(directory.answers, name)
            if key is None or key.name not in left:
                directory.answers.unlink(name)
        left |= set(directory.partials.names())
    gone = [listed for listed in before if listed.name not in left]
    partials = sum(listed.is_partial for listed in gone)
    return Freed(len(gone) - partials, partials, sum(listed.nbytes for listed in gone))
