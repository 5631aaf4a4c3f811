"""Adapters in local folders: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

Weights may also be an index and the files that it names.

A `pathlib.Path` comes from the embedding program and is followed wherever it leads. A `str` may
come from a request: the real path of its folder must lie in one of the operator's roots, and its
files in that folder (or, in the standard hub cache, among the blobs of that folder's repository).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from typing import Any, NamedTuple, ParamSpec, TypeVar

import aiofiles

from lorax_async.concurrency import Closable, FetchControl, close_all
from lorax_async.config import Limits, Root, as_local_roots
from lorax_async.errors import FetchError, IntegrityError, UsageError
from lorax_async.files import (
    FileReader,
    Reader,
    changed_error,
    identity_of,
    open_same,
    sha256_of,
    to_adapter_error,
)
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.split_weights import join_digests
from lorax_async.ids import parse_place
from lorax_async.sources.base import AdapterFile, PinnedPages, StoredFolder
from lorax_async.sources.local_folder import (
    CONFIG,
    LocalPages,
    SplitReader,
    begin_hold,
    can_hold,
    count_files,
    find_adapter,
    open_weights,
    readers_of,
    reopened,
)
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, FileIdentity, Verification

REMEMBERED_INDEXES = 1024
"""File counts kept by index: every request resolves its id, and needs only the count."""

MAX_DIGESTS = 65_536
"""Digests kept of hashed files; the oldest is dropped first."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


_C = TypeVar("_C", bound=Closable)


class _OpenedWeights(NamedTuple):
    prefix: bytes
    reader: Reader
    holdable: bool

    def close(self) -> None:
        self.reader.close()


class LocalSource:
    """A `Source` of local folders.

    Parameters
    ----------
    roots
        Folders that contain the folders of `str` ids; links are followed, anew for each id.
        Adapters in immutable roots can be held in host memory, whichever id names them.
    limits
        Limits of an adapter's files.
    threads
        Run the file system calls; two threads open config and weights side by side.
    hashes
        Hash weights each time they are opened, before they are used.
    """

    def __init__(
        self, *, roots: Sequence[Root], limits: Limits, threads: Executor, hashes: bool = False
    ) -> None:
        known = as_local_roots(roots)
        self._roots = tuple(os.fspath(root.path) for root in known)
        self._immutable = tuple(os.fspath(root.path) for root in known if root.immutable)
        self._limits = limits
        self._threads = threads
        self._count = lru_cache(maxsize=REMEMBERED_INDEXES)(count_files)
        self._hashes = hashes
        self._digests: dict[FileIdentity, str] = {}

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        place = parse_place(ref, self._roots)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, find_adapter, place, self._roots, self._limits, self._count
        )

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:  # noqa: ARG002 - the port's
        if len(key.files) < 2:
            raise UsageError("the key is not a local adapter's")
        opening = self._threads.submit(_open_weights, key, self._limits, self._immutable)
        try:
            config = await self._read_config(key)
            weights = await asyncio.wrap_future(opening)
        except BaseException as error:
            opening.add_done_callback(_close)
            if isinstance(error, Exception):
                # Wait for the thread, and raise the first error.
                with suppress(Exception):
                    await asyncio.wrap_future(opening)
            raise
        return AdapterFile(config, weights.prefix, weights.reader, weights.holdable)

    def reopen(self, key: AdapterKey) -> Reader:
        return reopened(key, self._limits)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],  # noqa: ARG002 - the port's
        arrived: Callable[[int], None],  # noqa: ARG002 - the port's
        control: FetchControl,
    ) -> Verification:
        """Return at once, or hash the file: copies read it directly, through the reader.

        No digest is promised for a local file; ours must only be the same each time.
        """
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")
        if not self._hashes:
            return UNCHECKED
        return Verification("transport", await self._digest(_files_of(file.reader), control))

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:  # noqa: ARG002 - the port's
        return StoredFolder(key.location, sum(file.size for file in key.files))

    async def digest(self, key: AdapterKey) -> str:
        readers = readers_of(key, known=True)
        try:
            return await self._digest(readers, FetchControl())
        finally:
            close_all(readers)

    async def _digest(self, readers: Sequence[FileReader], control: FetchControl) -> str:
        return join_digests([await self._file_digest(reader, control) for reader in readers])

    async def _file_digest(self, reader: FileReader, control: FetchControl) -> str:
        """Return the file's digest. Raise `IntegrityError` if an earlier one was different."""
        digest = await sha256_of(reader, self._threads, control)
        known = self._digests.setdefault(reader.identity, digest)
        if known != digest:
            raise IntegrityError(
                f"{reader.name} has other bytes than before, though it was not written to: look at"
                " the disk, and save the adapter again"
            )
        if len(self._digests) > MAX_DIGESTS:
            del self._digests[next(iter(self._digests))]
        return digest

    async def populate(self, key: AdapterKey) -> PinnedPages:
        """Map all bytes of an adapter in an immutable root, and lock them if the process may.

        Elsewhere ask the kernel to read ahead, and hold nothing.
        """
        opening = self._threads.submit(
            begin_hold, readers_of(key, known=True), key, self._immutable
        )
        try:
            pages = await asyncio.wrap_future(opening)
        except BaseException:
            opening.add_done_callback(_close)
            raise
        if isinstance(pages, LocalPages):
            await self._fill(pages)
        return pages

    async def _fill(self, pages: LocalPages) -> None:
        """Populate piece by piece: other users of the threads wait for one piece at most."""
        loop = asyncio.get_running_loop()
        try:
            for start in pages.starts:
                await loop.run_in_executor(self._threads, pages.populate, start)
            await loop.run_in_executor(self._threads, pages.settle)
        except BaseException as error:
            # A thread that still populates keeps the map until it has finished.
            closing = self._threads.submit(pages.close)
            if isinstance(error, Exception):
                await asyncio.wrap_future(closing)
            raise

    async def _read_config(self, key: AdapterKey) -> bytes:
        path, identity = os.path.join(key.location, CONFIG), key.files[0]
        hops = _TwoHopExecutor(self._threads)
        try:
            file = await aiofiles.open(
                path, "rb", opener=lambda path, _: open_same(path, identity), executor=hops
            )
            content = await file.read(identity.size + 1)
            status = await asyncio.wrap_future(hops.submit(_close_after_status, file.raw))
        except BaseException as error:
            hops.abandon()
            if isinstance(error, OSError):
                raise to_adapter_error(error, CONFIG) from error
            raise
        if len(content) != identity.size or identity_of(status) != identity:
            raise changed_error(CONFIG)
        return content


