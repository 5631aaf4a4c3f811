"""One hub cache for `loader.load` and for huggingface_hub: each finds what the other has stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import (
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from user_loads import at, contents, has, loader, secretless, stored_in, written

import split_files
from lorax_async import AccessDeniedError, AdapterLoader, AdapterNotFoundError, Allow
from lorax_async.adapter import AdapterRef

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

TOKEN = "hf_q5ecre7Token"
FILES = pytest.mark.parametrize("files", ["one file", "several files"])


def saved(folder: Path, files: str) -> tuple[Path, dict[str, bytes]]:
    """An adapter as it was, and as it is put on the hub."""
    whole = written(folder / "whole", layers=16, rank=64)
    if files == "one file":
        return whole, contents(whole)
    return whole, contents(split_files.split(whole, folder / "several"))


def over(hub: HubStandIn, folder: Path, **settings: object) -> AdapterLoader:
    allow = (Allow("hub"), at(hub.store_netloc))
    return loader(folder, layers=16, allow=allow, hub_endpoint=hub.endpoint, **settings)


def is_everybodys(folder: Path, commit: str, files: dict[str, bytes]) -> None:
    """huggingface_hub finds all of it without asking, and nothing that is amiss."""
    place = folder / "hub"
    for revision in ("main", commit):
        for name, content in files.items():
            found = hf_hub_download(
                "org/name", name, revision=revision, cache_dir=place, local_files_only=True
            )
            assert Path(found).read_bytes() == content
        snapshot = snapshot_download(
            "org/name", revision=revision, cache_dir=place, local_files_only=True
        )
        assert contents(Path(snapshot)) == files
    inventory = scan_cache_dir(place)
    assert inventory.warnings == []
    (repo,) = inventory.repos
    assert [each.commit_hash for each in repo.revisions] == [commit]


@FILES
async def test_it_finds_what_a_load_has_stored(files: str, tmp_path: Path) -> None:
    adapter, there = saved(tmp_path, files)
    with HubStandIn() as hub:
        commit = hub.put("org/name", there)
        async with over(hub, tmp_path, hub_cache="write") as ours:
            assert await has(ours, "org/name", adapter) == commit
        begun = len(hub.asked)
        snapshot_download("org/name", cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
        assert not any(asked.at_store for asked in hub.asked[begun:]), "nothing comes again"
    is_everybodys(tmp_path, commit, there)
    assert stored_in(tmp_path) == (0, 0), "no file is stored twice"


@FILES
async def test_a_load_finds_what_it_has_stored(files: str, tmp_path: Path) -> None:
    """Offline, and pinned, without asking; else after one HEAD for each file that tells a version."""
    adapter, there = saved(tmp_path, files)
    with HubStandIn() as hub:
        commit = hub.put("org/name", there)
        snapshot_download("org/name", cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
        begun = len(hub.asked)
        async with over(hub, tmp_path, offline=True) as ours:
            assert await has(ours, "org/name", adapter) == commit
        async with over(hub, tmp_path) as ours:
            assert await has(ours, f"org/name@{commit}", adapter) == commit
        assert len(hub.asked) == begun
        async with over(hub, tmp_path) as ours:
            assert await has(ours, "org/name", adapter) == commit
        assert {asked.method for asked in hub.asked[begun:]} == {"HEAD"}
    assert stored_in(tmp_path) == (0, 0)
    is_everybodys(tmp_path, commit, there)


@pytest.mark.parametrize("consent", [True, False])
async def test_private_ones_are_shared_only_with_consent(consent: bool, tmp_path: Path) -> None:
    adapter, there = saved(tmp_path, "several files")
    ours_alone = AdapterRef("org/name", token=TOKEN)
    with HubStandIn() as hub:
        commit = hub.put("org/name", there, private_token=TOKEN)
        settings = {"hub_cache": "write", "hub_cache_private": consent}
        async with over(hub, tmp_path, **settings) as ours:
            assert await has(ours, ours_alone, adapter) == commit
            with pytest.raises(AccessDeniedError, match="give a token"):
                await ours.load("org/name")
            with pytest.raises(AdapterNotFoundError, match="none that the token") as caught:
                await ours.load("org/name", token="hf_another")
            secretless(caught.value, TOKEN, "hf_another")
    if consent:
        is_everybodys(tmp_path, commit, there)
    else:
        name = "adapter_config.json"
        assert try_to_load_from_cache("org/name", name, cache_dir=tmp_path / "hub") is None
    assert stored_in(tmp_path) == (0 if consent else 1, 0)


async def test_what_it_has_stored_with_a_token_is_for_who_may_have_it(tmp_path: Path) -> None:
    adapter, there = saved(tmp_path, "one file")
    with HubStandIn() as hub:
        hub.put("org/name", there, private_token=TOKEN)
        place = tmp_path / "hub"
        snapshot_download("org/name", token=TOKEN, cache_dir=place, endpoint=hub.endpoint)
        begun = len(hub.asked)
        async with over(hub, tmp_path) as ours:
            with pytest.raises(AccessDeniedError, match="give a token"):
                await ours.load("org/name")
            await has(ours, AdapterRef("org/name", token=TOKEN), adapter)
        assert {asked.method for asked in hub.asked[begun:]} == {"HEAD"}, "its bytes are here"
