"""Our own cache and the standard one side by side: each file in one of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import pytest
from cache_inputs import put
from hub_cache_world import COMMIT, KEY, ROLES, begun, contents, hub_cache, stored, tree
from hub_world import ADAPTER, REPO, WEIGHTS
from huggingface_hub import hf_hub_download

from adapters import hub_cache as by_hand
from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CacheKey
from lorax_async.core.policies import policy
from lorax_async.errors import FetchError
from lorax_async.io.cache.ports import Cache, CacheEntry
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_first import HubFirst
from lorax_async.io.remote.questions import question_of

pytestmark = pytest.mark.usefixtures("nothing_left")

NAME = "adapter_model.safetensors"
OTHER = CacheKey(REPO, "d" * 40)


class Both:
    """`cache` over a folder of each kind."""

    def __init__(self, folder: Path, *, write: bool, private: bool = False) -> None:
        self._open = ExitStack()
        self.hub_folder = folder / "hub"
        self.hub = self._open.enter_context(
            hub_cache(self.hub_folder, write=write, private=private)
        )
        self.disk = DiskCache(folder / "disk", 1 << 30, policy("lru"))
        self._open.callback(self.disk.close)
        self.cache: Cache = HubFirst(self.hub, self.disk)

    def close(self) -> None:
        self.cache.close()
        self._open.close()


@pytest.fixture
def reading(tmp_path: Path, hub_client: Path) -> Iterator[Both]:
    both = Both(tmp_path, write=False)
    yield both
    both.close()


@pytest.fixture
def writing(tmp_path: Path, hub_client: Path) -> Iterator[Both]:
    both = Both(tmp_path, write=True)
    yield both
    both.close()


def test_what_the_hub_cache_has_is_not_downloaded(reading: Both) -> None:
    by_hand.put(reading.hub_folder, REPO, ADAPTER, commit=COMMIT)
    for found in (reading.cache.open(KEY), reading.cache.begin(KEY, "somebody", Demand())):
        assert isinstance(found, CacheEntry)
        assert contents(found) == ADAPTER
        found.close()
    assert reading.cache.used() == 0


def test_the_rest_is_kept_by_ourselves(reading: Both) -> None:
    by_hand.put(reading.hub_folder, REPO, ADAPTER, commit=COMMIT)
    before = tree(reading.hub_folder, "")
    entry = stored(reading.cache, OTHER)
    assert entry.mappable
    entry.close()
    reading.cache.note_version(question_of(AdapterRef(REPO, "hub"), ""), REPO, OTHER.version)
    assert reading.disk.used() == reading.cache.used() == sum(map(len, ADAPTER.values()))
    assert tree(reading.hub_folder, "") == before
    assert reading.cache.remove(OTHER)
    assert not reading.cache.remove(KEY), "that is everybody's"


def test_writing_nothing_is_kept_twice(writing: Both) -> None:
    stored(writing.cache, scope="").close()
    assert writing.disk.used() == 0
    assert contents(writing.cache.open(KEY)) == ADAPTER
    private = stored(writing.cache, OTHER, scope="somebody")
    private.close()
    assert writing.hub.open(OTHER) is None, "nobody consented"
    assert writing.disk.used() == sum(map(len, ADAPTER.values()))


def test_what_we_had_before_is_used(writing: Both) -> None:
    stored(writing.disk).close()
    entry = writing.cache.begin(KEY, "", Demand())
    assert isinstance(entry, CacheEntry)
    assert contents(entry) == ADAPTER
    entry.close()
    assert writing.hub.open(KEY) is None


@pytest.mark.parametrize("write", [False, True])
def test_wrong_bytes_in_the_hub_cache_are_fetched_again(
    tmp_path: Path, hub_client: Path, write: bool
) -> None:
    snapshot = by_hand.put(tmp_path / "hub", REPO, ADAPTER, commit=COMMIT)
    blob = (snapshot / NAME).resolve()
    blob.write_bytes(WEIGHTS[::-1])
    both = Both(tmp_path, write=write)
    assert both.cache.open(KEY, check=True) is None
    stored(both.cache).close()
    entry = both.cache.open(KEY, check=True)
    assert contents(entry) == ADAPTER
    assert entry is not None
    entry.close()
    assert (blob.read_bytes() == WEIGHTS) == write, "who only reads repairs nothing"
    both.close()


def test_others_wait_whichever_it_goes_to(writing: Both) -> None:
    for key, scope in ((KEY, ""), (OTHER, "somebody")):
        download = begun(writing.cache, key, scope)
        assert isinstance(writing.cache.try_begin(key, scope), int)
        demand = Demand()
        demand.end()
        with pytest.raises(FetchError, match="cancelled"):
            writing.cache.begin(key, scope, demand)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(writing.cache.begin, key, scope, Demand())
            for name, content in ADAPTER.items():
                put(download.file(ROLES[name], len(content)), content, [(0, len(content))])
            assert not wait([waiting], timeout=0.05).done
            download.publish().close()
            entry = waiting.result(30)
        assert isinstance(entry, CacheEntry)
        entry.close()


def test_what_a_branch_meant_when_other_tools_looked(reading: Both) -> None:
    """Our own latest answer counts first; of a question of no such form nothing is made."""
    by_hand.put(reading.hub_folder, REPO, ADAPTER, commit=COMMIT, refs=("main", "refs/pr/1"))

    def last(ref: AdapterRef, scope: str = "") -> tuple[str, str] | None:
        return reading.cache.last_version(question_of(ref, scope))

    assert last(AdapterRef(REPO, "hub")) == (REPO, COMMIT)
    assert last(AdapterRef(REPO, revision="refs/pr/1")) == (REPO, COMMIT)
    assert last(AdapterRef(REPO, "hub", COMMIT)) == (REPO, COMMIT)
    assert last(AdapterRef(REPO, "hub", "v1.0")) is None
    assert last(AdapterRef(REPO, "s3")) is None
    assert last(AdapterRef("../../etc", "hub")) is None
    assert last(AdapterRef("org/na\nme", "hub")) is None
    reading.cache.note_version(question_of(AdapterRef(REPO, "hub"), ""), REPO, OTHER.version)
    assert last(AdapterRef(REPO, "hub")) == (REPO, OTHER.version)
    assert last(AdapterRef(REPO, "hub"), "somebody") == (REPO, COMMIT)


def test_what_a_branch_means_is_told_to_other_tools(writing: Both) -> None:
    question = question_of(AdapterRef(REPO, "hub"), "")
    writing.cache.note_version(question, REPO, COMMIT)
    writing.cache.note_version(question_of(AdapterRef(REPO, "hub", "dev"), "who"), REPO, COMMIT)
    stored(writing.cache).close()
    found = hf_hub_download(REPO, NAME, cache_dir=writing.hub_folder, local_files_only=True)
    assert Path(found).read_bytes() == WEIGHTS
    assert writing.hub.commit_of(REPO, "dev") is None, "that took a token"
    assert writing.cache.last_version(question) == (REPO, COMMIT)