def _files_of(reader: Reader) -> list[FileReader]:
    """Return the readers of the files behind an opened adapter's reader."""
    several = (
        reader.files.readers if isinstance(reader, SplitReader) and reader.files else (reader,)
    )
    return [each for each in several if isinstance(each, FileReader)]


class _TwoHopExecutor(Executor):
    """The executor that aiofiles uses for one file; closes the file even after a cancellation.

    aiofiles leaks a file whose opening is cancelled, and a read in progress must end first.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._opening: Future[Any] | None = None
        self._latest: Future[Any] | None = None

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        hop = self._threads.submit(fn, *args, **kwargs)
        self._opening, self._latest = self._opening or hop, hop
        return hop

    def abandon(self) -> None:
        """Close the file as soon as the latest call has ended."""
        opening, latest = self._opening, self._latest
        if opening is not None and latest is not None:
            latest.add_done_callback(lambda _: _close(opening))


def _close_after_status(file: FileIO) -> os.stat_result:
    with file:
        return os.fstat(file.fileno())


def _close(opening: Future[_C]) -> None:
    opened = _outcome(opening)
    if opened is not None:
        opened.close()


def _outcome(future: Future[_T]) -> _T | None:
    """Return a future's result; None if it was cancelled or failed."""
    succeeded = future.done() and not future.cancelled() and future.exception() is None
    return future.result() if succeeded else None


def _open_weights(key: AdapterKey, limits: Limits, immutable: Sequence[str]) -> _OpenedWeights:
    prefix, reader, files = open_weights(key, limits)
    try:
        return _OpenedWeights(prefix, reader, can_hold(files, key, immutable))
    except BaseException:
        reader.close()
        raise
