"""The standard hub cache in a folder, what huggingface_hub puts there, and what is in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from cache_inputs import content_of, put
from hub_stand_in import HubStandIn, git_sha1, is_large
from hub_world import ADAPTER, REPO
from huggingface_hub import snapshot_download

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.io.cache.ports import Cache, CacheDownload, CacheEntry
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import HubCache

COMMIT = "c0ffee" + 34 * "0"
KEY = CacheKey(REPO, COMMIT)
INDEX = "adapter_model.safetensors.index.json"
SHARDS = {f"adapter_model-{k:05d}-of-00002.safetensors": bytes([k]) * k * 100 for k in (1, 2)}
SPLIT = {"adapter_config.json": b"{}", INDEX: b'{"weight_map": {}}', **SHARDS}
ROLES = {
    "adapter_config.json": CONFIG_FILE,
    "adapter_model.safetensors": WEIGHTS_FILE,
    INDEX: FileRole("index"),
    **{name: FileRole("weights", k) for k, name in enumerate(SHARDS, 1)},
}


@contextmanager
def hub_cache(
    folder: Path, *, write: bool = False, private: bool = False, own: str = ""
) -> Iterator[HubCache]:
    cache = HubCache(folder, lambda: own, write=write, private=private)
    try:
        yield cache
    finally:
        cache.close()


def by_the_library(folder: Path, files: Mapping[str, bytes], revision: str = "main") -> CacheKey:
    """Let huggingface_hub download a commit; its key."""
    with HubStandIn() as hub:
        commit = hub.put(REPO, files, revision)
        snapshot_download(REPO, revision=revision, cache_dir=folder, endpoint=hub.endpoint)
    return CacheKey(REPO, commit)


def digest_of(name: str, content: bytes) -> Digest:
    """As the hub names it."""
    if is_large(name):
        return Digest("sha256", sha256(content).hexdigest())
    return Digest("git-sha1", git_sha1(content))


def begun(cache: Cache, key: CacheKey, scope: str = "") -> CacheDownload:
    found = cache.begin(key, scope, Demand())
    assert not isinstance(found, CacheEntry), "there is an entry already"
    return found


def stored(
    cache: Cache,
    key: CacheKey = KEY,
    files: Mapping[str, bytes] = ADAPTER,
    scope: str = "",
) -> CacheEntry:
    """Download it as a whole."""
    download = begun(cache, key, scope)
    try:
        for name, content in files.items():
            file = download.file(ROLES[name], len(content), digest_of(name, content))
            put(file, content, file.missing())
        return download.publish()
    finally:
        download.close()


def contents(entry: CacheEntry | None) -> dict[str, bytes]:
    assert entry is not None
    names = {role: name for name, role in ROLES.items()}
    return {names[file.role]: content_of(entry, file.role) for file in entry.record.files}


def tree(folder: Path, below: str = "models--org--name") -> dict[str, tuple[str, object]]:
    """Everything in there: what links say, what files hold, and who may have them."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted((folder / below).rglob("*")):
        status = path.lstat()
        name, mode = str(path.relative_to(folder)), oct(stat.S_IMODE(status.st_mode))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = (mode, None)
        else:
            found[name] = (mode, path.read_bytes())
    return found
