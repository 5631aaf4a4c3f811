"""The seam between the kinds of places that adapters come from and how their bytes come here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorax_async.errors import AdapterNotFoundError, IntegrityError
from lorax_async.formats.digests import Digest
from lorax_async.formats.split_weights import FileRole
from lorax_async.http.target import ProbeResult, Target
from lorax_async.types import AdapterRef

WEAK = "weak-"
"""A version that begins so does not name the bytes, but what could be learnt of them."""


class AnotherVersionError(AdapterNotFoundError):
    """The source let the caller have it, and has another version by now than the pinned one."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter, as its source tells of it.

    Attributes
    ----------
    target
        Where it is asked for, with what that takes.
    nbytes, expected, etag
        Its size, digest and strong ETag (in quotes, as the field has it), where the source says so
        without being asked for bytes.
    answer
        What came of asking for its beginning, where that was how to learn its version.
    """

    role: FileRole
    target: Target
    nbytes: int | None = None
    expected: Digest | None = None
    etag: str | None = field(default=None, repr=False)
    answer: ProbeResult | None = field(default=None, repr=False)

    def checked(self, answer: ProbeResult) -> ProbeResult:
        """The first answer, if it is about the file that the source told of.

        Raises `IntegrityError` if size or ETag are another's.
        """
        size, etag = answer.validators.size, answer.validators.etag
        if None not in {self.nbytes, size} and self.nbytes != size:
            raise IntegrityError(
                f"{self.role.file_name} has {size:,} bytes, and its source said {self.nbytes:,};"
                " it was replaced meanwhile"
            )
        if self.etag is not None and self.etag != etag:
            raise IntegrityError(f"{self.role.file_name} was replaced since its version was told")
        return answer


@dataclass(frozen=True, slots=True)
class LocatedAdapter:
    """One version of an adapter, and its files.

    Attributes
    ----------
    source
        The adapter's id without its revision, in the one form it is known by: no secret.
    version
        The hub's commit, or what the versionIds or strong ETags of its files come to: equal
        versions are equal bytes.
    scope
        On whose authority the source has told so: a digest of the token, "" if there was none.
    files
        The config, then the weights, or else their index (then `Backend.shards` has the rest).
    """

    source: str
    version: str
    scope: str
    files: tuple[RemoteFile, ...]


class Backend(Protocol):
    """Knows one kind of place: the hub, one kind of object store, folders behind URLs.

    Errors are those of `lorax_async.errors`, without id and story.
    """

    def recalled(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """Source, version and scope, where `ref` alone says which version it is; quick.

        Then the files may come from the cache without asking anybody, if that scope was let have
        them. None: the source has to be asked.
        """

    async def scope(self, ref: AdapterRef) -> str:
        """On whose authority the source would be asked; asks nobody."""

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """Ask the source which version `ref` names now, and for its files.

        Raises `AdapterNotFoundError` (`AnotherVersionError`, where the present one could be had),
        `AccessDeniedError`, or another `FetchError`.
        """

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """The files of weights that an index names, of the same version."""
