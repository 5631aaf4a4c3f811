"""Where the standard hub cache has the files of a commit, and which files these are. Blocks.

    models--org--name/snapshots/COMMIT/adapter_config.json -> ../../blobs/ETAG
    models--org--name/blobs/ETAG    a file, or a link to ../../blobs/XX/HASH, shared by repositories
    models--org--name/refs/main     COMMIT

No link in a repository is followed: what it says must be of this form, and is then opened step by
step. So nothing outside of the cache's blobs is ever read, whoever wrote the links.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from lorax_async.adapter import FileIdentity
from lorax_async.core.cache_names import FileRole
from lorax_async.core.cache_record import FileRecord
from lorax_async.core.file_digest import Digest, FileHash
from lorax_async.core.hub_names import adapter_files, digest_of_blob, is_commit
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.hashing import hash_on
from lorax_async.io.sources.checked_open import changed, code_of, identity_of, translated

_ABSENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    errno.EINVAL,  # of reading a link that is none
    *(errno.EACCES, errno.EPERM),  # what this process may not read is as good as not there
}
_COMMIT_BYTES = 40
_LINK = re.compile(r"\.\./\.\./blobs/(?P<blob>[0-9a-z-]{40,80})")
_SHARED = re.compile(r"\.\./\.\./blobs/(?P<first>[0-9a-f]{2})/(?P<blob>(?P=first)[0-9a-f]{62})")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit. Its bytes are `name` in `folders`, which lead there from the cache's."""

    role: FileRole
    digest: Digest
    folders: tuple[str, ...]
    name: str
    identity: FileIdentity

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.role, self.identity.size, self.identity.mtime_ns, self.digest)


@contextmanager
def entered(path: str, folders: Sequence[str] = ()) -> Iterator[Folder]:
    """The cache's folder, then one after the other, none of them through a link at its end.

    Raises `OSError`.
    """
    with ExitStack() as opened:
        folder = opened.enter_context(
            Folder(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        )
        for name in folders:
            folder = opened.enter_context(folder.subfolder(name))
        yield folder


def blobs_of(repo: str) -> tuple[str, ...]:
    # The operator may have put a repository elsewhere; that link is his.
    return (f"{repo}/blobs",)


def snapshot_of(repo: str, commit: str) -> tuple[str, ...]:
    return (f"{repo}/snapshots", commit)


def files_of(path: str, repo: str, commit: str) -> tuple[HubFile, ...]:
    """All files of the adapter in a commit; none if one is not here, or is not as it should be.

    Raises `FetchError` if the cache cannot be read.
    """
    try:
        with entered(path, snapshot_of(repo, commit)) as snapshot:
            roles = adapter_files(snapshot.names())
            found = [_linked(path, repo, snapshot, role, name) for role, name in roles.items()]
    except OSError as error:
        _require_absent(error)
        return ()
    whole = tuple(file for file in found if file is not None)
    return whole if len(whole) == len(found) else ()


def blob_file(path: str, repo: str, role: FileRole, name: str) -> HubFile | None:
    """The blob of that name as a file of an adapter. Raises `FetchError`."""
    digest = digest_of_blob(name)
    if digest is None:
        return None
    try:
        place = _place_of(path, repo, name)
        status = None if place is None else _status(path, *place)
    except OSError as error:
        _require_absent(error)
        return None
    if place is None or status is None or not stat.S_ISREG(status.st_mode):
        return None
    return HubFile(role, digest, *place, identity_of(status))


def open_same(path: str, file: HubFile) -> int:
    """A descriptor to read it with, if it still is that file.

    Raises `IntegrityError` if not, and what `translated` makes of other failures.
    """
    name = file.role.file_name
    try:
        fd = _opened(path, file.folders, file.name)
        try:
            if identity_of(os.fstat(fd)) != file.identity:
                raise changed(name)
        except BaseException:
            os.close(fd)
            raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise changed(name) from error
    except OSError as error:
        raise translated(error, name) from error
    return fd


def is_right(path: str, file: HubFile) -> bool:
    """Has it the digest that its name promises? Reads all of it."""
    try:
        fd = open_same(path, file)
        try:
            found = FileHash(file.digest.kind, file.identity.size)
            hash_on(fd, found, file.identity.size, file.role.file_name)
        finally:
            os.close(fd)
    except IntegrityError:
        return False
    except OSError as error:
        raise translated(error, file.role.file_name) from error
    return found.digest() == file.digest


def commit_of(path: str, repo: str, revision: Sequence[str]) -> str | None:
    """Which commit a revision meant when somebody looked last. Raises `FetchError`."""
    *folders, name = revision
    try:
        with entered(path, (f"{repo}/refs", *folders)) as refs:
            text = refs.read(name, _COMMIT_BYTES).decode("ascii", "replace")
    except OSError as error:
        _require_absent(error)
        return None
    return text if is_commit(text) else None


def _place_of(path: str, repo: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """The folders and the name of a blob; None for a link that is not of the cache."""
    folders = blobs_of(repo)
    with entered(path, folders) as blobs:
        status = blobs.status(name)
        if status is None or not stat.S_ISLNK(status.st_mode):
            return folders, name
        shared = _SHARED.fullmatch(os.readlink(name, dir_fd=blobs.fd))
    return None if shared is None else (("blobs", shared["first"]), shared["blob"])


def _status(path: str, folders: Sequence[str], name: str) -> os.stat_result:
    """Of a file that this process may read."""
    fd = _opened(path, folders, name)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _linked(path: str, repo: str, snapshot: Folder, role: FileRole, name: str) -> HubFile | None:
    link = _LINK.fullmatch(os.readlink(name, dir_fd=snapshot.fd))
    return None if link is None else blob_file(path, repo, role, link["blob"])


def _opened(path: str, folders: Sequence[str], name: str) -> int:
    with entered(path, folders) as folder:
        return folder.file(name, os.O_RDONLY)


def _require_absent(error: OSError) -> None:
    """Raises `FetchError` if it says more than that something is not there."""
    if error.errno not in _ABSENT and not isinstance(error, IsADirectoryError):
        raise FetchError(f"the hub cache cannot be read ({code_of(error)})") from error
