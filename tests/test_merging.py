"""A merge behaves as any adapter does: joins, tiers, pins, eviction, reloads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterLoader,
    IntegrityError,
    Limits,
    LocalRoot,
    Merge,
)
from lorax_async.testing import FakeReader
from merges import BOTH, HALVES, assert_halves, assert_same, at, part_bytes, weights_of
from tiny_loaders import loader
from tiny_sources import WEIGHTS, is_resident, over, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_a_merge_of_folders(tmp_path: Path, device: str) -> None:
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name, seed)
    async with loader(device=device) as there:
        async with await there.load(at(tmp_path)) as handle:
            assert_halves(handle, tmp_path)
            assert handle.id == f"linear(0.5 * {tmp_path}/a, -2.0 * {tmp_path}/b)"
        async with there.stream(at(tmp_path)) as handle:
            await handle.layer_ready(tiny.LAYERS - 1)
            assert_halves(handle, tmp_path)


@pytest.mark.parametrize("merge", BOTH)
async def test_asked_for_by_many_it_is_computed_once(tmp_path: Path, merge: Merge) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        handles = await asyncio.gather(*(there.load(merge) for _ in range(20)))
        assert len({handle.slot for handle in handles}) == 1
        assert source.counts.bytes_read == part_bytes()
        assert (source.counts.resolves, source.counts.opens) == (2, 2)
        assert there.statistics().fetches == 1
        for handle in handles:
            handle.release()
        assert source.counts.open_readers == 0


async def test_equal_recipes_are_one_adapter(tmp_path: Path) -> None:
    """Whatever their parts are called."""
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name, seed)
    async with loader(local_roots=[tmp_path]) as there:
        merges = [at(tmp_path), Merge("linear", ["./a", "./b"], [0.5, -2])]
        first, second = [await there.load(merge) for merge in merges]
        assert first.slot == second.slot
        assert first.key == second.key
        other = await there.load(Merge("linear", merges[0].refs, [0.5, -2.5]))
        assert other.slot != first.slot
        for handle in (first, second, other):
            handle.release()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("merge", BOTH)
async def test_evicted_it_comes_back_as_it_was(tmp_path: Path, merge: Merge, device: str) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=1, device=device) as there:
        async with await there.load(merge) as handle:
            before = weights_of(handle)
        (await there.load("c")).release()
        assert not is_resident(there, merge)
        async with await there.load(merge) as handle:
            assert_same(weights_of(handle), before)
        assert there.statistics().fetches == 2, "it was not planned again"
        assert source.counts.open_readers == 0


@pytest.mark.parametrize("merge", BOTH)
async def test_small_windows_cut_it_nowhere(tmp_path: Path, merge: Merge) -> None:
    """Where nothing is cut, and where every tensor of rank 64 is cut into several reads."""
    source = stocked(tmp_path, "a", "b", rank=64)
    found = []
    for staging in (1 << 24, 1 << 14):
        limits = Limits(max_rank=128)
        settings = {"device": "simulated", "staging_bytes": staging, "limits": limits}
        async with over(source, **settings) as there, await there.load(merge) as handle:
            found.append(weights_of(handle))
    assert_same(*found)


async def test_it_leaves_an_io_thread_to_others(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    began, go_on = Event(), Event()
    read = FakeReader.read_into

    def slowly(self: FakeReader, buffers: Sequence[memoryview], offset: int) -> None:
        if self.version.id != "c":
            began.set()
            assert go_on.wait(20)
        read(self, buffers, offset)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FakeReader, "read_into", slowly)
        async with over(source, io_threads=2) as there:
            merging = asyncio.create_task(there.load(HALVES))
            await until(began.is_set)
            async with await there.load("c") as handle:
                tiny.assert_equal_to_file(handle, tmp_path / "c")
            assert not merging.done()
            go_on.set()
            (await merging).release()


@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_prefetched(tmp_path: Path, tier: Any) -> None:
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name, seed)
    async with loader(local_roots=[LocalRoot(tmp_path, immutable=True)]) as there:
        await there.prefetch(at(tmp_path), tier=tier)
        place = where(there, at(tmp_path))
        assert place.host_bytes == 0, "its parts are read ahead, and not held"
        assert is_resident(there, at(tmp_path)) is (tier == "device")
        async with await there.load(at(tmp_path)) as handle:
            assert_halves(handle, tmp_path)


async def test_pinned_tried_unloaded(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=2) as there:
        assert there.try_acquire(HALVES) is None
        await there.unload(HALVES)
        await there.pin(HALVES)
        for name in ("a", "b", "c"):
            (await there.load(name)).release()
        handle = there.try_acquire(HALVES)
        assert handle is not None
        assert_halves(handle, tmp_path)
        handle.release()
        assert there.story(HALVES)[-1].slot == handle.slot
        assert there.unpin(HALVES)
        assert not there.unpin(HALVES)
        await there.unload(HALVES)
        assert state(there, HALVES) in {"nowhere", "present"}
        assert there.try_acquire(HALVES) is None


async def test_the_key_of_a_merge_names_it_too(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        async with await there.load(HALVES) as handle:
            key = handle.key
        await there.unload(HALVES)
        async with await there.load(key) as handle:
            assert_halves(handle, tmp_path)


async def test_keys_may_be_parts(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        async with await there.load("a") as first, await there.load("b") as second:
            merge = Merge("linear", [first.key, second.key], [0.5, -2])
        async with await there.load(merge) as handle, await there.load(HALVES) as other:
            assert handle.slot == other.slot


async def test_a_part_that_was_saved_again_makes_another(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        old = await there.load(HALVES)
        before = weights_of(old)
        source.put("b", *tiny.files(tiny.write(tmp_path / "b", 77)))
        async with await there.load(HALVES) as new:
            assert new.key != old.key
            assert_halves(new, tmp_path)
        assert_same(weights_of(old), before)
        old.release()


@pytest.mark.parametrize("file", ["adapter_config.json", WEIGHTS])
async def test_a_part_that_changed_under_a_reload(tmp_path: Path, file: str) -> None:
    for seed, name in enumerate("abc"):
        tiny.write(tmp_path / name, seed)
    async with loader(max_slots=1) as there:
        async with await there.load(at(tmp_path)) as handle:
            key = handle.key
        (await there.load(tmp_path / "c")).release()
        changed = tmp_path / "b" / file
        changed.write_bytes(changed.read_bytes())
        with pytest.raises(IntegrityError, match=r"part 2 \('b'\): .* was changed"):
            await there.load(key)
        async with await there.load(at(tmp_path)) as handle:
            assert handle.key != key
            assert_halves(handle, tmp_path)


@pytest.mark.parametrize("merge", BOTH)
async def test_layers_become_ready_as_their_parts_arrive(tmp_path: Path, merge: Merge) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        source.hold("b")
        source.allow("b", 0, 1)
        async with there.stream(merge) as handle:
            await handle.layer_ready(1, timeout=10)
            assert not handle.is_ready(2)
            source.allow("b")
            await handle.layer_ready(tiny.LAYERS - 1, timeout=10)
            streamed = weights_of(handle)
        await there.unload(merge)
        async with await there.load(merge) as handle:
            assert_same(weights_of(handle), streamed)


async def test_a_custom_source_of_a_host_is_enough(tmp_path: Path) -> None:
    """The loader merges by itself: a source knows nothing of it."""
    source = stocked(tmp_path, "a", "b")
    there = AdapterLoader(tiny.layout(), source=source)
    async with there, await there.load(HALVES) as handle:
        assert_halves(handle, tmp_path)
