"""The hub's names: of repositories, commits, files and blobs, and what its ETags mean."""

from __future__ import annotations

import re

from lorax_async.core.cache_names import FileRole
from lorax_async.core.file_digest import Digest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION_PART = re.compile(r"(?!\.{1,2}$)[^/\x00-\x20\x7f\\]{1,255}")
_SHARD = re.compile(r"adapter_model-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
_OURS = "transport-"

MAX_REVISION = 1_024


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Can a branch, a tag or a commit have this name? Then it also is a path that leads nowhere."""
    parts = text.split("/")
    return len(text) <= MAX_REVISION and all(_REVISION_PART.fullmatch(part) for part in parts)


def hub_file_name(role: FileRole, count: int = 0) -> str:
    """What the hub calls an adapter's file; a shard of weights is one of `count`."""
    if not role.number:
        return role.file_name
    return f"adapter_model-{role.number:05d}-of-{count:05d}.safetensors"


def shard_of(name: str) -> tuple[int, int] | None:
    """Which shard has that name, and of how many; None if it is none."""
    found = _SHARD.fullmatch(name)
    return None if found is None else (int(found["number"]), int(found["count"]))


def digest_of_etag(etag: str | None) -> Digest | None:
    """What an ETag of the hub, without its quotes, says of the bytes.

    For large files it is their sha256, for others git's name of the content; what is neither comes
    from a mirror, and says nothing.
    """
    if etag is not None and _SHA256.fullmatch(etag):
        return Digest("sha256", etag)
    if etag is not None and _COMMIT.fullmatch(etag):
        return Digest("git-sha1", etag)
    return None


def repo_folder(source: str) -> str | None:
    """The folder of a repository in the standard hub cache; None if `source` is not org/name."""
    if not _REPO.fullmatch(source) or "--" in source or ".." in source:
        return None
    return f"models--{source.replace('/', '--')}"


def blob_name(digest: Digest) -> str:
    """The name of a file in `blobs/`: its ETag, or if it has none its digest as our own word."""
    return digest.value if digest.kind != "transport" else f"{_OURS}{digest.value}"


def digest_of_blob(name: str) -> Digest | None:
    """What the bytes of a blob come to, by its name; None if the name does not say it."""
    ours = name.removeprefix(_OURS)
    if ours != name:
        return Digest("transport", ours) if _SHA256.fullmatch(ours) else None
    return digest_of_etag(name)
