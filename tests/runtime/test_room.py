"""Room in slots and bytes: waits and evictions, pins and unloads."""

import asyncio
from pathlib import Path

import pytest
import tiny
from event_loops import until
from scheduler_world import warm
from tensor_adapters import FILE, acquired, give, used
from tiny_loaders import ONE, fails, gated, loader
from tiny_sources import granted, is_at, make_source, over, state, where

from lorax_async import AdapterRef, Event, HeaderChecked, Leaving, Resident, errors

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

EVER = 1e6  # Seconds: longer than any test


async def test_room_is_made_by_the_coldest_and_waited_for(tmp_path: Path) -> None:
    async with over(
        make_source(tmp_path, "a", "b", "c"), device_bytes=2 * ONE, max_slots=8
    ) as there:
        await warm(there, *"abac")
        assert there.try_acquire("b") is None
        held = [acquired(there, name) for name in "ac"]
        for name, handle in zip("ac", held, strict=True):
            tiny.assert_equal_to_file(handle, tmp_path / name)
        caught = await fails(there.load("b", timeout=0.02), errors.AdapterTimeoutError)
        assert (caught.stage, caught.retryable) == ("queue", True)
        for words in ("device's memory is in use", "'a' (1 handle of ", "'c' (1", "device_bytes"):
            assert words in str(caught)
        waiting = asyncio.create_task(there.load("b"))
        await until(lambda: there.placement().usage.waiting == 1)
        held[0].release()
        async with await waiting as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "b")
        held[1].release()


async def test_no_more_are_told_to_leave_than_have_to(tmp_path: Path) -> None:
    told: list[Event] = []
    async with over(
        make_source(tmp_path, "a", "b", "c"), max_slots=2, starvation_age=0.01
    ) as there:
        first, second = await there.load("a"), await there.load("b")
        there.subscribe(told.append)
        await fails(there.load("c", timeout=0.1), errors.AdapterTimeoutError)
        kinds = [type(event) for event in told]
        assert kinds == [HeaderChecked, Leaving, Resident], "no call waits any more"
        waiting = asyncio.create_task(there.load("c"))
        await until(lambda: state(there, "a") == "leaving")
        assert there.try_acquire("a") is None
        await fails(there.load("c", timeout=0.03), errors.AdapterTimeoutError)
        assert state(there, "b") == "resident"
        first.release()
        (await waiting).release()
        second.release()


async def test_a_stream_that_preempts_none_waits_for_an_idle_slot(tmp_path: Path) -> None:
    """Beside it, a load that waits for the same adapter preempts as ever."""
    async with over(make_source(tmp_path, "a", "b"), max_slots=1, starvation_age=0.02) as there:
        held = await there.load("a")

        async def stream() -> None:
            async with there.stream("b", preempt=False) as handle:
                await handle.layer_ready(handle.layers[-1])

        waiting = asyncio.create_task(stream())
        await until(lambda: there.placement().usage.waiting)
        await asyncio.sleep(0.1)
        assert state(there, "a") == "resident"
        acquired(there, "a").release()
        other = asyncio.create_task(there.load("b"))
        await until(lambda: state(there, "a") == "leaving")
        held.release()
        (await other).release()
        await waiting


@pytest.mark.parametrize(
    ("age", "order"), [(0.02, ["held", "patient", "urgent"]), (EVER, ["held", "urgent", "patient"])]
)
async def test_priority_is_worth_waiting_time(tmp_path: Path, age: float, order: list[str]) -> None:
    source = make_source(tmp_path, "held", "patient", "urgent")
    async with over(source, max_slots=1, starvation_age=age) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        loop = asyncio.get_running_loop()
        held = await there.load("held")
        patient = asyncio.create_task(there.load("patient"))
        await until(lambda: state(there, "patient") == "present")
        late = loop.time() + min(3 * age + 0.01, 0.1)  # three levels, and what a clock counts
        await until(lambda: loop.time() > late)
        urgent = asyncio.create_task(there.load("urgent", priority=3))
        await until(lambda: state(there, "urgent") == "present")
        held.release()
        for task in (patient, urgent):
            task.add_done_callback(lambda done: done.result().release())
        await asyncio.gather(patient, urgent)
        assert granted(heard) == order


