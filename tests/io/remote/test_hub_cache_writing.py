"""What is stored in the standard hub cache is found by huggingface_hub itself, as its own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_inputs import put
from counted_calls import Calls
from hub_cache_world import (
    KEY,
    ROLES,
    SPLIT,
    begun,
    by_the_library,
    contents,
    digest_of,
    hub_cache,
    stored,
    tree,
)
from hub_stand_in import HubStandIn
from hub_world import ADAPTER, CONFIG, REPO, WEIGHTS
from huggingface_hub import (
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from source_inputs import read

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.errors import ConfigError, IntegrityError, InternalError
from lorax_async.io.remote.hub_cache import HubCache

pytestmark = pytest.mark.usefixtures("nothing_left")

NAME = "adapter_model.safetensors"
LARGE = bytes(range(256)) * 3 * 1024 + b"end"  # more than three chunks of the map


@pytest.fixture
def cache(hub_client: Path) -> Iterator[HubCache]:
    with hub_cache(hub_client, write=True) as cache:
        yield cache


@pytest.mark.parametrize("files", [ADAPTER, SPLIT], ids=["one file", "several files"])
@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1"])
def test_other_tools_find_it(
    cache: HubCache, hub_client: Path, files: dict[str, bytes], revision: str
) -> None:
    """Without a network, by branch and by commit; and the cache's own inventory is in order."""
    with HubStandIn() as hub:
        commit = hub.put(REPO, files, revision)
        key = CacheKey(REPO, commit)
        cache.note_revision(REPO, revision, commit)
        assert contents(stored(cache, key, files)) == files
        for name, content in files.items():
            for at in (revision, commit):
                path = hf_hub_download(REPO, name, revision=at, local_files_only=True)
                assert Path(path).read_bytes() == content
                assert try_to_load_from_cache(REPO, name, revision=at) == path
        folder = Path(snapshot_download(REPO, revision=revision, local_files_only=True))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        # Nor does it fetch anything once there is a network.
        for name in files:
            hf_hub_download(REPO, name, revision=revision, endpoint=hub.endpoint)
        assert not hub.asked_for("GET")
    inventory = scan_cache_dir(hub_client)
    assert inventory.warnings == []
    assert not inventory.incomplete_files
    (repo,) = inventory.repos
    (found,) = repo.revisions
    assert (repo.repo_id, found.commit_hash, *found.refs) == (REPO, commit, revision)
    assert found.size_on_disk == sum(map(len, files.values()))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("files", [ADAPTER, SPLIT], ids=["one file", "several files"])
def test_it_lies_as_the_library_lays_it(
    tmp_path: Path, hub_client: Path, files: dict[str, bytes], umask: int
) -> None:
    """The same links, names, contents and modes, byte for byte; but for the library's listing."""
    before = os.umask(umask)
    try:
        with hub_cache(hub_client, write=True) as cache:
            key = by_the_library(tmp_path / "theirs", files, "refs/pr/1")
            cache.note_revision(REPO, "refs/pr/1", key.version)
            stored(cache, key, files)
    finally:
        os.umask(before)
    theirs = tree(tmp_path / "theirs")
    assert tree(hub_client) == {name: what for name, what in theirs.items() if "/trees" not in name}


def test_a_download_is_nobody_elses_business(cache: HubCache, hub_client: Path) -> None:
    """Until it is whole other tools see nothing of it, and nobody else may read it."""
    download = begun(cache, KEY)
    put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
    weights = download.file(WEIGHTS_FILE, len(LARGE))
    put(weights, LARGE, [(0, 1_000)])
    assert cache.used() == len(CONFIG) + len(LARGE)
    assert cache.open(KEY) is None
    inventory = scan_cache_dir(hub_client)
    assert (inventory.warnings, inventory.repos) == ([], frozenset())
    assert not inventory.incomplete_files
    for path in (hub_client / ".locks").rglob("*"):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
    download.discard()
    assert cache.used() == 0
    assert [path.name for path in hub_client.iterdir()] == [".locks"]


