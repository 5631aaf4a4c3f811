"""What other tools have stored in the standard hub cache is used, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from cache_inputs import content_of
from hub_cache_world import (
    COMMIT,
    KEY,
    SHARDS,
    SPLIT,
    by_the_library,
    contents,
    digest_of,
    hub_cache,
    tree,
)
from hub_world import ADAPTER, REPO, WEIGHTS
from source_inputs import read

from adapters import hub_cache as by_hand
from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.ports import Cache
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import standard_folder

pytestmark = pytest.mark.usefixtures("nothing_left")

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


def test_one_file_is_preferred_to_several(tmp_path: Path) -> None:
    by_hand.put(tmp_path, REPO, {**SPLIT, NAME: WEIGHTS}, commit=COMMIT)
    with hub_cache(tmp_path) as cache:
        assert set(contents(cache.open(KEY))) == set(ADAPTER)


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


@pytest.mark.parametrize("lacking", [*SPLIT, "blob"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, lacking: str) -> None:
    snapshot = by_hand.put(tmp_path, REPO, SPLIT, commit=COMMIT)
    if lacking == "blob":
        (snapshot / next(iter(SHARDS))).resolve().unlink()
    else:
        (snapshot / lacking).unlink()
    with hub_cache(tmp_path) as cache:
        assert cache.open(KEY) is None


def test_shards_of_two_countings_are_no_adapter(tmp_path: Path) -> None:
    more = {"adapter_model-00001-of-00003.safetensors": b"x"}
    by_hand.put(tmp_path, REPO, {**SPLIT, **more}, commit=COMMIT)
    with hub_cache(tmp_path) as cache:
        assert cache.open(KEY) is None


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


def test_a_blob_that_was_cut(tmp_path: Path) -> None:
    snapshot = by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    (snapshot / NAME).resolve().write_bytes(WEIGHTS[:-1])
    with hub_cache(tmp_path) as cache:
        assert cache.open(KEY, check=True) is None


def test_what_is_removed_while_it_is_used(tmp_path: Path) -> None:
    """Open readers go on; who opens later is told."""
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    with hub_cache(tmp_path) as cache:
        entry = cache.open(KEY)
        assert entry is not None
        early, late = entry.reader(WEIGHTS_FILE), entry.reader(WEIGHTS_FILE)
        assert read(early, 0, 5) == WEIGHTS[:5]
        shutil.rmtree(tmp_path / "models--org--name")
        assert cache.open(KEY) is None
        with pytest.raises(IntegrityError, match="changed or replaced"):
            read(late, 0, 5)
        late.close()
        early.close()


def test_what_is_replaced_while_it_is_used(tmp_path: Path) -> None:
    snapshot = by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    with hub_cache(tmp_path) as cache:
        entry = cache.open(KEY)
        assert entry is not None
        blob = (snapshot / NAME).resolve()
        blob.unlink()
        blob.write_bytes(WEIGHTS)
        with pytest.raises(IntegrityError, match="changed or replaced"):
            content_of(entry)


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


def test_who_may_have_it_without_asking(tmp_path: Path) -> None:
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


def test_who_only_reads_stores_nothing(tmp_path: Path) -> None:
    by_hand.put(tmp_path, "org/other", ADAPTER, commit=COMMIT)
    before = tree(tmp_path, "")
    with hub_cache(tmp_path) as cache:
        assert not cache.takes("")
        with pytest.raises(InternalError, match="hub cache"):
            cache.begin(KEY, "", Demand())
        cache.note_revision(REPO, "main", COMMIT)
    assert tree(tmp_path, "") == before


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
