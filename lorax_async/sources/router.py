"""Route each call to the local or the remote source, by the id, the key or the reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorax_async.concurrency import FetchControl
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.ids import LocalFolder, ParsedRef
from lorax_async.remote.readers import EntryReader, FetchReader
from lorax_async.sources.base import AdapterFile, FolderSource, PinnedPages, StoredFolder
from lorax_async.types import AdapterKey, AdapterRef, RemoteKey, Verification


class SourceRouter:
    """The `Source` of local folders and remote adapters.

    `parse` gives a ref its one spelling and its source, and refuses ids that are not allowed.
    """

    def __init__(
        self, local: FolderSource, remote: FolderSource, parse: Callable[[AdapterRef], ParsedRef]
    ) -> None:
        self._local = local
        self._remote = remote
        self._parse = parse

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        parsed_ref = self._parse(ref)
        source = self._local if isinstance(parsed_ref.place, LocalFolder) else self._remote
        return await source.resolve(parsed_ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        return await self._of(key).open(key, control)

    def reopen(self, key: AdapterKey) -> Reader:
        return self._of(key).reopen(key)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        remote = isinstance(file.reader, EntryReader | FetchReader)
        source = self._remote if remote else self._local
        return await source.bring(file, groups, arrived, control)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return self._of(key).folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        return await self._of(key).digest(key)

    async def populate(self, key: AdapterKey) -> PinnedPages:
        return await self._of(key).populate(key)

    def _of(self, key: AdapterKey) -> FolderSource:
        return self._remote if isinstance(key, RemoteKey) else self._local
