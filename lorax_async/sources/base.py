"""The interface of a source: resolve an id, open its files, fetch their bytes; and the router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

from lorax_async.concurrency import FetchControl
from lorax_async.errors import LoraxError, UsageError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.ids import LocalFolder, ParsedRef
from lorax_async.types import AdapterKey, AdapterRef, RemoteKey, TensorsKey, Verification


class RefusalCallback(Protocol):
    """Notifies a source that an adapter which it opened was refused."""

    async def __call__(self, error: LoraxError, *, weights: bool) -> bool:
        """Refuse an adapter after a check of its config or header: see `AdapterFile.refused`.

        With `weights`, after a check of the weights' bytes: drop a copy without a promised digest.
        The reader stays open.
        """


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An opened adapter: config, the weights' `prefix` that ends with the header, and a reader.

    `holdable` is whether no program writes to the file, so that it may be mapped; `cached`, whether
    the bytes seem to be in memory now. `refuse` is None if the source does not need a
    notification: see `refused`. `key` is set by the router.
    """

    config: bytes
    prefix: bytes
    reader: Reader
    holdable: bool = False
    refuse: RefusalCallback | None = None
    key: AdapterKey | None = None
    cached: bool = False

    async def refused(self, error: LoraxError) -> bool:
        """Close it, after a check of its config or header failed with `error`.

        Drop a copy without a promised digest that is not what the source has. Return whether
        `Source.open` may return other bytes now.
        """
        if self.refuse is None:
            self.reader.close()
            return False
        return await self.refuse(error, weights=False)


class Source(Protocol):
    """Where adapters come from.

    Errors are those of `lorax_async.errors`, without id and story; nothing stays open on an error
    or a cancellation.
    """

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        """Return the key of what `ref` names now, if the caller may have it.

        Read no bytes of config or weights; an index that says where they are may be read.
        """

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        """Open exactly the bytes of `key`. Raise `IntegrityError` for a file that changed since.

        End early, with `FetchError`, when `control` ends, if opening takes long.
        """

    def reopen(self, key: AdapterKey) -> Reader:
        """Return a reader of an adapter whose config and header are known.

        Quick, on the loop: the first read opens the file, and checks it as `open` does.
        """

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        """Make the bytes of every group readable, earlier groups first.

        Call `arrived` on the loop with the index of each group whose bytes may be used before the
        whole file is checked; a later one may come first; a source whose bytes are all here may
        leave it out. Return the verification when all have arrived. End early, with `FetchError`,
        when `control` ends.
        """

    async def digest(self, key: AdapterKey) -> str:
        """Return the sha256 of weights that were fetched, as `Verification.digest` has it.

        Raise as `open` does.
        """


class StoredFolder(NamedTuple):
    """The folder with an adapter's files, and their size."""

    path: str
    nbytes: int


@runtime_checkable
class FolderSource(Source, Protocol):
    """A `Source` that stores adapters as files in a folder of this machine."""

    async def folder(
        self, key: AdapterKey, file: AdapterFile, control: FetchControl
    ) -> StoredFolder:
        """Return the folder of an adapter that was fetched; first fetch its own tokenizer, if any.

        Its files stay until the file's reader is closed; outside the disk cache, their owner may
        still remove them. End early, with `FetchError`, when `control` ends.
        """


class SourceRouter:
    """The `Source` of a loader: local folders, remote adapters, and adapters in `memory`.

    `parse` gives a ref its one spelling and location, and refuses ids that are not allowed. None
    leaves all ids to `local`, a source of the program's own, which is `remote` too then. A store
    without a device has no adapters in memory.
    """

    def __init__(
        self, local: Source, remote: Source, parse: Callable[[AdapterRef], ParsedRef] | None = None
    ) -> None:
        self.memory: Source | None = None
        self._local = local
        self._remote = remote
        self._parse = parse

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        if self._parse is None:
            return await self._local.resolve(ref)
        parsed_ref = self._parse(ref)
        match parsed_ref.location:
            case LocalFolder():
                return await self._local.resolve(parsed_ref)
            case _:
                return await self._remote.resolve(parsed_ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        return replace(await self._of(key).open(key, control), key=key)

    def reopen(self, key: AdapterKey) -> Reader:
        return self._of(key).reopen(key)

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        assert file.key is not None, "it was opened here"
        return await self._of(file.key).fetch_groups(file, groups, arrived, control)

    async def folder(
        self, key: AdapterKey, file: AdapterFile, control: FetchControl
    ) -> StoredFolder:
        source = self._of(key)
        if not isinstance(source, FolderSource):
            raise UsageError(f"{key} has no folder")
        return await source.folder(key, file, control)

    async def digest(self, key: AdapterKey) -> str:
        return await self._of(key).digest(key)

    def _of(self, key: AdapterKey) -> Source:
        match key:
            case TensorsKey():
                if self.memory is None:
                    raise UsageError(f"{key} has no files; load it with an AdapterLoader")
                return self.memory
            case RemoteKey():
                return self._remote
            case _:
                return self._local
