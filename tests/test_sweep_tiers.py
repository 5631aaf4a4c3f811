"""Cancel at every await, with every tier in play: nothing may be left, and a load must follow."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import mapped_files, open_files, our_threads, until
from lorax_async import AdapterLoader, LoaderClosedError, LoraxError
from lorax_async.runtime.whereabouts import TierName
from sweeping import cancel_at, count_steps
from sweeping_tiers import (
    LAYOUT,
    VERBS,
    TierBench,
    fake_tiers,
    local_tiers,
    our_tasks,
    tier_config,
    tier_device,
    written,
)

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

TURNS = 24
"""Of the loop, one after the other; a fake adapter has all its bytes before that many."""


@pytest.mark.parametrize("crowded", [False, True], ids=["empty", "crowded"])
@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_every_await(tmp_path: Path, verb: str, crowded: bool) -> None:
    async with local_tiers(tmp_path) as bench:
        steps = await count_steps(bench.do(verb))
        await bench.assert_clean()
        assert steps >= 1
        for step in range(1, steps + 1):
            bench.renew()
            if crowded:
                await bench.crowd()
            await cancel_at(bench.do(verb), step)
            await bench.assert_clean()
            await bench.assert_works()
            await bench.assert_clean()


@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_every_await_of_a_stream(tmp_path: Path, verb: str) -> None:
    async with fake_tiers(tmp_path) as (bench, source):
        steps = await count_steps(bench.do(verb))
        await bench.assert_clean()
        for step in range(1, steps + 1):
            source.put("a", *tiny.files(tmp_path / "a"))
            await cancel_at(bench.do(verb), step)
            await bench.assert_clean()
            assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)
            await bench.assert_works()


async def test_who_waits_for_a_prefetch_may_go(tmp_path: Path) -> None:
    """The prefetch goes on, as it says."""
    tiers: tuple[TierName, ...] = ("disk", "host", "device")
    async with local_tiers(tmp_path) as bench:
        for tier in tiers:
            hint = bench.loader.prefetch(bench.ids["a"], tier=tier)

            async def wait() -> None:
                await hint

            assert await cancel_at(wait(), 1)
            await hint
            assert [each.tier for each in bench.loader.residency().values()] == [tier]
            await bench.assert_clean()


@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_a_prefetch_is_cancelled_at_every_turn(tmp_path: Path, tier: TierName) -> None:
    async with fake_tiers(tmp_path) as (bench, source):
        for turns in range(TURNS):
            source.put("a", *tiny.files(tmp_path / "a"))
            hint = bench.loader.prefetch("a", tier=tier)
            for _ in range(turns):
                await asyncio.sleep(0)
            hint.cancel()
            await hint
            assert hint.done
            assert not hint.errors
            await bench.assert_clean()
            assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)
        await bench.assert_works()


async def test_a_prefetch_is_cancelled_after_every_copy(tmp_path: Path) -> None:
    """With the copies before it under way, none of which has run."""
    async with fake_tiers(tmp_path) as (bench, source):
        for copies in range(tiny.LAYERS + 1):
            source.put("a", *tiny.files(tmp_path / "a"))
            source.hold("a")
            source.allow("a", *range(copies)) if copies else None
            before, there = bench.device.copies, bench.device
            there.gate.clear()
            hint = bench.loader.prefetch("a")
            load = asyncio.create_task(bench.load())
            await until(lambda: there.copies == before + copies)
            hint.cancel()
            await asyncio.sleep(0)
            load.cancel()
            there.gate.set()
            await asyncio.wait([load])
            assert load.cancelled()
            source.allow("a")
            await bench.assert_clean()
            await bench.assert_works()


async def test_unload_is_cancelled_where_it_waits(tmp_path: Path) -> None:
    """For a lease, and for pages that are being let go; the next one succeeds."""
    async with local_tiers(tmp_path) as bench:
        await bench.load_from_host()
        assert await cancel_at(bench.unload(), 1)
        await bench.assert_clean()
        await bench.host()
        handle = await bench.loader.load(bench.ids["a"])
        assert await cancel_at(bench.unload(), 1)
        tiny.assert_equal_to_file(handle, tmp_path / "a")
        (await bench.loader.load(bench.ids["a"], timeout=1)).release()  # it stays
        handle.release()
        await bench.assert_clean()
        await bench.assert_works()


async def test_unload_is_cancelled_under_a_copy(tmp_path: Path) -> None:
    async with local_tiers(tmp_path) as bench:
        bench.device.gate.clear()
        load = asyncio.create_task(bench.load())
        await until(lambda: bench.device.copies)
        assert await cancel_at(bench.unload(), 1)
        bench.device.gate.set()
        await load
        await bench.assert_clean()
        await bench.assert_works()


async def test_close_at_every_turn_of_everything(tmp_path: Path) -> None:
    """Begun at every turn, and cancelled at its await: it goes on, and nothing is left."""
    ids, files = written(tmp_path), open_files()
    for turns in range(TURNS):
        device = tier_device()
        loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
        await loader.__aenter__()
        bench = TierBench(loader, device, ids, tmp_path)
        calls = [bench.load(), bench.stream(), bench.pin(), bench.host(), bench.unload()]
        tasks = [asyncio.create_task(call) for call in calls]
        hints = loader.prefetch(ids.values()), loader.prefetch(ids.values(), tier="host")
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await cancel_at(loader.close(), 1)
        await loader.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, LoraxError) for each in outcomes), outcomes
        assert all(hint.done for hint in hints)
        assert not our_tasks()
        assert not our_threads()
        assert not mapped_files()
        assert open_files() <= files
        bench.assert_whole_ring()
        bench.assert_empty()


async def test_close_with_a_copy_under_way(tmp_path: Path) -> None:
    """A copy that has begun is waited for: its memory cannot be taken back."""
    device, ids = tier_device(), written(tmp_path)
    loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
    await loader.__aenter__()
    bench = TierBench(loader, device, ids, tmp_path)
    await bench.host()
    device.gate.clear()
    load = asyncio.create_task(bench.load())
    await until(lambda: device.copies)
    assert await cancel_at(loader.close(timeout=0), 1)
    with pytest.raises(LoaderClosedError):
        await load
    closing = asyncio.create_task(loader.close())
    done, _ = await asyncio.wait([closing], timeout=0.05)
    assert not done
    device.gate.set()
    await closing
    bench.assert_whole_ring()
    bench.assert_empty()
    assert not our_tasks()
