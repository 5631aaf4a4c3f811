"""Route each call to the source of the id's place, or of the key's type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lorax_async.concurrency import FetchControl
from lorax_async.errors import UsageError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.ids import LocalFolder, ParsedRef
from lorax_async.sources.base import AdapterFile, FolderSource, PinnedPages, Source, StoredFolder
from lorax_async.sources.tensors import MemorySource
from lorax_async.types import AdapterKey, AdapterRef, MergedKey, RemoteKey, TensorsKey, Verification


class SourceRouter:
    """The `Source` of a loader: adapters in memory, local folders and remote adapters.

    `parse` gives a ref its one spelling and its place, and refuses ids that are not allowed. None
    leaves all ids to `local`, a source of the program's own, which is `remote` too then.
    """

    def __init__(
        self,
        memory: MemorySource,
        local: Source,
        remote: Source,
        parse: Callable[[AdapterRef], ParsedRef] | None = None,
    ) -> None:
        self._memory = memory
        self._local = local
        self._remote = remote
        self._parse = parse
        memory.merger.source = self

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        if self._parse is None:
            return await self._local.resolve(ref)
        parsed_ref = self._parse(ref)
        match parsed_ref.place:
            case LocalFolder():
                return await self._local.resolve(parsed_ref)
            case _:
                return await self._remote.resolve(parsed_ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        return replace(await self._of(key).open(key, control), key=key)

    def reopen(self, key: AdapterKey) -> Reader:
        return self._of(key).reopen(key)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        assert file.key is not None, "it was opened here"
        return await self._of(file.key).bring(file, groups, arrived, control)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        source = self._of(key)
        if not isinstance(source, FolderSource):
            raise UsageError(f"{key} has no folder")
        return source.folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        return await self._of(key).digest(key)

    async def populate(self, key: AdapterKey) -> PinnedPages:
        return await self._of(key).populate(key)

    def _of(self, key: AdapterKey) -> Source:
        match key:
            case TensorsKey() | MergedKey():
                return self._memory
            case RemoteKey():
                return self._remote
            case _:
                return self._local
