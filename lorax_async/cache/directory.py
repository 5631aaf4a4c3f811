"""The folder of a disk cache: private, locked by `flock`, and worked in by descriptor. Blocks.

It is opened by its path for each use, and made if it is missing, so that it may be removed between
uses. During a use no name inside it is looked up twice, and no link is followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from threading import Event, RLock
from time import monotonic
from typing import Literal

from lorax_async.cache.base import PARTIAL_LOCK, RECORD, is_entry_name
from lorax_async.errors import CapacityError, ConfigError, FetchError, LoraxError, shorten
from lorax_async.files import code_of

LOCK_SECONDS = 5.0
"""How long to wait for the directory's lock, which others hold for moments; then go on without."""

FolderName = Literal["entries", "partials", "trash", "answers"]

_POLL_SECONDS = 0.002
_LOCK_FILE = "lock"
# EBADF: NFS makes byte-range locks of flock, and wants the file open for writing.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_UNUSABLE = {errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
DAMAGED = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}
"""Errors of opening a file, if it is missing or not a file, or its folder not a folder."""

_FULL = {
    errno.ENOSPC: "its disk is full; free some of it, or lower the cache's budget",
    errno.EDQUOT: "this user's disk quota is used up; raise it, or lower the cache's budget",
    errno.EFBIG: "this process may not write so large a file; raise its RLIMIT_FSIZE (ulimit -f)",
}
_HINTS = {
    errno.ENOENT: "a folder in use was removed; it is made again, so load it again",
    errno.EROFS: "its file system can only be read; name another cache_dir to fetch anything new",
}


class CrowdedError(CapacityError):
    """There is no room now, but there will be when other uses end."""


def translate(error: OSError, doing: str) -> LoraxError:
    """Return the typed error for one of the operating system's. No text holds a path."""
    problem = f"the disk cache cannot {doing} ({code_of(error)})"
    if error.errno in _FULL:
        return CapacityError(f"{problem}: {_FULL[error.errno]}", stage="fetch")
    hint = _HINTS.get(error.errno or 0)
    return FetchError(problem if hint is None else f"{problem}: {hint}")


@contextmanager
def translate_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate(error, doing) from error


@contextmanager
def suppress_read_only() -> Iterator[None]:
    """Skip a change that a read-only file system refuses: its entries can still be served."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Return whether the open file is locked for us now. Raise `ConfigError` without locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"the disk cache's file system has no locks (flock: {code_of(error)}), and without them"
            " processes cannot share it; set cache_dir to a folder on another one"
        ) from error
    return True


def close_lock(fd: int) -> None:
    """Unlock and close the file; a forked child may still have it open."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def unique() -> str:
    return secrets.token_hex(8)


