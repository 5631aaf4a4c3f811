"""Prefetches: each tier, their place behind everybody else, their errors and their end."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterNotFoundError,
    AdapterRef,
    AdapterTimeoutError,
    Event,
    FetchError,
    IntegrityError,
    InvalidAdapterIdError,
    LoaderClosedError,
    Prefetch,
    UsageError,
)
from lorax_async.runtime.whereabouts import TierName
from tiny_loaders import ONE, loader
from tiny_sources import granted, is_at, is_resident, over, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("ids", ["one", ("one", "two")], ids=["one", "several"])
@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_each_tier(tmp_path: Path, tier: TierName, ids: str | tuple[str, ...]) -> None:
    source = stocked(tmp_path, "one", "two", "three", holdable=True)
    wanted = (ids,) if isinstance(ids, str) else ids
    async with over(source) as there:
        await there.prefetch(ids, tier=tier)
        found = list(there.residency().values())
        assert [(each.tier, each.leases) for each in found] == [(tier, 0)] * len(wanted)
        assert all(is_at(there, name, tier) for name in wanted)
        moved = len(wanted) if tier == "device" else 0
        held = len(wanted) if tier == "host" else 0
        assert there.statistics().bytes_moved == moved * ONE
        assert (source.counts.populates, source.counts.opens) == (held, len(wanted))
        async with await there.load("one") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        assert source.counts.opens == len(wanted)
    assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)


async def test_it_begins_at_once_whoever_waits(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]
    async with loader(local_roots=(tmp_path,)) as there:
        ids = (id for id in (folders[0], AdapterRef(folders[1]), str(folders[2])))
        there.prefetch(ids)
        await until(lambda: all(is_resident(there, folder) for folder in folders[:2]))
        await until(lambda: is_resident(there, str(folders[2])))
        handle = there.try_acquire(folders[0])
        assert handle is not None
        async with handle:
            await there.prefetch(handle.key, tier="disk")
        nothing = there.prefetch([])
        assert nothing.done
        await nothing


async def test_what_is_wrong_is_told_by_the_call(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with pytest.raises(UsageError, match="one of disk, host, device, not 'gpu'"):
            there.prefetch("a", tier="gpu")  # type: ignore[arg-type]
        with pytest.raises(InvalidAdapterIdError, match="not int"):
            there.prefetch(["a", 3])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="a timeout is from 0"):
            there.prefetch("a", timeout=-1)
        for odd in (None, "high", 0.5, True, 10**400):
            with pytest.raises(UsageError, match="a priority is a whole number"):
                there.prefetch("a", priority=odd)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="a priority is a whole number"):
                await there.load("a", priority=odd)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert source.counts.resolves == 0


async def test_it_takes_nothing_from_leases_and_pins(tmp_path: Path) -> None:
    """However long it waits: it is no reason to end new leases."""
    source = stocked(tmp_path, "leased", "pinned", "late")
    async with over(source, max_slots=2, starvation_age=0.01) as there:
        await there.pin("pinned")
        lease = await there.load("leased")
        late = there.prefetch("late", timeout=0.1)
        with pytest.raises(AdapterTimeoutError) as caught:
            await late
        assert caught.value.stage == "queue"
        another = there.try_acquire("leased")
        assert another is not None
        for handle in (lease, another):
            handle.release()
        await there.prefetch("late")
        assert [is_at(there, n, "device") for n in ("leased", "pinned", "late")] == [0, 1, 1]


async def test_every_foreground_wish_goes_before(tmp_path: Path) -> None:
    """Also one that comes later and is of low priority."""
    names = ("held", "hint", "urgent hint", "late", "later")
    source = stocked(tmp_path, *names)
    async with over(source, max_slots=1, starvation_age=60) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        held = await there.load("held")
        hints = [there.prefetch("hint"), there.prefetch("urgent hint", priority=9)]
        await until(lambda: all(state(there, name) == "present" for name in names[1:3]))
        loads = [asyncio.create_task(there.load(n, priority=-9)) for n in names[3:]]
        await until(lambda: all(state(there, name) == "present" for name in names[3:]))
        held.release()
        for load in loads:
            (await load).release()
        for hint in hints:
            await hint
        assert granted(heard) == ["held", "late", "later", "urgent hint", "hint"]


async def test_nobody_waits_for_its_network(tmp_path: Path) -> None:
    """A slot is not claimed for what is still on its way; one who joins it in haste has it."""
    source = stocked(tmp_path, "slow", "here")
    async with over(source, max_slots=1, io_threads=1) as there:
        source.hold("slow")
        source.allow("slow", 0)
        hint = there.prefetch("slow")
        await until(lambda: source.counts.brings == 1)
        (await there.load("here", timeout=20)).release()
        assert not hint.done
        async with there.stream("slow", timeout=20) as handle:
            await handle.layer_ready(0)
            assert not handle.is_ready(1)
            source.allow("slow")
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, tmp_path / "slow")
        await hint
        assert source.counts.brings == 2


async def test_errors_in_the_order_of_the_ids(tmp_path: Path) -> None:
    source = stocked(tmp_path, "good", "late")
    async with over(source) as there:
        source.hold("late")
        source.fail("bring", FetchError("the wire broke"), id="late", at=3)
        hint = there.prefetch(["good", "late", "missing"])
        await until(lambda: hint.errors)
        assert list(hint.errors) == ["missing"]
        assert not hint.done
        source.allow("late")
        with pytest.raises(FetchError, match="the wire broke") as caught:
            await hint
        assert caught.value.id == "late"
        assert {id: type(error) for id, error in hint.errors.items()} == {
            "late": FetchError,
            "missing": AdapterNotFoundError,
        }
        assert is_at(there, "good", "device")


@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_a_failure_that_nobody_asks_for_is_quiet(tmp_path: Path, tier: TierName) -> None:
    source = stocked(tmp_path, "a")
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
    async with over(source) as there:
        source.fail("open", IntegrityError("torn"))
        hints = [there.prefetch(["a", "missing"], tier=tier)]
        await until(lambda: hints[0].done)
        assert len(hints.pop().errors) == 2
        gc.collect()
        assert not heard
        await there.prefetch("a", tier=tier)


async def test_cancel_withdraws_its_own_wishes(tmp_path: Path) -> None:
    source = stocked(tmp_path, "shared", "alone", "arrived")
    async with over(source) as there:
        for name in ("shared", "alone"):
            source.hold(name)
        hint = there.prefetch(["shared", "alone", "arrived"])
        load = asyncio.create_task(there.load("shared"))
        await until(lambda: is_resident(there, "arrived") and source.counts.brings == 3)
        hint.cancel()
        await until(lambda: state(there, "alone") == "nowhere")
        await hint
        assert not hint.errors
        assert is_resident(there, "arrived")
        assert not load.done()
        source.allow("shared")
        async with await load as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "shared")
        assert source.counts.brings == 3
        hint.cancel()  # what is over stays as it is
        await hint


async def test_who_waits_can_be_cancelled_and_it_goes_on(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")

    async def wait_for(hint: Prefetch) -> None:
        await hint

    async with over(source) as there:
        source.hold("a")
        hint = there.prefetch("a")
        waiting = [asyncio.create_task(wait_for(hint)) for _ in range(2)]
        await until(lambda: source.counts.brings == 1)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert not hint.done
        source.allow("a")
        await waiting[1]
        assert is_at(there, "a", "device")


async def test_a_deadline_of_its_own(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        source.hold("a")
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.prefetch("a", timeout=0.02)
        assert caught.value.id == "a"
        await until(lambda: state(there, "a") == "nowhere")
        source.allow("a")
        await there.prefetch("a", tier="disk", timeout=20)


async def test_close_ends_it_wherever_it_is(tmp_path: Path) -> None:
    source = stocked(tmp_path, "leased", "on the wire", "in the queue", "just begun")
    async with over(source, max_slots=1) as there:
        lease = await there.load("leased")
        source.hold("on the wire")
        hints = [there.prefetch(["on the wire", "in the queue"])]
        await until(lambda: state(there, "in the queue") == "present" and source.counts.brings == 3)
        hints += [there.prefetch(["just begun", lease.key, "leased"])]
        await asyncio.wait_for(there.close(timeout=0), 20)
        errors = [*hints[0].errors.items(), *hints[1].errors.items()]
        assert dict(errors).keys() >= {"on the wire", "in the queue", "just begun"}
        assert {type(error) for _, error in errors} == {LoaderClosedError}
        for hint in hints:
            assert hint.done
            with pytest.raises(LoaderClosedError):
                await hint
        with pytest.raises(LoaderClosedError):
            there.prefetch("leased")
