"""Files of one adapter on their way to this disk, whoever keeps them afterwards. Blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lorax_async.core.cache_names import CacheKey, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock, attempt
from lorax_async.io.cache.partial_file import PartialFile, Reserve
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.cache.place import Place

_E = TypeVar("_E")
_D = TypeVar("_D")


class PartialDownload:
    """All of a `CacheDownload` but its end: in a folder of its own, under the key's lock if it can.

    Nothing here relies on that lock: another process that downloads the same writes to another
    folder.
    """

    def __init__(
        self, partials: Partials, reserve: Reserve, taken: Taken, lock: NamedLock | None
    ) -> None:
        self._partials = partials
        self._reserve = reserve
        self._taken: Taken | None = taken
        self._lock = lock
        self._files: dict[FileRole, PartialFile] = {}

    def discard(self) -> None:
        if (taken := self._taken) is not None:
            with self._ending(), translated_errors("remove a download"):
                self._partials.remove(taken)

    def close(self) -> None:
        if (taken := self._taken) is None:
            return
        if not any(file.is_worth_keeping() for file in self._files.values()):
            self.discard()
            return
        with self._ending(), translated_errors("leave a download"):
            try:
                self._bring_to_disk(taken)
            except OSError:
                self._partials.remove(taken)
                raise
            self._partials.leave(taken)

    def __del__(self) -> None:
        if self._taken is not None:
            warnings.warn("unclosed download of a disk cache", ResourceWarning, stacklevel=2)
            self.close()

    def _add(self, role: FileRole, nbytes: int | None, expected: Digest | None) -> PartialFile:
        if role in self._files:
            raise InternalError(f"{role.file_name} was added to the download twice")
        file = PartialFile(self._open_folder().folder, role, expected, self._reserve)
        try:
            file.resume(nbytes)
        except BaseException:
            file.close()
            with translated_errors("give room back"):
                file.remove()
            raise
        self._files[role] = file
        return file

    def _open_folder(self) -> Taken:
        if self._taken is None:
            raise InternalError("the download has ended")
        return self._taken

    @contextmanager
    def _discarded_if_wrong(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            self.discard()
            raise

    @contextmanager
    def _unless_taken_away(self) -> Iterator[None]:
        """Where locks do nothing, a process that took this one for dead may have the folder now."""
        try:
            yield
        except FileNotFoundError as error:
            raise FetchError(
                "another process took over the download where locks do not work, or somebody"
                " removed its folder; load it again"
            ) from error

    def _bring_to_disk(self, taken: Taken) -> None:
        for file in self._files.values():
            if file.is_worth_keeping():
                file.sync()
            else:
                file.remove()
        taken.folder.sync()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever happens, nothing stays open or locked."""
        try:
            yield
        finally:
            self._taken = None
            for file in self._files.values():
                file.close()
            if self._lock is not None:
                self._lock.release()


def one_at_a_time(
    place: Place,
    partials: Partials,
    key: CacheKey,
    opened: Callable[[CacheKey], _E | None],
    download: Callable[[Taken, NamedLock | None], _D],
    *,
    alone: bool,
) -> _E | _D | int:
    """What `opened` finds; else what `download` makes of a folder, which others may have left.

    While somebody else downloads `key`: how far he is. `alone` does not heed him.
    """
    entry = opened(key)
    if entry is not None:
        return entry
    with translated_errors("begin a download"):
        lock = attempt(place.locks, key.name)
        if lock is None:
            return (
                download(partials.begin(key.name), None) if alone else partials.progress(key.name)
            )
        try:
            found = opened(key)  # whoever had the lock before may have published it
            if found is None:
                return download(partials.take_over(key.name) or partials.begin(key.name), lock)
        except BaseException:
            lock.release()
            raise
        lock.release()
        return found
