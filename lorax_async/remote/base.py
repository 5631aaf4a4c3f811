"""The interface of a backend: the hub, a kind of object store, folders behind URLs."""

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
"""Prefix of a version that describes the files without naming their bytes."""


class AnotherVersionError(AdapterNotFoundError):
    """The caller may have the adapter, but the source has another version than the pinned one."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter, as its source describes it.

    Attributes
    ----------
    target
        Its URL, with the headers that a request needs.
    nbytes, expected, etag
        Its size, digest and strong ETag (with its quotes), where the source names them.
    answer
        The result of its probe, if the version was learnt by one.
    """

    role: FileRole
    target: Target
    nbytes: int | None = None
    expected: Digest | None = None
    etag: str | None = field(default=None, repr=False)
    answer: ProbeResult | None = field(default=None, repr=False)

    def require_match(self, answer: ProbeResult) -> None:
        """Raise `IntegrityError` if a probe found another size or ETag than the source named."""
        size, etag = answer.validators.size, answer.validators.etag
        if None not in {self.nbytes, size} and self.nbytes != size:
            raise IntegrityError(
                f"{self.role.file_name} has {size:,} bytes, and its source named {self.nbytes:,};"
                " it was replaced meanwhile"
            )
        if self.etag is not None and self.etag != etag:
            raise IntegrityError(f"{self.role.file_name} was replaced since it was resolved")


@dataclass(frozen=True, slots=True)
class LocatedAdapter:
    """One version of an adapter, and its files.

    Attributes
    ----------
    source
        The adapter's id without its revision, in its one spelling; no secret.
    version
        The hub's commit, or a digest of the versionIds or strong ETags of its files: equal
        versions are equal bytes.
    scope
        The authority under which the source answered: a digest of the token, "" without one.
    files
        The config, then the weights or their index; with an index, `Backend.shards` returns the
        weights.
    """

    source: str
    version: str
    scope: str
    files: tuple[RemoteFile, ...]


class Backend(Protocol):
    """Resolves the ids of one kind of source, and locates their files.

    Errors are those of `lorax_async.errors`, without id and story.
    """

    def pinned_version(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """Return source, version and scope if `ref` itself names a version, else None. Quick.

        The cache may serve such a version without a request, if the scope was granted it.
        """

    async def scope(self, ref: AdapterRef) -> str:
        """Return the authority of a request for `ref`: see `LocatedAdapter`. Send no request."""

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """Ask the source which version `ref` names now, and where its files are.

        Raise `AdapterNotFoundError` (`AnotherVersionError` if the source has only another version),
        `AccessDeniedError`, or another `FetchError`.
        """

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return the weights' files that the index of this version names."""
