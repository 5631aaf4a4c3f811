"""Partial downloads: who writes to which, taking one over, and dropping it. Blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Lock

from lorax_async.core.cache_names import PartialName, partial_name
from lorax_async.io.cache.folders import Folder, remove_tree
from lorax_async.io.cache.locks import attempt
from lorax_async.io.cache.place import Place, unique
from lorax_async.io.cache.processes import can_be_trusted, is_running
from lorax_async.io.cache.sizes import files_in


@dataclass(frozen=True, slots=True)
class Taken:
    """The folder of a partial download that is this process's own."""

    name: str
    folder: Folder


class Partials:
    """All partial downloads, and which of them this process writes to. Raises `OSError`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = Lock()
        self._own: set[str] = set()
        self._given_up: set[str] = set()
        """Those that should have been left or removed, and could not be."""

    def own(self) -> set[str]:
        with self._lock:
            return set(self._own)

    def begin(self, entry: str) -> Taken:
        """A new one, which nobody else knows of."""
        name = str(PartialName(entry, self._place.here, unique()))
        with self._owned(name):
            return Taken(name, self._place.partials.make_subfolder(name))

    def take_over(self, entry: str) -> Taken | None:
        """The newest one that can be gone on with; others that nobody writes to are dropped.

        For whoever has the entry's lock.
        """
        taken = None
        for left in sorted(self._of(entry), key=self.changed_ns, reverse=True):
            if self._is_written(left):
                continue
            if taken is None and can_be_trusted(left, self._place.here):
                taken = self._renamed(left)
            else:
                self._removed(str(left))
        return taken

    def drop(self, name: str) -> bool:
        """Remove one; False if somebody writes to it, or is about to."""
        found = partial_name(name)
        if found is None or self._is_written(found):
            return False
        lock = attempt(self._place.locks, found.entry)
        if lock is None:
            return False
        try:
            return self._removed(name)
        finally:
            lock.release()

    def leave(self, taken: Taken) -> None:
        """It is on the disk, and nobody writes to it any more. Closes its folder."""
        found = partial_name(taken.name)
        assert found is not None
        fd = self._place.partials.fd
        with (
            self._ending(taken),
            self._place.undisturbed(),
            suppress(FileNotFoundError),
        ):
            # Whoever took it over, where locks do nothing, has it now.
            os.rename(taken.name, str(replace(found, owner=None)), src_dir_fd=fd, dst_dir_fd=fd)

    def remove(self, taken: Taken) -> None:
        """Leave nothing of it. Closes its folder."""
        with self._ending(taken):
            self._removed(taken.name)

    def forget(self, name: str) -> None:
        """It is no partial any more."""
        with self._lock:
            self._own.discard(name)

    def progress(self, entry: str) -> int:
        """A number that changes as long as somebody downloads the entry."""
        return max((self.changed_ns(left) for left in self._of(entry)), default=0)

    def changed_ns(self, left: PartialName) -> int:
        """When it was written to last, in nanoseconds since the epoch; 0 if there is nothing."""
        files = files_in(self._place.partials, str(left))
        return max((status.st_mtime_ns for status in files), default=0)

    def is_written(self, name: str) -> bool:
        found = partial_name(name)
        return found is not None and self._is_written(found)

    def of(self, entry: str) -> list[str]:
        return [str(left) for left in self._of(entry)]

    def _of(self, entry: str) -> Iterator[PartialName]:
        for text in self._place.partials.names():
            name = partial_name(text)
            if name is not None and name.entry == entry:
                yield name

    def _is_written(self, left: PartialName) -> bool:
        """Does a process that is known to run write to it?"""
        with self._lock:
            if str(left) in self._given_up:
                return False
        return left.owner is not None and is_running(left.owner, self._place.here)

    def _renamed(self, left: PartialName) -> Taken | None:
        """It is ours under our own name; None if somebody else was faster."""
        name = str(PartialName(left.entry, self._place.here, unique()))
        fd = self._place.partials.fd
        with self._owned(name):
            try:
                with self._place.undisturbed():
                    os.rename(str(left), name, src_dir_fd=fd, dst_dir_fd=fd)
            except FileNotFoundError:
                self.forget(name)
                return None
            return Taken(name, self._place.partials.subfolder(name))

    @contextmanager
    def _owned(self, name: str) -> Iterator[None]:
        """Ours from before it is there on; after an error nobody's."""
        with self._lock:
            self._own.add(name)
        try:
            yield
        except BaseException:
            self._give_up(name)
            raise

    @contextmanager
    def _ending(self, taken: Taken) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._give_up(taken.name)
            raise
        finally:
            self.forget(taken.name)
            taken.folder.close()

    def _give_up(self, name: str) -> None:
        with self._lock:
            self._own.discard(name)
            self._given_up.add(name)

    def _removed(self, name: str) -> bool:
        try:
            removed = self._place.move_out(self._place.partials, name)
        except FileNotFoundError:
            return False
        remove_tree(removed, self._place.trash)
        return True
