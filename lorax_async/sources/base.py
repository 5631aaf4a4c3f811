"""The interface of a source: resolve an id, open its files, bring their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from lorax_async.concurrency import FetchControl
from lorax_async.errors import LoraxError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.types import AdapterKey, AdapterRef, Verification


class PinnedPages(Protocol):
    """Keeps the bytes of one adapter in memory until it is closed."""

    @property
    def nbytes(self) -> int:
        """Bytes that it maps; 0 where the kernel was merely asked to read ahead."""

    @property
    def locked(self) -> bool:
        """The kernel may not take the pages back; else they stay for as long as it likes."""

    def close(self) -> None:
        """Blocks. Idempotent."""


class RefusalCallback(Protocol):
    """How a source is told that what it opened was refused."""

    async def __call__(self, error: LoraxError, *, weights: bool) -> bool:
        """After a check of the config or the header failed: see `AdapterFile.refused`.

        With `weights`, after a check of the weights' bytes failed: a copy that nobody vouched for
        is dropped. The reader stays open.
        """


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An opened adapter: its config, the beginning of its weights (the whole header), a reader.

    `holdable` says whether `populate` would hold the bytes, and not only read ahead.
    `refuse`, where the source needs to know: see `refused`.
    """

    config: bytes
    prefix: bytes
    reader: Reader
    holdable: bool = False
    refuse: RefusalCallback | None = None

    async def refused(self, error: LoraxError) -> bool:
        """Close it, after a check of its config or header failed with `error`.

        Return whether `Source.open` may return other bytes now: a copy that nobody vouched for, and
        that is not what the source has, is dropped.
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
        """Which bytes `ref` names now. Checks that the caller may have them; reads none."""

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        """Open these bytes and no others: a file that changed since is an `IntegrityError`.

        Ends early, with `FetchError`, when `control` ends, if it takes long at all.
        """

    def reopen(self, key: AdapterKey) -> Reader:
        """A reader of an adapter whose config and header are known.

        Quick: the file is opened, and checked as `open` does, by the first read.
        """

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        """Make the bytes of every group readable, in this order.

        Calls `arrived` with a group's index, on the loop, when its bytes may be used before all of
        the file was checked; returns how it was, when all are here. Ends early, with `FetchError`,
        when `control` ends.
        """

    async def digest(self, key: AdapterKey) -> str:
        """What the weights, which are here, come to: `Verification.digest`, by sha256.

        Raises as `open` does.
        """

    async def populate(self, key: AdapterKey) -> PinnedPages:
        """Bring all bytes into memory, and keep them there as far as the source can.

        Raises as `open` does.
        """


class StoredFolder(NamedTuple):
    """The folder with an adapter's files, and how many bytes these have."""

    path: str
    nbytes: int


@runtime_checkable
class FolderSource(Source, Protocol):
    """A `Source` whose adapters are files in a folder of this machine, once they are brought."""

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        """Return the folder of what `bring` has brought. Its files stay until `reader` is closed.

        Quick. Of folders that are not the cache's own, their owner may still remove files.
        """