_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open folder, used by one thread at a time. Methods raise `OSError`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def names(self) -> list[str]:
        return os.listdir(self.fd)

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of a name, which may be a link; None if there is none."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def subfolder(self, name: str) -> Folder:
        return Folder(os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd))

    def file(self, name: str, flags: int) -> int:
        """Open a file; one that `O_CREAT` makes is private."""
        always = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags | always, 0o600, dir_fd=self.fd)

    @contextmanager
    def open_file(self, name: str, flags: int) -> Iterator[int]:
        """Open a file, as `file` does, and close it when the context is left."""
        fd = self.file(name, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def write(self, name: str, content: bytes) -> None:
        """Write a new file. A crash of the machine may leave part of it."""
        with self.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            while content:
                content = content[os.write(fd, content) :]

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a regular file, at most `max_bytes` + 1 of it."""
        with self.open_file(name, os.O_RDONLY) as fd:
            return read_all(fd, max_bytes)

    def unlink(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove_tree(self, name: str) -> None:
        """Remove a name and all below it; others may do so at the same time. Follow no link."""
        with suppress(FileNotFoundError):
            try:
                os.unlink(name, dir_fd=self.fd)
            except IsADirectoryError:
                with self.subfolder(name) as folder:
                    for child in folder.names():
                        folder.remove_tree(child)
                os.rmdir(name, dir_fd=self.fd)

    def is_named(self, name: str, within: Folder) -> bool:
        """Return whether `name` still leads to this folder."""
        status = within.status(name)
        return status is not None and os.path.samestat(status, os.fstat(self.fd))

    def close(self) -> None:
        """Close the descriptor. Forget it, as another file may get its number. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(fd: int, max_bytes: int) -> bytes:
    """Read a regular file from its position, at most `max_bytes` + 1 of it."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is not a regular file")
    content = b""
    while (room := max_bytes + 1 - len(content)) and (piece := os.read(fd, room)):
        content += piece
    return content


class CacheDirectory:
    """The folders of a cache.

    `entries` holds whole adapters, `partials` downloads, `trash` what is being removed, `answers`
    what sources resolved ids to. Methods raise `OSError`, and `ConfigError` if a folder is not this
    user's alone, cannot be opened, or has no locks. Call `drop` and `is_busy` with the directory
    locked; their names are those of entries or partials.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        self.leased: dict[int, str] = {}
        """Names of the entries that this process leases, by the lease's descriptor."""
        self._changing = RLock()
        self._is_locked = self._has_trash = False

    @cached_property
    def path(self) -> str:
        """The real path: a link is followed once, and then its target is made if missing."""
        return os.path.realpath(self._path)

    @contextmanager
    def open(self, name: FolderName) -> Iterator[Folder]:
        """Open one of the folders, made if it is missing."""
        with _private_folder(self.path) as root, _private_folder(name, root) as folder:
            yield folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude renames, removals and reservations of all threads and processes. Reentrant.

        What was removed meanwhile is deleted at the end, without the lock: that is slow.
        """
        with ExitStack() as after, self._changing, ExitStack() as held:
            if not self._is_locked:
                self._is_locked = True
                after.callback(self._empty_own_trash)
                held.callback(setattr, self, "_is_locked", False)
                # Where nothing can be written there is nothing to protect.
                with suppress_read_only(), _private_folder(self.path) as root:
                    fd = root.file(_LOCK_FILE, os.O_RDWR | os.O_CREAT)
                    held.callback(close_lock, fd)
                    until, pause = monotonic() + LOCK_SECONDS, Event()
                    while not try_lock(fd) and monotonic() < until:
                        pause.wait(_POLL_SECONDS)
            yield

    def drop(self, name: str) -> bool:
        """Remove an entry or a partial, if it is there; False if any process uses it."""
        with self._lock_alone(name) as alone:
            if alone:
                self.discard(name)
            return alone

    def is_busy(self, name: str) -> bool:
        """Return whether any process leases the entry, or writes to the partial."""
        with self._lock_alone(name) as alone:
            return not alone

    def discard(self, name: str, *, only: Folder | None = None) -> None:
        """Remove an entry or a partial atomically, even if it is in use.

        With `only`, remove it if it is still this folder.
        """
        with (
            self.locked(),
            self.open(_parent_of(name)) as parent,
            self.open("trash") as trash,
            suppress(FileNotFoundError),
        ):
            if only is None or only.is_named(name, parent):
                os.rename(name, unique(), src_dir_fd=parent.fd, dst_dir_fd=trash.fd)
                self._has_trash = True  # not before: another thread may be emptying it

    def empty_trash(self) -> None:
        """Remove all of the trash, also what others are removing now. Slow."""
        with self.open("trash") as trash:
            for name in trash.names():
                trash.remove_tree(name)

    def _empty_own_trash(self) -> None:
        if self._has_trash:
            self._has_trash = False
            self.empty_trash()

    @contextmanager
    def _lock_alone(self, name: str) -> Iterator[bool]:
        """Lock an entry's record, or a partial's lock; yield False if it is in use."""
        with ExitStack() as opened:
            alone = True  # also if there is nothing to lock, or the file system is read-only
            try:
                parent = opened.enter_context(self.open(_parent_of(name)))
                folder = opened.enter_context(parent.subfolder(name))
                fd = folder.file(RECORD if is_entry_name(name) else PARTIAL_LOCK, os.O_RDWR)
                opened.callback(close_lock, fd)
                alone = try_lock(fd)
            except OSError as error:
                if error.errno not in DAMAGED | {errno.EROFS}:
                    raise
            yield alone


def _parent_of(name: str) -> FolderName:
    return "entries" if is_entry_name(name) else "partials"


def _private_folder(name: str, within: Folder | None = None) -> Folder:
    """Open a folder, made if it is missing. Raise `ConfigError` if it is not this user's alone.

    Follow links in the root's path, which is the operator's; refuse a link inside.
    """
    try:
        folder = _open_or_make(name, within)
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        problem = f"{_label(name, within)} cannot be opened: {error.strerror}"
        raise ConfigError(problem) from error
    try:
        status = os.fstat(folder.fd)
        if status.st_uid != os.geteuid():
            problem = f"{_label(name, within)} belongs to another user; give one of your own"
            raise ConfigError(problem)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"others may write to {_label(name, within)}; chmod 700 it, or give another"
            raise ConfigError(problem)
    except BaseException:
        folder.close()
        raise
    return folder


def _label(name: str, within: Folder | None) -> str:
    return f"the disk cache's {'' if within is None else 'own '}folder {shorten(name, 500)!r}"


def _open_or_make(name: str, within: Folder | None) -> Folder:
    flags = _OPEN_FOLDER if within is None else _OPEN_FOLDER | os.O_NOFOLLOW
    at = None if within is None else within.fd
    try:
        return Folder(os.open(name, flags, dir_fd=at))
    except FileNotFoundError:
        with suppress(FileExistsError):
            if at is None:
                os.makedirs(name, 0o700)
            else:
                os.mkdir(name, 0o700, dir_fd=at)
        return Folder(os.open(name, flags, dir_fd=at))