async def test_a_resident_adapter_has_its_time_and_goes_when_it_is_over(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", "c")
    async with over(source, max_slots=1, min_residency=0.1, starvation_age=EVER) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        (await there.load("a")).release()
        late = there.load("b", timeout=0.01)
        caught = await fails(late, errors.AdapterTimeoutError, "all 1 slots are in use.*max_slots")
        assert caught.stage == "queue"
        (await there.load("b", timeout=20)).release()
        await there.prefetch("c", timeout=20)
        times = [event.time for event in heard if isinstance(event, Resident | Leaving)]
        came, went = times[::2], times[1::2]
        assert len(went) == 2
        # The loop's clock may count whole milliseconds.
        assert all(after - before > 0.098 for before, after in zip(came, went, strict=False))


async def test_a_pin_outlives_pressure_until_it_is_unpinned(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a", "b", "c", "d"), max_slots=2) as there:
        await there.pin("a")
        assert (where(there, "a").pins, where(there, "a").leases) == (1, 0)
        slot = where(there, "a").slot
        await warm(there, "b", "c", "d")
        await there.prefetch(["b", "c"])
        async with await there.load("a") as handle:
            assert handle.slot == slot
            tiny.assert_equal_to_file(handle, tmp_path / "a")
        assert (there.unpin("a"), there.unpin("a")) == (True, False)
        await warm(there, "b", "c")
        assert not is_at(there, "a", "device")


ONLY_SLOT = "the only slot is pinned; unpin an adapter, or raise max_slots"
FULL = f"{2 * ONE:,}, which has no room beside 1 pinned adapter; unpin some, or raise device_bytes"


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [({"max_slots": 1}, "b", ONLY_SLOT), ({"device_bytes": 2 * ONE}, "large", FULL)],
    ids=["slots", "bytes"],
)
async def test_no_room_beside_a_pin(
    tmp_path: Path, settings: dict[str, object], name: str, words: str
) -> None:
    """The error speaks of what is short: of slots, or of bytes."""
    source = make_source(tmp_path, "a", "b")
    source.put("large", *tiny.files(tiny.write(tmp_path / "large", rank=8)))
    async with over(source, **settings) as there:
        lease = await there.load("a")
        waiting = asyncio.create_task(there.load(name))
        hint = there.prefetch(name)
        await until(lambda: state(there, name) == "present")
        assert not waiting.done()
        await there.pin("a")
        lease.release()
        for late in (waiting, there.load(name), there.prefetch(name), hint):
            caught = await fails(asyncio.wait_for(late, 20), errors.CapacityError, words)
            assert (caught.retryable, caught.id) == (True, name)
            assert ("bytes" in str(caught)) is (name == "large")
        there.unpin("a")
        await warm(there, name)
        assert is_at(there, name, "device")


async def test_what_never_fits_is_refused_for_its_size_whatever_is_pinned(tmp_path: Path) -> None:
    """Also where every slot is pinned: to unpin would not help."""
    source = make_source(tmp_path, "a", "b")
    source.put("large", *tiny.files(tiny.write(tmp_path / "large", rank=16)))
    async with over(source, max_slots=2, device_bytes=2 * ONE) as there:
        for pinned in ("a", "b"):
            await there.pin(pinned)
            caught = await fails(there.load("large"), errors.CapacityError, "; raise device_bytes$")
            assert not caught.retryable
        await fails(there.load("c"), errors.AdapterNotFoundError)
        source.put("c", *tiny.files(tiny.write(tmp_path / "c", 5)))
        caught = await fails(there.load("c"), errors.CapacityError, "all 2 slots are pinned; unpin")
        assert caught.retryable


async def test_pins_that_wait_for_one_slot_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    first, second = (tiny.write(tmp_path / name) for name in "ab")
    there, device = gated(slots=1, starvation_age=0.01)
    async with there:
        device.gate.clear()
        pinning = asyncio.create_task(there.pin(first))
        await until(lambda: device.copies == 2)
        late = asyncio.create_task(there.pin(second))
        since = asyncio.get_running_loop().time()
        await until(lambda: state(there, second) == "present")
        await until(lambda: asyncio.get_running_loop().time() > since + 0.02)
        device.gate.set()
        await pinning
        await fails(late, errors.CapacityError, ONLY_SLOT)
        assert (where(there, first).pins, there.statistics().loads) == (1, 1)


async def test_unload_ends_pins_and_a_stale_unpin_is_harmless(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a")) as there:
        await there.pin("a")
        key = there.placement().story("a")[0].key
        await there.pin(key)
        assert where(there, "a").pins == 2
        await there.unload("a")
        assert not is_at(there, "a", "device")
        await there.pin(key)
        assert not there.unpin("a")
        assert where(there, "a").pins == 1


async def test_a_pin_of_what_was_saved_again_moves(tmp_path: Path) -> None:
    folder, others = tmp_path / "a", [tiny.write(tmp_path / n, seed=9) for n in "bc"]
    async with loader(max_slots=2) as there:
        tiny.write(folder)
        await there.pin(folder)
        (old,) = there.placement().adapters
        tiny.write(folder, seed=1)
        await there.pin(folder)
        assert there.placement().adapters[old].pins == 0
        assert where(there, folder).pins == 1
        for other in others:
            (await there.load(other)).release()
        assert there.placement().adapters[old].tier == "disk"
        async with acquired(there, folder) as handle:
            tiny.assert_equal_to_file(handle, folder)


async def test_each_id_has_its_own_pin(tmp_path: Path) -> None:
    folder, others = tiny.write(tmp_path / "a"), [tiny.write(tmp_path / n, seed=9) for n in "bc"]
    async with loader(max_slots=1, local_roots=(tmp_path,)) as there:
        await there.pin(folder)
        await there.pin(AdapterRef(folder))  # says the same
        assert where(there, folder).pins == 1
        (key,) = there.placement().adapters
        for other in (key, str(folder)):
            await there.pin(other)
        assert where(there, folder).pins == 3
        for id in (folder, str(folder)):
            assert there.unpin(id)
            await fails(there.load(others[0]), errors.CapacityError)
        assert there.unpin(key)
        assert where(there, folder).pins == 0
        (await there.load(others[1])).release()


async def test_what_is_idle_goes_at_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader(timeout=20) as there:
        (await there.load(folder)).release()
        assert where(there, folder).device_bytes == ONE
        await there.unload(folder)
        found = where(there, folder)
        assert (found.tier, found.state, found.slot) == ("disk", "present", None)
        assert (found.device_bytes, found.host_bytes) == (0, 0)
        assert there.try_acquire(folder) is None
        assert isinstance(there.placement().story(folder)[-1], Leaving)
        await there.unload(folder)
        assert there.statistics().departures == 1
        async with await there.load(folder) as handle:
            tiny.assert_equal_to_file(handle, folder)
        assert there.statistics().fetches == 1


async def test_what_nobody_knows_is_not_looked_for(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with over(source) as other:
        (await other.load("a")).release()
        (key,) = other.placement().adapters
    async with over(source) as there:
        resolves = source.counts.resolves
        await there.unload("a", timeout=0)
        await there.unload(key, timeout=0)
        assert not there.placement().adapters
        assert source.counts.resolves == resolves
        await fails(there.unload("a", timeout=-1), errors.UsageError, "a timeout is from 0")


async def test_what_is_leased_stays_and_its_holders_are_named(tmp_path: Path) -> None:
    """Without time it does not wait, but for leases that have just ended."""
    folder = tiny.write(tmp_path / "a")
    async with loader(timeout=20) as there:
        heard: list[Event] = []
        tasks = [asyncio.create_task(there.load(folder), name=f"batch {n}") for n in range(2)]
        handles = [await task for task in tasks]
        there.subscribe(heard.append)
        caught = await fails(there.unload(folder, timeout=0.02), errors.AdapterInUseError)
        assert "leases still held after 0.02 s: 2, by batch 0, batch 1;" in str(caught)
        assert (caught.id, caught.key) == (str(folder), handles[0].key)
        assert caught.retryable
        assert [type(event) for event in heard] == [Leaving, Resident]
        assert {event.slot for event in heard} == {handles[0].slot}
        async with await there.load(folder) as another:
            assert another.slot == handles[0].slot
        handles[1].release()
        await fails(there.unload(folder, timeout=0), errors.AdapterInUseError, "after 0 s: 1, by ")
        tiny.assert_equal_to_file(handles[0], folder)
        asyncio.get_running_loop().call_soon(handles[0].release)
        await there.unload(folder, timeout=0)
        assert where(there, folder).tier == "disk"


async def test_who_streams_is_waited_for(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle:
            await fails(there.unload(folder, timeout=0), errors.AdapterInUseError)
            device.gate.set()
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, folder)
        await there.unload(folder)
        device.gate.clear()
        async with there.stream(folder):
            unloading = asyncio.create_task(there.unload(folder))
            await until(lambda: device.copies == 6)
        assert state(there, folder) == "leaving"
        assert not unloading.done(), "two copies still write to the slot"
        device.gate.set()
        await unloading
        assert where(there, folder).tier == "disk"
        assert there.statistics().loads == 1


async def test_who_waits_for_a_load_waits_on_and_gets_it_anew(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        loading = asyncio.create_task(there.load(folder))
        await until(lambda: device.copies == 2)
        slot = where(there, folder).slot
        unloading = asyncio.create_task(there.unload(folder))
        await until(lambda: state(there, folder) == "leaving")
        assert {loading.done(), unloading.done()} == {False}
        device.gate.set()
        await unloading
        async with await loading as handle:
            assert handle.slot != slot
            tiny.assert_equal_to_file(handle, folder)
        told = there.statistics()
        assert (told.departures, told.loads, told.fetches) == (1, 1, 1)


async def test_loads_that_come_meanwhile_wait(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a")) as there:
        lease = await there.load("a")
        for cancelled in (True, False):
            unloading = asyncio.create_task(there.unload("a"))
            await until(lambda: state(there, "a") == "leaving")
            assert there.try_acquire("a") is None
            loading, old = asyncio.create_task(there.load("a")), lease.slot
            await fails(there.load("a", timeout=0.02), errors.AdapterTimeoutError)
            assert not loading.done()
            unloading.cancel() if cancelled else lease.release()
            await asyncio.wait([unloading])
            async with await loading as handle:
                assert (handle.slot == old) == cancelled
                tiny.assert_equal_to_file(handle, tmp_path / "a")


async def test_one_of_several_callers_gives_up(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a")) as there:
        lease = await there.load("a")
        callers = [asyncio.create_task(there.unload("a")) for _ in range(3)]
        await until(lambda: state(there, "a") == "leaving")
        callers[0].cancel()
        await fails(there.unload("a", timeout=0), errors.AdapterInUseError)
        assert state(there, "a") == "leaving"
        lease.release()
        await asyncio.gather(*callers[1:])
        assert where(there, "a").tier == "disk"


async def test_an_unload_that_waits_does_not_hold_up_others(tmp_path: Path) -> None:
    source = make_source(tmp_path, "leased", "idle", "late")
    async with over(source, max_slots=2, starvation_age=1e6) as there:
        lease = await there.load("leased")
        (await there.load("idle")).release()
        unloading = asyncio.create_task(there.unload("leased"))
        await until(lambda: state(there, "leased") == "leaving")
        (await there.load("late", timeout=5)).release()
        lease.release()
        await unloading


async def test_a_kernel_is_waited_for(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a")) as there:
        handle = await there.load("a")
        with handle.use():
            with handle.use():
                handle.release()
            unloading, words = there.unload("a", timeout=0.02), "copies, kernels or holds"
            caught = await fails(unloading, errors.AdapterTimeoutError, words)
            assert (caught.id, caught.stage) == ("a", "ready")
            assert state(there, "a") == "leaving"
        await there.unload("a", timeout=0)
        assert where(there, "a").tier == "disk"


async def test_hundreds_of_unloads_at_once_need_no_deep_stack() -> None:
    """Each would take some calls on the stack, which has room for a thousand."""
    async with loader(max_slots=1) as there:
        names = [str(n) for n in range(250)]
        for seed, name in enumerate(names):
            (await give(there, seed, name)).release()
        held = await give(there, len(names), "held")
        loading = [asyncio.create_task(there.load(name)) for name in names]
        await asyncio.sleep(0)
        await asyncio.gather(*(there.unload(name) for name in names))
        assert used(there) > 250 * (FILE - 300), "they may still be had"
        await there.close(timeout=0)
        assert used(there) == 0
        for load in loading:
            await fails(load, errors.LoaderClosedError)
        held.release()
