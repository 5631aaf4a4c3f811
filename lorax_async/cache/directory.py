"""The folder of a disk cache: private, locked by `flock`, and worked in by descriptor. Blocks.

No name is looked up twice, and no link inside is followed. Where a file system has no locks,
`try_lock` says so and callers do without: nothing that is served depends on a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Lock, RLock
from time import monotonic

from lorax_async.errors import CapacityError, ConfigError, FetchError, LoraxError, shorten
from lorax_async.files import code_of

LOCK_SECONDS = 5.0
"""How long to wait for the directory's lock, which others hold for moments; then go on without."""

_POLL_SECONDS = 0.002
_FOLDERS = ("entries", "partials", "trash", "answers")
_LOCK_FILE = "lock"
# EBADF: NFS makes byte-range locks of flock, and wants the file open for writing.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
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


def try_lock(fd: int, *, shared: bool = False) -> bool | None:
    """Return whether the open file is locked for us now; None where there are no locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def close_lock(fd: int) -> None:
    """Unlock and close the file; a forked child may still have it open."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def unique() -> str:
    return secrets.token_hex(8)


_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_OPEN = -1


class Folder:
    """An open folder. Methods raise `OSError`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor. Raise `FetchError` once closed: the number may be another file's."""
        if self._fd == _NOT_OPEN:
            raise FetchError("the disk cache was closed before it was used")
        return self._fd

    def names(self) -> list[str]:
        with self.subfolder(".") as own:  # two listings by one descriptor would share its position
            return os.listdir(own.fd)

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

    def is_named(self, name: str | os.PathLike[str], within: Folder | None = None) -> bool:
        """Return whether `name` still leads to this folder."""
        try:
            status = os.stat(name, dir_fd=None if within is None else within.fd)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(status, os.fstat(self.fd))

    def become(self, other: Folder) -> None:
        """Replace the descriptor in place by that of `other`, and close `other`."""
        with other:
            os.dup2(other.fd, self.fd, inheritable=False)

    def sync(self) -> None:
        """Bring the names in the folder to the disk."""
        os.fsync(self.fd)

    def close(self) -> None:
        fd, self._fd = self._fd, _NOT_OPEN
        if fd != _NOT_OPEN:
            os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(fd: int, max_bytes: int) -> bytes:
    """Read a regular file from its position, at most `max_bytes` + 1 of it."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise IsADirectoryError(errno.EISDIR, "no regular file")
    content = b""
    while (room := max_bytes + 1 - len(content)) and (piece := os.read(fd, room)):
        content += piece
    return content


class CacheDirectory:
    """The open folders of a cache.

    `entries` holds whole adapters, `partials` downloads, `trash` what is being removed, `answers`
    what sources resolved ids to. Raise `ConfigError` if a folder is not this user's alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(path)  # if a link led here, its target is what is recreated
        with ExitStack() as opened:
            self._root = opened.enter_context(_private_folder(path))
            self._folders = {
                name: opened.enter_context(_private_folder(name, self._root)) for name in _FOLDERS
            }
            self._opened = opened.pop_all()
        self.entries, self.partials, self.trash, self.answers = self._folders.values()
        self.holding = Lock()
        self._held: Counter[str] = Counter()
        self._changing = RLock()
        self._is_locked = False
        self.has_locks = True
        """Whether locks worked in the last `locked`."""
        self._restoring = Lock()

    def restore(self) -> None:
        """Recreate folders that were removed (`rm -rf`) or moved away.

        The new ones take over the descriptors of the old ones, so that all users see them at once.
        Downloads into the old ones fail. Raise as the constructor, or `FetchError`.
        """
        with self._restoring, translate_errors("look for its folders"):
            try:
                if not self._root.is_named(self.path):
                    self._root.become(_private_folder(self.path))
                for name, folder in self._folders.items():
                    if not folder.is_named(name, within=self._root):
                        folder.become(_private_folder(name, self._root))
            except ConfigError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise error.__cause__ from None  # it is being removed at this moment
                raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude renames, removals and reservations of all threads and processes. Reentrant."""
        with self._changing, ExitStack() as held:
            if not self._is_locked:
                self._is_locked = True
                held.callback(setattr, self, "_is_locked", False)
                # Without the folder, or where nothing can be written, there is nothing to protect.
                with suppress(FileNotFoundError), suppress_read_only():
                    fd = self._root.file(_LOCK_FILE, os.O_RDWR | os.O_CREAT)
                    held.callback(close_lock, fd)
                    until, pause = monotonic() + LOCK_SECONDS, Event()
                    while (granted := try_lock(fd)) is False and monotonic() < until:
                        pause.wait(_POLL_SECONDS)
                    self.has_locks = granted is not None
            yield

    def hold(self, name: str) -> None:
        """Count a use of an entry or partial by this process: locks may not work."""
        with self.holding:
            self._held[name] += 1

    def release(self, name: str) -> None:
        with self.holding:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    def held(self) -> frozenset[str]:
        """Return the names of what this process uses. Atomic, with or without `holding`."""
        return frozenset(self._held)

    def hide(self, folder: Folder, name: str) -> str | None:
        """Move a name into the trash, atomically; return its name there, None if it was gone."""
        serial = unique()
        with suppress(FileNotFoundError):
            os.rename(name, serial, src_dir_fd=folder.fd, dst_dir_fd=self.trash.fd)
            return serial
        return None

    def remove(self, folder: Folder, name: str) -> bool:
        """Hide a name from everyone, then remove it; False if it was gone."""
        hidden = self.hide(folder, name)
        if hidden is not None:
            self.trash.remove_tree(hidden)
        return hidden is not None

    def empty_trash(self) -> None:
        """Remove what killed processes were removing, and what others are removing now."""
        for name in self.trash.names():
            self.trash.remove_tree(name)

    def remove_former(self) -> None:
        """Remove the folder of locks that former versions used."""
        self._root.remove_tree("locks")

    def close(self) -> None:
        self._opened.close()


@contextmanager
def suppress_read_only() -> Iterator[None]:
    """Do without a change where the file system is read-only: entries are as good there."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def _private_folder(name: str | os.PathLike[str], within: Folder | None = None) -> Folder:
    """Open a folder, made if it is missing. Raise `ConfigError` if it is not this user's alone.

    The root's path is the operator's, so links in it are followed; inside, a link is refused.
    """
    own = "" if within is None else "own "
    label = f"the disk cache's {own}folder {shorten(os.fspath(name), 500)!r}"
    try:
        with suppress(FileExistsError):
            if within is None:
                os.makedirs(name, 0o700)
            else:
                os.mkdir(name, 0o700, dir_fd=within.fd)
        if within is None:
            folder = Folder(os.open(name, _OPEN_FOLDER))
        else:
            folder = within.subfolder(os.fspath(name))
        try:
            status = os.fstat(folder.fd)
            if status.st_uid != os.geteuid():
                raise ConfigError(f"{label} belongs to another user; give one of your own")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(f"others may write to {label}; chmod 700 it, or give another")
        except BaseException:
            folder.close()
            raise
    except OSError as error:
        raise ConfigError(f"{label} cannot be opened: {error.strerror}") from error
    return folder
