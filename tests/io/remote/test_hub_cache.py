"""The standard hub cache: what other tools have stored is used, and nothing beside it; and storing there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from cache_inputs import put
from counted_calls import Calls
from hub_cache_world import (
    COMMIT,
    KEY,
    ROLES,
    SHARDS,
    SPLIT,
    begun,
    by_the_library,
    contents,
    digest_of,
    hub_cache,
    stored,
    tree,
)
from hub_world import ADAPTER, REPO, WEIGHTS
from source_inputs import read

from adapters import hub_cache as by_hand
from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.policies import policy
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.ports import Cache, CacheEntry
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import HubCache, standard_folder
from lorax_async.io.remote.hub_first import HubFirst
from lorax_async.io.remote.questions import question_of

pytestmark = pytest.mark.usefixtures("nothing_left")


def disk_cache(folder: Path) -> DiskCache:
    return DiskCache(folder / "disk", 1 << 30, policy("lru"))


NAME = "adapter_model.safetensors"


@pytest.mark.parametrize("files", [ADAPTER, SPLIT], ids=["one file", "several files"])
def test_what_huggingface_hub_stored_is_found(hub_client: Path, files: dict[str, bytes]) -> None:
    key = by_the_library(hub_client, {**files, "README.md": b"not for us"})
    before = tree(hub_client, "")
    with hub_cache(hub_client) as cache:
        port: Cache = cache
        for check in (False, True):
            entry = port.open(key, check=check)
            assert contents(entry) == files
            assert entry is not None
            found = {file.role: file.digest for file in entry.record.files}
            assert list(found.values()) == [digest_of(*file) for file in files.items()]
            assert (entry.record.source, entry.record.version) == (REPO, key.version)
            assert not entry.mappable, "others may change it"
            with pytest.raises(InternalError, match="00009"):
                entry.reader(FileRole("weights", 9))
            entry.close()
        assert port.used() == 0
        assert not port.remove(key), "it is not ours to remove"
    assert tree(hub_client, "") == before


def test_where_there_is_nothing(tmp_path: Path, hub_client: Path) -> None:
    with hub_cache(tmp_path / "no folder") as cache:
        assert cache.open(KEY) is None
        assert cache.commit_of(REPO, "main") is None
        assert cache.remove(KEY)
    assert not (tmp_path / "no folder").exists()
    assert standard_folder() == str(hub_client)


@pytest.mark.parametrize(
    "key",
    [
        CacheKey("s3://bucket/name", COMMIT),
        CacheKey(REPO, "main"),
        CacheKey(REPO, COMMIT.upper()),
        CacheKey("../name", COMMIT),
        CacheKey("org/name/..", COMMIT),
        CacheKey("a--b/c", COMMIT),
    ],
)
def test_keys_of_other_kinds(tmp_path: Path, key: CacheKey) -> None:
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    with hub_cache(tmp_path) as cache:
        assert cache.open(key) is None


def test_altered_bytes_are_noticed_and_remembered(tmp_path: Path) -> None:
    """Who asked for a check is not given them again; once they are right, they are."""
    snapshot = by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    blob = (snapshot / NAME).resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    with hub_cache(tmp_path) as cache:
        assert cache.open(KEY) is not None, "nobody looked"
        assert cache.open(KEY, check=True) is None
        assert cache.open(KEY) is None
        blob.unlink()
        blob.write_bytes(WEIGHTS)
        assert contents(cache.open(KEY)) == ADAPTER


def test_which_commit_a_revision_was(tmp_path: Path) -> None:
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT, refs=("main", "refs/pr/1", "v1.0"))
    refs = tmp_path / "models--org--name" / "refs"
    (refs / "odd").write_text("../../../etc")
    (refs / "long").write_text(COMMIT + "0")
    (refs / "bytes").write_bytes(b"\xff" * 40)
    (refs / "link").symlink_to("main")
    (tmp_path / "models--org--name" / "outside").write_text(COMMIT)
    with hub_cache(tmp_path) as cache:
        for revision in ("main", "refs/pr/1", "v1.0", COMMIT):
            assert cache.commit_of(REPO, revision) == COMMIT
        for revision in ("odd", "long", "bytes", "link", "nix", "refs", "refs/pr", "main/x"):
            assert cache.commit_of(REPO, revision) is None
        for revision in (
            "../outside",
            "refs/../../outside",
            "",
            "/",
            "a//b",
            ".",
            "x\0",
            "a" * 300,
        ):
            assert cache.commit_of(REPO, revision) is None
        assert cache.commit_of("../models--org--name", "main") is None


def test_what_other_tools_stored_is_for_this_machines_token(tmp_path: Path) -> None:
    """This machine, on whose authority other tools stored it; others when their source says so."""
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    os.utime(tmp_path / "models--org--name/blobs" / sha256(WEIGHTS).hexdigest(), (9, 9))
    config = (tmp_path / f"models--org--name/snapshots/{COMMIT}/adapter_config.json").resolve()
    os.utime(config, (time.time() - 1_000,) * 2)
    with hub_cache(tmp_path, own="own") as cache:
        entry = cache.open(KEY)
        assert entry is not None
        age = entry.granted("own")
        assert age is not None
        assert 999 < age < 2_000
        assert entry.granted("") is None
        assert entry.granted("other") is None
        entry.grant("other")
        again = cache.open(KEY)
        assert again is not None
        age = again.granted("other")
        assert age is not None
        assert 0 <= age < 60
        assert again.granted("") is None
    with hub_cache(tmp_path, own="own") as cache:
        entry = cache.open(KEY)
        assert entry is not None
        assert entry.granted("other") is None, "who only reads notes nothing in there"


def test_a_cache_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not for this process is as good as not there; a broken disk is told of."""
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT, refs=("main",))
    opening = os.open

    def failing(code: int) -> Callable[..., int]:
        def fail(path: str, *args: object, **kwargs: object) -> int:
            if "blobs" in str(path) or "refs" in str(path):
                raise OSError(code, "no")
            return opening(path, *args, **kwargs)  # type: ignore[arg-type]

        return fail

    with hub_cache(tmp_path) as cache, monkeypatch.context() as patched:
        patched.setattr(os, "open", failing(13))
        assert cache.open(KEY) is None
        assert cache.commit_of(REPO, "main") is None
        patched.setattr(os, "open", failing(5))
        with pytest.raises(FetchError, match=r"hub cache cannot be read \(EIO\)"):
            cache.open(KEY)
        with pytest.raises(FetchError, match=r"hub cache cannot be read \(EIO\)"):
            cache.commit_of(REPO, "main")