def test_readers_of_a_download_go_on_after_it(cache: HubCache) -> None:
    download = begun(cache, KEY)
    put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
    weights = download.file(WEIGHTS_FILE, len(WEIGHTS))
    reader = weights.reader()
    put(weights, WEIGHTS, [(0, len(WEIGHTS))])
    assert weights.hash_along() == len(WEIGHTS)
    entry = download.publish()
    assert not entry.mappable
    assert not download.mappable
    assert read(reader, 0, len(WEIGHTS)) == WEIGHTS
    reader.close()


def test_it_goes_on_where_it_was_left(cache: HubCache) -> None:
    files = {**ADAPTER, NAME: LARGE}
    download = begun(cache, KEY)
    put(
        download.file(WEIGHTS_FILE, len(LARGE)),
        LARGE,
        [(0, CHUNK_BYTES), (2 * CHUNK_BYTES, len(LARGE))],
    )
    download.close()
    download = begun(cache, KEY)
    config, weights = (
        download.file(CONFIG_FILE, len(CONFIG)),
        download.file(WEIGHTS_FILE, len(LARGE)),
    )
    assert weights.missing() == [(CHUNK_BYTES, 2 * CHUNK_BYTES)]
    put(config, CONFIG, config.missing())
    put(weights, LARGE, weights.missing())
    assert contents(download.publish()) == files


@pytest.mark.parametrize("by_library", [False, True])
def test_what_a_commit_shares_with_another_is_not_fetched(
    cache: HubCache, hub_client: Path, by_library: bool
) -> None:
    if by_library:
        by_the_library(hub_client, ADAPTER)
    else:
        stored(cache)
    before = {
        path.name: path.stat().st_ino for path in (hub_client / "models--org--name/blobs").iterdir()
    }
    download = begun(cache, CacheKey(REPO, "d" * 40))
    config = download.file(CONFIG_FILE, 2, digest_of("adapter_config.json", b"{}"))
    put(config, b"{}", config.missing())
    weights = download.file(WEIGHTS_FILE, len(WEIGHTS), digest_of(NAME, WEIGHTS))
    assert (weights.missing(), weights.missing(5, 9)) == ([], [])
    assert weights.hash_along() == weights.nbytes == len(WEIGHTS)
    with pytest.raises(InternalError, match="twice"):
        download.file(WEIGHTS_FILE, len(WEIGHTS))
    weights.ends_at(len(WEIGHTS))
    put(weights, WEIGHTS, [(0, len(WEIGHTS))])
    with pytest.raises(IntegrityError, match="said to have 3 bytes"):
        weights.ends_at(3)
    with pytest.raises(IntegrityError, match=f"goes on after its {len(WEIGHTS):,}"):
        put(weights, WEIGHTS + b"x", [(0, len(WEIGHTS) + 1)])
    reader = weights.reader()
    assert read(reader, 9, 99) == WEIGHTS[9:99]
    reader.close()
    assert contents(download.publish()) == {"adapter_config.json": b"{}", NAME: WEIGHTS}
    after = {
        path.name: path.stat().st_ino for path in (hub_client / "models--org--name/blobs").iterdir()
    }
    assert after.items() > before.items()
    assert len(after) == len(before) + 1
    assert scan_cache_dir(hub_client).warnings == []


