"""An adapter on its way into the standard hub cache. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorax_async.core.cache_names import CONFIG_FILE, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock
from lorax_async.io.cache.partial_download import PartialDownload
from lorax_async.io.cache.partial_file import PartialFile, Reserve
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.remote.hub_layout import HubFile, open_same
from lorax_async.io.remote.hub_writing import Shelf
from lorax_async.io.sources.checked_open import FileReader

if TYPE_CHECKING:
    from lorax_async.io.remote.hub_cache import HubEntry


class StoredFile:
    """The `CacheFile` of bytes that are there already, as those of another commit: by their digest.

    So what is written to it would be the same.
    """

    resumed = False

    def __init__(self, path: str, file: HubFile) -> None:
        self.nbytes: int | None = file.identity.size
        self.digest = file.digest
        self.expected: Digest | None = file.digest
        self._path = path
        self._file = file

    def ends_at(self, nbytes: int) -> None:
        if nbytes != self._file.identity.size:
            raise IntegrityError(
                f"{self._file.role.file_name} is said to have {nbytes:,} bytes, but has others"
            )

    def missing(self, start: int = 0, stop: int | None = None) -> list[Span]:  # noqa: ARG002 - the port's
        return []

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        size = self._file.identity.size
        if offset + sum(buffer.nbytes for buffer in buffers) > size:
            raise IntegrityError(f"{self._file.role.file_name} goes on after its {size:,} bytes")

    def hash_along(self) -> int:
        return self._file.identity.size

    def reader(self) -> FileReader:
        file = self._file
        return FileReader(partial(open_same, self._path, file), file.identity, file.role.file_name)


class HubDownload(PartialDownload):
    """The `CacheDownload` whose files become blobs of a repository, and links to them a commit.

    `published` is called when they are, and gives the entry.
    """

    mappable = False

    def __init__(
        self,
        shelf: Shelf,
        published: Callable[[], HubEntry | None],
        partials: Partials,
        reserve: Reserve,
        taken: Taken,
        lock: NamedLock | None,
    ) -> None:
        super().__init__(partials, reserve, taken, lock)
        self._shelf = shelf
        self._published = published
        self._stored: dict[FileRole, StoredFile] = {}

    def file(
        self, role: FileRole, nbytes: int | None, expected: Digest | None = None
    ) -> PartialFile | StoredFile:
        self._open_folder()
        if role in self._stored:
            raise InternalError(f"{role.file_name} was added to the download twice")
        blob = None if expected is None else self._shelf.blob(role, expected)
        if blob is None or nbytes not in {None, blob.identity.size}:
            return self._add(role, nbytes, expected)
        self._stored[role] = StoredFile(self._shelf.path, blob)
        return self._stored[role]

    def publish(self) -> HubEntry:
        taken = self._open_folder()
        roles = {*self._files, *self._stored}
        if CONFIG_FILE not in roles or not any(role.kind == "weights" for role in roles):
            raise InternalError("a download without config or weights was to be published")
        digests = {role: file.digest for role, file in self._stored.items()}
        with self._discarded_if_wrong():
            digests |= {role: file.checked_digest() for role, file in self._files.items()}
        with translated_errors("publish a download"), self._unless_taken_away():
            for role, file in self._files.items():
                file.settled(digests[role])
            self._shelf.put(taken.folder, digests)
        self.discard()
        entry = self._published()
        if entry is None:
            raise FetchError("it was removed from the hub cache at once; load it again")
        return entry