def _linked(target: str) -> Callable[[Path], None]:
    def spoil(snapshot: Path) -> None:
        (snapshot / NAME).unlink()
        (snapshot / NAME).symlink_to(target)

    return spoil


def _blob(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(snapshot: Path) -> None:
        blob = (snapshot / NAME).resolve()
        blob.unlink()
        make(blob)

    return spoil


SPOILT = {
    "a file in place of a link": lambda at: (at / NAME).unlink() or (at / NAME).write_bytes(b"x"),
    "a link to a file outside": _linked("../../../secret"),
    "an absolute link": _linked("/etc/passwd"),
    "a link out through the blobs": _linked("../../blobs/../../secret"),
    "an absolute link to the name of a blob": _linked(f"/blobs/{sha256(WEIGHTS).hexdigest()}"),
    "a link to another repository": _linked(f"../../../models--org--b/blobs/{'e' * 64}"),
    "a blob without a digest": _linked("../../blobs/adapter_model.safetensors-and-more-of-it-1234"),
    "a link to a link outside": _blob(lambda blob: blob.symlink_to("../../secret")),
    "a link to an absolute link": _blob(lambda blob: blob.symlink_to("/etc/passwd")),
    "a shared blob under another's letters": _blob(
        lambda blob: blob.symlink_to(f"../../blobs/ab/{'c' * 64}")
    ),
    "a FIFO, which would wait for ever": _blob(os.mkfifo),
    "a folder": _blob(Path.mkdir),
    "a link to itself": _blob(lambda blob: blob.symlink_to(blob.name)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_links_must_not_lead_to(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """It is as good as not there: it will be fetched from the hub."""
    folder = tmp_path / "hub"
    snapshot = by_hand.put(folder, REPO, ADAPTER, commit=COMMIT)
    by_hand.put(folder, "org/b", {NAME: WEIGHTS}, commit=COMMIT)
    (tmp_path / "secret").write_bytes(WEIGHTS)
    (folder / "secret").write_bytes(WEIGHTS)
    with hub_cache(folder) as cache:
        assert cache.open(KEY) is not None
        spoil(snapshot)
        assert cache.open(KEY) is None


@pytest.mark.parametrize("part", ["snapshots", "blobs", "refs", f"snapshots/{COMMIT}"])
def test_folders_in_a_repository_are_no_links(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "hub"
    by_hand.put(folder, REPO, ADAPTER, commit=COMMIT, refs=("main",))
    repo = folder / "models--org--name"
    (repo / part).rename(tmp_path / "elsewhere")
    (repo / part).symlink_to(tmp_path / "elsewhere")
    with hub_cache(folder) as cache:
        if part == "refs":
            assert cache.commit_of(REPO, "main") is None
        else:
            assert cache.open(KEY) is None


def test_a_blob_that_repositories_share(tmp_path: Path) -> None:
    """As huggingface_hub keeps files of the hub's newer storage."""
    snapshot = by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    blob = (snapshot / NAME).resolve()
    shared = tmp_path / "blobs" / "ab" / f"ab{'c' * 62}"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    with hub_cache(tmp_path) as cache:
        entry = cache.open(KEY, check=True)
        assert contents(entry) == ADAPTER
        assert entry is not None
        assert entry.record.files[1].digest == digest_of(NAME, WEIGHTS)


@pytest.fixture
def cache(hub_client: Path) -> Iterator[HubCache]:
    with hub_cache(hub_client, write=True) as cache:
        yield cache


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


@pytest.mark.parametrize("lacking", [*SPLIT, "blob", "two countings"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, lacking: str) -> None:
    more = {} if lacking in SPLIT else {"adapter_model-00001-of-00003.safetensors": b"x"}
    snapshot = by_hand.put(
        tmp_path, REPO, SPLIT | (more if "two" in lacking else {}), commit=COMMIT
    )
    if lacking == "blob":
        (snapshot / next(iter(SHARDS))).resolve().unlink()
    elif lacking in SPLIT:
        (snapshot / lacking).unlink()
    with hub_cache(tmp_path) as cache:
        assert cache.open(KEY) is None


def test_one_file_is_preferred_to_several_wherever_the_repository_lies(tmp_path: Path) -> None:
    """The operator may put it on another disk, by a link."""
    by_hand.put(tmp_path / "other disk", REPO, {**SPLIT, NAME: WEIGHTS}, commit=COMMIT)
    (tmp_path / "hub").mkdir()
    link = tmp_path / "hub" / "models--org--name"
    link.symlink_to(tmp_path / "other disk" / link.name)
    with hub_cache(tmp_path / "hub") as cache:
        assert set(contents(cache.open(KEY))) == set(ADAPTER)


@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_removed_or_replaced_while_it_is_used(tmp_path: Path, replaced: bool) -> None:
    """A reader that opens later is told."""
    snapshot = by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    blob = (snapshot / NAME).resolve()
    with hub_cache(tmp_path) as cache:
        entry = cache.open(KEY)
        assert entry is not None
        early, late = entry.reader(WEIGHTS_FILE), entry.reader(WEIGHTS_FILE)
        assert read(early, 0, 5) == WEIGHTS[:5]
        shutil.rmtree(tmp_path / "models--org--name") if not replaced else blob.unlink()
        assert cache.open(KEY) is None
        if replaced:
            blob.write_bytes(WEIGHTS)
        with pytest.raises(IntegrityError, match="changed or replaced"):
            read(late, 0, 5)
        late.close()
        early.close()


# -- beside our own cache -------------------------------------------------------------------------


def test_each_file_is_kept_in_one_of_both_caches(tmp_path: Path, hub_client: Path) -> None:
    """What the hub cache has is not downloaded, and what it has not is kept by ourselves."""
    by_hand.put(hub_client, REPO, ADAPTER, commit=COMMIT, refs=("main", "refs/pr/1"))
    before, other = tree(hub_client, ""), CacheKey(REPO, "d" * 40)
    with hub_cache(hub_client) as hub, closing(disk_cache(tmp_path)) as disk:
        cache: Cache = HubFirst(hub, disk)
        for found in (cache.open(KEY), cache.begin(KEY, "somebody", Demand())):
            assert isinstance(found, CacheEntry)
            assert contents(found) == ADAPTER
            found.close()
        assert cache.used() == 0
        with pytest.raises(InternalError, match="hub cache"):
            hub.begin(KEY, "", Demand())
        assert not hub.takes("")
        entry = stored(cache, other)
        assert entry.mappable
        entry.close()
        assert disk.used() == cache.used() == sum(map(len, ADAPTER.values()))

        def last(ref: AdapterRef, scope: str = "") -> tuple[str, str] | None:
            return cache.last_version(question_of(ref, scope))

        for revision in (None, "refs/pr/1", COMMIT):
            assert last(AdapterRef(REPO, "hub", revision)) == (REPO, COMMIT)
        for ref in (AdapterRef(REPO, "hub", "v1.0"), AdapterRef(REPO, "s3")):
            assert last(ref) is None
        for name in ("../../etc", "org/na\nme"):
            assert last(AdapterRef(name, "hub")) is None
        cache.note_version(question_of(AdapterRef(REPO, "hub"), ""), REPO, other.version)
        assert last(AdapterRef(REPO, "hub")) == (REPO, other.version), "our own answer is first"
        assert last(AdapterRef(REPO, "hub"), "somebody") == (REPO, COMMIT)
        assert tree(hub_client, "") == before
        assert cache.remove(other)
        assert not cache.remove(KEY), "that is everybody's"


@pytest.mark.parametrize("write", [False, True])
def test_wrong_bytes_in_the_hub_cache_are_fetched_again(
    tmp_path: Path, hub_client: Path, write: bool
) -> None:
    snapshot = by_hand.put(hub_client, REPO, ADAPTER, commit=COMMIT)
    blob = (snapshot / NAME).resolve()
    blob.write_bytes(WEIGHTS[::-1])
    with hub_cache(hub_client, write=write) as hub, closing(disk_cache(tmp_path)) as disk:
        cache: Cache = HubFirst(hub, disk)
        assert cache.open(KEY, check=True) is None
        stored(cache).close()
        entry = cache.open(KEY, check=True)
        assert entry is not None
        assert contents(entry) == ADAPTER
        entry.close()
    assert (blob.read_bytes() == WEIGHTS) == write, "a cache that only reads repairs nothing"


# -- storing there --------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [ADAPTER, SPLIT], ids=["one file", "several files"])
def test_what_is_stored_lies_as_the_library_lays_it(
    tmp_path: Path, hub_client: Path, files: dict[str, bytes]
) -> None:
    """The same links, names, contents and modes, byte for byte; but for the library's listing."""
    with hub_cache(hub_client, write=True) as cache:
        key = by_the_library(tmp_path / "theirs", files, "refs/pr/1")
        cache.note_revision(REPO, "refs/pr/1", key.version)
        stored(cache, key, files)
    theirs = tree(tmp_path / "theirs")
    assert tree(hub_client) == {name: what for name, what in theirs.items() if "/trees" not in name}


def test_wrong_bytes_leave_nothing_there(cache: HubCache, hub_client: Path) -> None:
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