def test_all_is_on_the_disk_before_it_is_linked(
    cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, then blobs by their names, then links, and that too; the config's is the last."""
    download = begun(cache, KEY)
    for name, content in ADAPTER.items():
        put(download.file(ROLES[name], len(content)), content, [(0, len(content))])
    replace, named = os.replace, list[str]()

    def noted(new: str, name: str, **folders: int) -> None:
        replace(new, name, **folders)
        named.append(name)

    monkeypatch.setattr(os, "replace", noted)
    calls = Calls(("fsync", "symlink", "replace"))
    with calls.counted():
        download.publish()
    assert named[-2:] == [NAME, "adapter_config.json"]
    made = [name for name in calls.made if name != "flock"]
    blobs, links = ["replace"] * 2, ["symlink", "replace"] * 2
    assert made[:9] == [*["fsync"] * 2, *blobs, "fsync", *links]
    assert made[9] == "fsync"


def test_a_source_that_contradicts_itself(cache: HubCache) -> None:
    """The digest is that of a blob, and the size another: the blob is not taken for it."""
    stored(cache)
    download = begun(cache, CacheKey(REPO, "d" * 40))
    size = len(WEIGHTS) - 1
    weights = download.file(WEIGHTS_FILE, size, digest_of(NAME, WEIGHTS))
    assert weights.missing() == [(0, size)]
    download.discard()


def test_a_blob_with_other_bytes_is_replaced(cache: HubCache, hub_client: Path) -> None:
    """huggingface_hub checks a size at most: what it left there is not taken on trust."""
    key = by_the_library(hub_client, ADAPTER)
    blob = Path(hf_hub_download(REPO, NAME, local_files_only=True)).resolve()
    blob.write_bytes(WEIGHTS[::-1])
    assert cache.open(key, check=True) is None
    entry = stored(cache, key)
    assert contents(entry) == ADAPTER
    assert blob.read_bytes() == WEIGHTS
    assert cache.open(key, check=True) is not None


def test_a_link_that_led_elsewhere_is_replaced(cache: HubCache, hub_client: Path) -> None:
    snapshot = hub_client / "models--org--name" / "snapshots" / KEY.version
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").symlink_to("../../../../secret")
    (snapshot / NAME).write_bytes(b"old")
    assert contents(stored(cache)) == ADAPTER
    assert os.readlink(snapshot / NAME).startswith("../../blobs/")


def test_a_mirror_that_promises_nothing(cache: HubCache, hub_client: Path) -> None:
    """What is stored says by its name that the digest is our own word."""
    entry = stored(cache, promised=False)
    assert {file.digest.kind for file in entry.record.files} == {"transport"}
    assert contents(cache.open(KEY, check=True)) == ADAPTER
    cache.note_revision(REPO, "main", KEY.version)
    assert Path(hf_hub_download(REPO, NAME, local_files_only=True)).read_bytes() == WEIGHTS


def test_wrong_bytes_leave_nothing(cache: HubCache, hub_client: Path) -> None:
    download = begun(cache, KEY)
    for name, content in ADAPTER.items():
        file = download.file(ROLES[name], len(content), digest_of(name, content))
        put(file, bytes(len(content)), file.missing())
    with pytest.raises(IntegrityError, match=r"digest that was promised; load it again"):
        download.publish()
    download.close()
    assert [path.name for path in hub_client.iterdir()] == [".locks"]
    assert cache.used() == 0
    assert contents(stored(cache)) == ADAPTER


def test_what_is_no_adapter_is_not_published(cache: HubCache) -> None:
    for role in (CONFIG_FILE, WEIGHTS_FILE):
        download = begun(cache, KEY)
        put(download.file(role, 1), b"x", [(0, 1)])
        with pytest.raises(InternalError, match="without config or weights"):
            download.publish()
        download.discard()
        with pytest.raises(InternalError, match="ended"):
            download.file(role, 1)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be opened"):
        HubCache(tmp_path / "hub", str, write=True)
    (tmp_path / "open" / ".locks" / f"lorax-async-{os.geteuid()}").mkdir(parents=True)
    (tmp_path / "open" / ".locks" / f"lorax-async-{os.geteuid()}").chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        HubCache(tmp_path / "open", str, write=True)


def test_what_is_forgotten_is_closed_with_a_warning(hub_client: Path) -> None:
    with pytest.warns(ResourceWarning, match="unclosed hub cache"):
        HubCache(hub_client, str, write=True).__del__()
