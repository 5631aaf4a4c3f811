"""The hub's names: of repositories, commits, files and blobs, and what its ETags mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.core.split_index import split_name

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION_PART = re.compile(r"(?!\.{1,2}$)[^/\x00-\x20\x7f\\]{1,255}")
_SHARD = re.compile(r"adapter_model-[0-9]{5}-of-(?P<count>[0-9]{5})\.safetensors")
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
    return split_name(role.number, count) if role.number else role.file_name


def adapter_files(names: Iterable[str]) -> dict[FileRole, str]:
    """Which of a commit's files are those of its adapter; none if it is not whole.

    The config comes first, then the weights, or else their index and all files that it may name.
    """
    there = set(names)
    weights = [role for role in (WEIGHTS_FILE, INDEX_FILE) if role.file_name in there]
    if CONFIG_FILE.file_name not in there or not weights:
        return {}
    found = {role: role.file_name for role in (CONFIG_FILE, weights[0])}
    return found if weights[0] == WEIGHTS_FILE else _with_shards(found, there)


def _with_shards(found: dict[FileRole, str], there: set[str]) -> dict[FileRole, str]:
    counts = {int(shard["count"]) for shard in map(_SHARD.fullmatch, there) if shard is not None}
    for number in range(1, max(counts, default=0) + 1):
        found[FileRole("weights", number)] = split_name(number, max(counts))
    return found if len(counts) == 1 and there.issuperset(found.values()) else {}


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
