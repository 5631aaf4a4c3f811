"""Adapters that lie elsewhere: resolved by locators, fetched by ranges, kept in a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from lorax_async.adapter import AdapterKey, AdapterRef, RemoteKey
from lorax_async.config import Checking, Limits
from lorax_async.core import runs
from lorax_async.core.cache_record import Record
from lorax_async.errors import IntegrityError, InternalError
from lorax_async.io.cache.ports import CacheEntry
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader, StoredFolder
from lorax_async.io.remote.beginning import Beginning
from lorax_async.io.remote.cached import (
    EntryReader,
    FetchReader,
    ReopenedReader,
    gone,
    held,
    sha256_of_entry,
    stored_folder,
    verification_of,
)
from lorax_async.io.remote.jobs import nobody_waits
from lorax_async.io.remote.known import MAX_KEYS
from lorax_async.io.remote.opening import Opening, cache_key, close
from lorax_async.io.remote.resolving import Resolving
from lorax_async.io.remote.workers import Workers
from lorax_async.io.sources.local_hold import LocalHold, ReadAhead
from lorax_async.verification import UNCHECKED, Verification


class RemoteSource:
    """A `Source` of what locators find, whose keys are `RemoteKey`s.

    Parameters
    ----------
    resolving, opening
        Which version an id names; how it is opened.
    limits
        What of a stranger's adapter is accepted.
    verify
        What digests are for: see `LoaderConfig.verify`.
    """

    def __init__(
        self,
        resolving: Resolving,
        opening: Opening,
        workers: Workers,
        *,
        limits: Limits,
        verify: Checking,
    ) -> None:
        self._resolving = resolving
        self._opening = opening
        self._workers = workers
        self._limits = limits
        self._verify: Checking = verify
        self._records: OrderedDict[RemoteKey, Record] = OrderedDict()
        """What was opened last by each key: its plan goes with these bytes, and no others."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._resolving.resolve(ref)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        remote = _remote(key)
        file = await self._opening.open(remote, demand)
        if isinstance(file.reader, EntryReader):
            self._remember(remote, file.reader.entry.record)
        else:
            self._records.pop(remote, None)
        return file

    async def beginning(self, key: AdapterKey, demand: Demand) -> Beginning:
        """Config and headers of an adapter that was resolved, for who wants no more of it."""
        return await self._opening.beginning(_remote(key), demand)

    def reopen(self, key: AdapterKey) -> Reader:
        return ReopenedReader(partial(self._reader, _remote(key)))

    def _remember(self, key: RemoteKey, record: Record) -> None:
        self._records[key] = record
        self._records.move_to_end(key)
        if len(self._records) > MAX_KEYS:
            self._records.popitem(last=False)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[runs.Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        reader = file.reader
        if isinstance(reader, FetchReader):
            entry = await reader.taken().bring(groups, arrived, demand)
            self._remember(reader.key, entry.record)
            reader.adopt(entry)
            return self._verification(entry)
        if not isinstance(reader, EntryReader):
            raise InternalError(f"a remote source cannot bring the bytes of a {type(reader)}")
        if demand.ended:
            raise nobody_waits()
        for group in range(len(groups)):
            arrived(group)
        await self._check(reader)
        return self._verification(reader.entry)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return stored_folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        remote = _remote(key)
        entry = await self._workers.run(partial(self._entry, remote), close)
        try:
            return await sha256_of_entry(entry, self._workers.threads)
        finally:
            entry.close()

    async def populate(self, key: AdapterKey) -> Hold:
        entry = await self._workers.run(partial(self._entry, _remote(key)), close)
        try:  # who is removed meanwhile looks as if he was replaced
            hold = await self._workers.run(partial(held, entry), _close_hold)
            try:
                if isinstance(hold, LocalHold):
                    for start in hold.starts:
                        await self._workers.run(partial(hold.populate, start))
                    await self._workers.run(hold.settle)
            except BaseException:
                await self._workers.finish(hold.close)
                raise
        finally:
            entry.close()
        return hold

    def _entry(self, key: RemoteKey) -> CacheEntry:
        """Blocks. Raises `EvictedError`."""
        entry = self._opening.cache(key).open(cache_key(key))
        if entry is None:
            raise gone()
        record = self._records.get(key)
        if record is not None and record.contradicts(entry.record.files):
            entry.close()  # another process has fetched it anew, and its source had other bytes
            raise gone()
        return entry

    def _reader(self, key: RemoteKey) -> EntryReader:
        """Blocks."""
        return EntryReader(self._entry(key), cache_key(key), self._limits)

    def _verification(self, entry: CacheEntry) -> Verification:
        return UNCHECKED if self._verify == "none" else verification_of(entry.record)

    async def _check(self, reader: EntryReader) -> None:
        """Hash what was published before, against what it came to then."""
        if self._verify == "none":
            return

        def checked() -> CacheEntry | None:
            return self._opening.cache(reader.key).open(reader.key, check=True)

        entry = await self._workers.run(checked, close)
        if entry is None:
            raise IntegrityError("it changed in the disk cache since it was stored; load it again")
        entry.close()


def _remote(key: AdapterKey) -> RemoteKey:
    if not isinstance(key, RemoteKey):
        raise InternalError(f"{key} is not from a remote source")
    return key


def _close_hold(hold: LocalHold | ReadAhead) -> None:
    hold.close()
