"""Putting files where every tool that knows the standard hub cache finds them. Blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from lorax_async.core.cache_names import FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.core.hub_names import blob_name, hub_file_name
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.place import unique
from lorax_async.io.remote.hub_layout import (
    HubFile,
    blob_file,
    blobs_of,
    entered,
    is_right,
    snapshot_of,
)

_ATTEMPTS = 5


class Shelf:
    """One commit of a repository in the cache at `path`; made where it is not there."""

    def __init__(self, path: str, repo: str, commit: str) -> None:
        self.path = path
        self._repo = repo
        self._commit = commit

    def blob(self, role: FileRole, digest: Digest) -> HubFile | None:
        """The file with this digest, if there is one and its bytes are right. Reads all of it."""
        found = blob_file(self.path, self._repo, role, blob_name(digest))
        return found if found is not None and is_right(self.path, found) else None

    def put(self, here: Folder, digests: Mapping[FileRole, Digest]) -> None:
        """Let an adapter's files be in the commit; those that are no blobs yet come from `here`.

        The config is linked last: without it nobody takes the rest for an adapter. Raises `OSError`
        and what `blob` does.
        """
        for name in ("", "blobs", "snapshots", f"snapshots/{self._commit}"):
            with suppress(FileExistsError):
                os.mkdir(os.path.join(self.path, self._repo, name))
        with entered(self.path, blobs_of(self._repo)) as blobs:
            for role, digest in digests.items():
                name = role.file_name
                if here.status(name) is None:
                    continue  # it was a blob already
                if self.blob(role, digest) is None:
                    _move(here, name, blobs, blob_name(digest))
                else:
                    here.unlink(name)  # another tool was faster, and its readers have that open
            blobs.sync()
        count = sum(role.number > 0 for role in digests)
        with entered(self.path, snapshot_of(self._repo, self._commit)) as snapshot:
            for role, digest in sorted(digests.items(), reverse=True):
                _link(
                    here, snapshot, hub_file_name(role, count), f"../../blobs/{blob_name(digest)}"
                )
            snapshot.sync()


def write_ref(path: str, repo: str, revision: str, commit: str, scratch: Folder) -> None:
    """Let a branch or tag mean this commit, for tools that cannot ask. Raises `OSError`.

    Nobody minds what a kill leaves in `scratch`, which others may remove at any time.
    """
    *folders, name = ("refs", *revision.split("/"))
    # Where git once had a branch a, and now has a/b, the cache may have either.
    with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
        os.makedirs(os.path.join(path, repo, *folders), exist_ok=True)
        with entered(path, (os.path.join(repo, *folders),)) as refs:
            for _ in range(_ATTEMPTS):
                with suppress(FileNotFoundError):
                    new = unique()
                    _write(scratch, new, commit.encode())
                    os.replace(new, name, src_dir_fd=scratch.fd, dst_dir_fd=refs.fd)
                    return


def _move(here: Folder, name: str, blobs: Folder, blob: str) -> None:
    fd = here.file(name, os.O_RDONLY)
    try:
        os.fchmod(fd, _mode(here))
    finally:
        os.close(fd)
    os.replace(name, blob, src_dir_fd=here.fd, dst_dir_fd=blobs.fd)


def _mode(folder: Folder) -> int:
    """What new files of this process are allowed; there is no other way to ask in a thread."""
    probe = unique()
    _write(folder, probe, b"")
    try:
        return os.stat(probe, dir_fd=folder.fd).st_mode & 0o777
    finally:
        folder.unlink(probe)


def _link(here: Folder, snapshot: Folder, name: str, target: str) -> None:
    """At once, also where another link was."""
    new = unique()
    os.symlink(target, new, dir_fd=here.fd)
    os.replace(new, name, src_dir_fd=here.fd, dst_dir_fd=snapshot.fd)


def _write(folder: Folder, name: str, content: bytes) -> None:
    """A new file, as others may see it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(name, flags, 0o666, dir_fd=folder.fd)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
