"""Every source at once: which one has an adapter is said by its id, or its key."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorax_async.adapter import AdapterKey, AdapterRef, RemoteKey
from lorax_async.core.runs import Span
from lorax_async.io.ports import (
    AdapterFile,
    Demand,
    FolderSource,
    Hold,
    Reader,
    StoredFolder,
)
from lorax_async.io.remote.cached import EntryReader, FetchReader
from lorax_async.verification import Verification


class AnySource:
    """Local folders, and what lies elsewhere.

    `parsed` turns what a caller asks for into its one spelling, with a source; it refuses what is
    not allowed.
    """

    def __init__(
        self, local: FolderSource, remote: FolderSource, parsed: Callable[[AdapterRef], AdapterRef]
    ) -> None:
        self._local = local
        self._remote = remote
        self._parsed = parsed

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        found = self._parsed(ref)
        source = self._local if found.source == "local" else self._remote
        return await source.resolve(found)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        return await self._of(key).open(key, demand)

    def reopen(self, key: AdapterKey) -> Reader:
        return self._of(key).reopen(key)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        remote = isinstance(file.reader, EntryReader | FetchReader)
        source = self._remote if remote else self._local
        return await source.bring(file, groups, arrived, demand)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return self._of(key).folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        return await self._of(key).digest(key)

    async def populate(self, key: AdapterKey) -> Hold:
        return await self._of(key).populate(key)

    def _of(self, key: AdapterKey) -> FolderSource:
        return self._remote if isinstance(key, RemoteKey) else self._local
