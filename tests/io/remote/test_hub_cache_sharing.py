"""Several who store in the standard hub cache; who may have what is there; what branches mean."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_inputs import put
from hub_cache_world import KEY, ROLES, begun, contents, hub_cache, stored
from hub_world import ADAPTER, REPO, WEIGHTS
from huggingface_hub import scan_cache_dir
from source_inputs import read

from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey
from lorax_async.errors import FetchError, InternalError
from lorax_async.io.cache.ports import CacheEntry
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import HubCache

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def cache(hub_client: Path) -> Iterator[HubCache]:
    with hub_cache(hub_client, write=True) as cache:
        yield cache


def test_one_downloads_and_others_wait(cache: HubCache, hub_client: Path) -> None:
    """Two of one process, and of two (as another opened cache is)."""
    download = begun(cache, KEY)
    with ThreadPoolExecutor(2) as threads, hub_cache(hub_client, write=True) as other:
        waiting = [threads.submit(each.begin, KEY, "", Demand()) for each in (cache, other)]
        assert isinstance(other.try_begin(KEY, ""), int)
        for name, content in ADAPTER.items():
            put(download.file(ROLES[name], len(content)), content, [(0, len(content))])
        assert not any(each.done() for each in waiting)
        assert not cache.remove(KEY), "somebody downloads it"
        download.publish()
        for each in waiting:
            entry = each.result(30)
            assert isinstance(entry, CacheEntry)
            assert contents(entry) == ADAPTER


def test_waiting_can_be_ended(cache: HubCache) -> None:
    download, demand = begun(cache, KEY), Demand()
    demand.end()
    with pytest.raises(FetchError, match="cancelled"):
        cache.begin(KEY, "", demand)
    download.discard()


def test_somebody_who_does_not_heed_the_lock(cache: HubCache) -> None:
    """Both download, and both end with the same entry: blobs that are there stay."""
    first, second = begun(cache, KEY), cache.try_begin(KEY, "", alone=True)
    assert not isinstance(second, int | CacheEntry)
    for download in (first, second):
        for name, content in ADAPTER.items():
            put(download.file(ROLES[name], len(content)), content, [(0, len(content))])
    entry = first.publish()
    reader = entry.reader(WEIGHTS_FILE)
    assert contents(second.publish()) == ADAPTER
    assert read(reader, 0, 9) == WEIGHTS[:9]
    reader.close()
    assert cache.used() == 0


def test_private_ones_only_with_consent(cache: HubCache, hub_client: Path) -> None:
    assert cache.takes("")
    assert not cache.takes("somebody")
    with pytest.raises(InternalError, match="not so"):
        cache.begin(KEY, "somebody", Demand())
    with hub_cache(hub_client, write=True, private=True) as consenting:
        assert consenting.takes("somebody")
        assert contents(stored(consenting, scope="somebody")) == ADAPTER


def test_who_may_have_it(hub_client: Path) -> None:
    """What was stored here is only for those whom the source let have it, also the machine itself."""
    options = {"write": True, "private": True}
    with hub_cache(hub_client, own="own", **options) as cache:
        entry = stored(cache, scope="somebody")
        assert entry.granted("own") is None
        assert entry.granted("") is None
        entry.grant("another")
    for own in ("own", ""):
        with hub_cache(hub_client, own=own, **options) as cache:
            entry = cache.open(KEY)  # type: ignore[assignment]  # it is there
            for scope in ("somebody", "another"):
                age = entry.granted(scope)
                assert age is not None
                assert 0 <= age < 60
            assert entry.granted(own) is None


def test_refs_are_noted_when_the_commit_is_here(cache: HubCache, hub_client: Path) -> None:
    """A ref to what is not here would be a damage, by the library's own check."""
    cache.note_revision(REPO, "main", KEY.version)
    assert not (hub_client / "models--org--name").exists()
    stored(cache)
    assert cache.commit_of(REPO, "main") == KEY.version
    cache.note_revision(REPO, "a/b", KEY.version)
    assert cache.commit_of(REPO, "a/b") == KEY.version
    cache.note_revision(REPO, "a", KEY.version)  # a folder is there
    cache.note_revision(REPO, "a/b/c", KEY.version)  # a file is there
    cache.note_revision(REPO, KEY.version, KEY.version)
    cache.note_revision(REPO, "../../x", KEY.version)
    later = CacheKey(REPO, "d" * 40)
    cache.note_revision(REPO, "main", later.version)
    assert cache.commit_of(REPO, "main") == KEY.version
    stored(cache, later, {**ADAPTER, "adapter_config.json": b"{}"})
    assert cache.commit_of(REPO, "main") == later.version
    refs = hub_client / "models--org--name" / "refs"
    assert sorted(str(path.relative_to(refs)) for path in refs.rglob("*")) == ["a", "a/b", "main"]
    assert scan_cache_dir(hub_client).warnings == []
