"""Where links in the standard hub cache may lead to, and where not."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hub_cache_world import COMMIT, KEY, contents, digest_of, hub_cache
from hub_world import ADAPTER, REPO, WEIGHTS

from adapters import hub_cache as by_hand

pytestmark = pytest.mark.usefixtures("nothing_left")

NAME = "adapter_model.safetensors"


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


def test_a_repository_that_the_operator_put_elsewhere(tmp_path: Path) -> None:
    by_hand.put(tmp_path / "other disk", REPO, ADAPTER, commit=COMMIT)
    (tmp_path / "hub").mkdir()
    link = tmp_path / "hub" / "models--org--name"
    link.symlink_to(tmp_path / "other disk" / link.name)
    with hub_cache(tmp_path / "hub") as cache:
        assert contents(cache.open(KEY)) == ADAPTER


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
