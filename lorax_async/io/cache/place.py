"""Where a disk cache is: its folders, and the one way in which something leaves them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from lorax_async.core.cache_names import BUDGET_LOCK, Owner
from lorax_async.errors import ConfigError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.folders import Folder, private_root, private_subfolder, remove_tree
from lorax_async.io.cache.locks import attempt, short_lock
from lorax_async.io.cache.processes import this_process

_FOLDERS = ("entries", "partials", "locks", "trash", "answers")


class Place:
    """The folders of a cache, open, and the process that has opened them.

    `entries` holds what is whole, `partials` what is on its way, `locks` what is being done, and
    `trash` what is being removed, `answers` what sources said last. Raises `ConfigError` if a
    folder is not this user's alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with translated_errors("tell this process from others"):
            self.here: Owner = this_process()
        self._path = os.path.realpath(path)  # the folder that a link led to is made again
        with ExitStack() as opened:
            self._root = opened.enter_context(private_root(path))
            folders = [
                opened.enter_context(private_subfolder(self._root, name)) for name in _FOLDERS
            ]
            self._opened = opened.pop_all()
        self.entries, self.partials, self.locks, self.trash, self.answers = folders
        self._folders = dict(zip(_FOLDERS, folders, strict=True))
        self._counting = Lock()
        self._restoring = Lock()

    def restore(self) -> None:
        """Recreate folders that were removed (`rm -rf`) or moved away.

        The new ones take over the descriptors of the old ones, so that all users see them at once.
        Downloads into the old ones fail. Raise as the constructor, or `FetchError`.
        """
        with self._restoring, translated_errors("look for its folders"):
            try:
                if not self._root.is_named(self._path):
                    self._root.become(private_root(self._path))
                for name, folder in self._folders.items():
                    if not folder.is_named(name, within=self._root):
                        folder.become(private_subfolder(self._root, name))
            except ConfigError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise error.__cause__ from None  # it is being removed at this moment
                raise

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While this is entered nothing here gets another name, so that all of it can be counted.

        Whoever renames what counts enters it, too.
        """
        with self._counting, short_lock(self.locks, BUDGET_LOCK):
            yield

    def move_out(self, folder: Folder, name: str) -> str:
        """Take something away from everybody's eyes at once; returns its name in the trash.

        Raises `FileNotFoundError` if somebody else did.
        """
        serial = unique()
        os.rename(name, serial, src_dir_fd=folder.fd, dst_dir_fd=self.trash.fd)
        return serial

    def throw_away(self, folder: Folder, name: str) -> None:
        """As `move_out`, and give its room back."""
        remove_tree(self.move_out(folder, name), self.trash)

    def empty_trash(self) -> None:
        """Remove what is being removed; whoever began it was killed, or does not mind."""
        for name in self.trash.names():
            remove_tree(name, self.trash)

    def tidy(self) -> None:
        """Remove what killed processes were removing, and the locks that they had."""
        self.empty_trash()
        for name in self.locks.names():
            lock = attempt(self.locks, name)
            if lock is not None:
                lock.release()

    def close(self) -> None:
        self._opened.close()


def unique() -> str:
    """A name that nobody else has."""
    return secrets.token_hex(8)
