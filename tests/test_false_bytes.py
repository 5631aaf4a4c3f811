"""Bytes that turn out to be others than were promised, while somebody uses them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

import tiny
from common import until
from false_bytes import told_false, watched
from lorax_async import AdapterHandle, Failed, IntegrityError
from lorax_async.io.devices.gated import GatedDevice
from tiny_sources import over, simulated, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


def bytes_of(device: GatedDevice, handle: AdapterHandle) -> set[int]:
    """All that its extents hold."""
    extents = handle._lease.tenancy.grant.extents
    return {int(byte) for each in extents for byte in device.view(each)}


async def test_who_holds_what_is_false_is_told_by_whatever_he_does(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "other")
    source.hold_verification("a")
    events: list[object] = []
    async with over(source) as there, await there.load("other") as other:
        there.subscribe(events.append)
        handle = await there.load("a")
        clone = handle.clone()
        waiting = [asyncio.create_task(each.verified()) for each in (handle, clone)]
        told_false(source)
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        for error in errors:
            assert type(error) is IntegrityError
            assert (error.id, error.key, error.stage) == ("a", handle.key, "verify")
        assert errors[0] is not errors[1]
        with pytest.raises(IntegrityError, match="not what was promised"):
            await handle.layer_ready(0)
        with pytest.raises(IntegrityError, match="not what was promised"):
            await asyncio.to_thread(clone.wait_layer, 3)
        with pytest.raises(IntegrityError), handle.use():
            raise AssertionError("a kernel would run")
        for use in (lambda: handle.modules, clone.clone, lambda: handle.queue_behind(0)):
            with pytest.raises(IntegrityError):
                use()
        assert there.try_acquire("a") is None
        failed = [event for event in events if isinstance(event, Failed)]
        assert [(event.key, event.slot) for event in failed] == [(handle.key, handle.slot)]
        assert there.statistics().failures == 1
        handle.release()
        clone.release()
        await until(lambda: state(there, "a") == "nowhere")
        tiny.assert_equal_to_file(other, tmp_path / "other")
        async with await there.load("a") as again:
            tiny.assert_equal_to_file(again, tmp_path / "a")
        assert source.counts.brings == 3, "nothing of it was kept"


async def test_its_slot_is_zeroed_once_nobody_reads_it_and_before_it_is_free(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a", "b", "c", "d", "e")
    source.hold_verification("a")
    there, device = watched(source)
    freed: list[set[int]] = []
    async with there:
        handle = await there.load("a")
        clear, grant = device.clear_column, handle._lease.tenancy.grant

        def cleared(slot: int) -> None:
            if slot == grant.slot.index:
                freed.append(bytes_of(device, handle))
            clear(slot)

        device.clear_column = cleared  # type: ignore[method-assign]
        with handle.use():
            told_false(source)
            with pytest.raises(IntegrityError):
                await handle.verified()
            handle.release()
            others = [await there.load(name) for name in "bcd"]
            waiting = asyncio.create_task(there.load("e"))
            await asyncio.sleep(0.02)
            assert bytes_of(device, handle) != {0}, "zeroed under a kernel"
            assert not waiting.done()
        last = await waiting
        assert freed == [{0}]
        assert last.slot.index == grant.slot.index
        for name, each in zip("bcde", (*others, last), strict=True):
            tiny.assert_equal_to_file(each, tmp_path / name)
            each.release()


async def test_an_image_of_what_is_false_is_not_used_again(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    async with over(source, device="simulated", pinned_bytes=1 << 20) as there:
        (await there.load("a")).release()
        assert sum(each.pinned_bytes for each in there.residency().values()) > 0
        told_false(source)
        await until(lambda: state(there, "a") == "nowhere")
        assert not there.residency()
        before, copies = source.counts.bytes_read, simulated(there).copies
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")
        assert simulated(there).copies > copies
        assert source.counts.bytes_read - before == sum(
            tensor.nbytes for tensor in tiny.tensors(0).values()
        )


async def test_a_slot_that_cannot_be_zeroed_is_free_all_the_same(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    there, device = watched(source)

    def wipe(_: object) -> None:
        raise RuntimeError("the device has its moods")

    device.wipe = wipe  # type: ignore[assignment, method-assign]
    async with there:
        (await there.load("a")).release()
        told_false(source)
        await until(lambda: state(there, "a") == "nowhere")
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")


async def test_closing_waits_for_the_zeros(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    there, device = watched(source)
    begun, may_end, wipe = threading.Event(), threading.Event(), device.wipe

    def slowly(extents: object) -> object:
        begun.set()
        may_end.wait(20)
        return wipe(extents)  # type: ignore[arg-type]

    device.wipe = slowly  # type: ignore[assignment, method-assign]
    async with there:
        handle = await there.load("a")
        told_false(source)
        with pytest.raises(IntegrityError):
            await handle.verified()
        handle.release()
        await until(begun.is_set)
        closing = asyncio.create_task(there.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        may_end.set()
        await closing
