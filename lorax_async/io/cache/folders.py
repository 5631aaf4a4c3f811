"""Private folders, and all that is done in them, by descriptor: no name is looked up twice."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lorax_async.errors import ConfigError, FetchError, shorten

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_OPEN = -1


class Folder:
    """A folder of ours that is open. Raises `OSError` but where it says so."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """Raises `FetchError` once it is closed: the number may be another file's by then."""
        if self._fd == _NOT_OPEN:
            raise FetchError("the disk cache was closed before it was used")
        return self._fd

    def names(self) -> list[str]:
        with self.subfolder(".") as own:  # of two who list by one descriptor, each sees a part
            return os.listdir(own.fd)

    def status(self, name: str) -> os.stat_result | None:
        """Of what has that name, which may be a link; None if nothing has."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def subfolder(self, name: str) -> Folder:
        return Folder(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.fd))

    def make_subfolder(self, name: str) -> Folder:
        os.mkdir(name, 0o700, dir_fd=self.fd)
        return self.subfolder(name)

    def file(self, name: str, flags: int) -> int:
        """A descriptor of a file; made with `O_CREAT` it is its owner's alone."""
        always = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags | always, 0o600, dir_fd=self.fd)

    def write(self, name: str, content: bytes) -> None:
        """A new file, on the disk when this returns."""
        fd = self.file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            while content:
                content = content[os.write(fd, content) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, name: str, max_bytes: int) -> bytes:
        """What is in a regular file, up to `max_bytes` + 1 of it."""
        fd = self.file(name, os.O_RDONLY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise IsADirectoryError(f"{name} is no regular file")
            pieces = []
            room = max_bytes + 1
            while room and (piece := os.read(fd, room)):
                pieces.append(piece)
                room -= len(piece)
            return b"".join(pieces)
        finally:
            os.close(fd)

    def unlink(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

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
        """Names in here are on the disk when this returns."""
        os.fsync(self.fd)

    def close(self) -> None:
        fd, self._fd = self._fd, _NOT_OPEN
        if fd != _NOT_OPEN:
            os.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd != _NOT_OPEN:
            warnings.warn("unclosed folder of a disk cache", ResourceWarning, stacklevel=2)
            self.close()


def private_root(path: str | os.PathLike[str]) -> Folder:
    """The folder at `path`, made if it is not there. Raises `ConfigError` if it is not ours alone.

    `path` is the operator's word: a link there is followed.
    """
    with _config_errors(f"the disk cache's folder {shorten(os.fspath(path), 500)!r}") as said:
        with suppress(FileExistsError):
            os.makedirs(path, 0o700)
        return _private(Folder(os.open(path, _FOLDER)), said)


def private_subfolder(root: Folder, name: str) -> Folder:
    """As `private_root`, inside of it; a link is refused."""
    with _config_errors(f"the disk cache's own folder {name!r}") as said:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=root.fd)
        return _private(root.subfolder(name), said)


@contextmanager
def _config_errors(said: str) -> Iterator[str]:
    try:
        yield said
    except OSError as error:
        raise ConfigError(f"{said} cannot be opened: {error.strerror}") from error


def _private(folder: Folder, said: str) -> Folder:
    try:
        status = os.fstat(folder.fd)
        if status.st_uid != os.geteuid():
            raise ConfigError(f"{said} belongs to another user; give one of your own")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(f"others may write to {said}; chmod 700 it, or give another")
    except BaseException:
        folder.close()
        raise
    return folder


def remove_tree(name: str, within: Folder) -> None:
    """Remove what has that name, with all that is in it; others may be at it as well.

    A link is removed, and what it leads to is left alone.
    """
    with suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=within.fd)
        except IsADirectoryError:
            with within.subfolder(name) as folder:
                for each in folder.names():
                    remove_tree(each, folder)
            os.rmdir(name, dir_fd=within.fd)
