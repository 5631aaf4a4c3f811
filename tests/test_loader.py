"""The loader as its callers see it: what it loads, where adapters are, and what it tells."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from common import until
from lorax_async import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterKey,
    AdapterNotFoundError,
    AdapterRef,
    AdapterTimeoutError,
    BytesMoved,
    Event,
    Failed,
    InvalidAdapterIdError,
    LayerReady,
    Leaving,
    Resident,
    SlotGranted,
    SlotId,
    TransferError,
    UsageError,
)
from lorax_async.core.transfer_plan import plan_transfer
from lorax_async.runtime import planning
from lorax_async.runtime.journal import STORY_LENGTH, Journal
from tiny_loaders import ONE, gated, loader, on_device
from tiny_sources import over, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", None])
async def test_the_device_holds_the_files_bytes(
    tmp_path: Path, stored: torch.dtype, wanted: str | None
) -> None:
    folder = tiny.write(tmp_path / "a", rank=3, dtype=stored, lora_alpha=6)
    async with loader(dtype=wanted) as there, await there.load(folder) as handle:
        tiny.assert_equal_to_file(handle, folder)
        module = handle.modules["model.layers.0.mlp.up_proj"]
        assert module.a.dtype is getattr(torch, wanted or "float32")
        assert (module.rank, module.scale) == (3, 2.0)
        assert handle.rank == 3
        assert handle.layers == (0, 1, 2, 3)
        assert handle.resident
        moved = there.statistics().nbytes
        assert moved["copy"] == handle.nbytes
        same = stored is module.a.dtype
        assert moved.get("stage", 0) == (0 if same else 8 * 3 * 96 * stored.itemsize)


async def test_the_tables_name_what_the_handle_shows(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there:
        device = there.device
        async with await there.load(folder) as handle:
            slot = handle.slot.index
            for name, module in handle.modules.items():
                row = there.layout.index(name)
                assert device.address[0, row, slot] == module.a.data_ptr()  # type: ignore[attr-defined]
                assert device.address[1, row, slot] == module.b.data_ptr()  # type: ignore[attr-defined]
                assert device.rank[row, slot] == 4  # type: ignore[attr-defined]
                assert device.scale[row, slot] == 2.0  # type: ignore[attr-defined]
        assert int(device.rank.count_nonzero()) == 8  # type: ignore[attr-defined]


async def test_a_thousand_loads_are_one(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        tasks = [asyncio.create_task(there.load(folder)) for _ in range(1000)]
        await until(lambda: device.copies == 2)
        for task in tasks[::5]:
            task.cancel()
        device.gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        handles = [h for h in done if not isinstance(h, BaseException)]
        assert sum(isinstance(h, asyncio.CancelledError) for h in done) == 200
        assert len(handles) == 800
        assert device.copies == 4
        assert there.statistics().fetches == 1
        (where,) = there.residency().values()
        assert where.leases == 800
        for handle in handles:
            handle.release()
        (where,) = there.residency().values()
        assert where.leases == 0


async def test_a_deadline_names_the_stage_it_ran_out_in(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.load(folder, timeout=0.05)
        assert (caught.value.stage, caught.value.attempt) == ("copy", 1)
        device.gate.set()
        for odd in (-1, float("nan"), float("inf"), True, "1"):
            with pytest.raises(UsageError, match="a timeout is from 0"):
                await there.load(folder, timeout=odd)  # type: ignore[arg-type]


async def test_a_load_that_comes_while_a_fetch_is_ending_begins_the_next(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source, max_slots=1) as there:
        for _ in range(3):
            source.put("a", *tiny.files(tmp_path / "a"))
            source.hold("a")
            with pytest.raises(AdapterTimeoutError):
                await there.load("a", timeout=0.02)
            source.allow("a", *range(4))
            async with await there.load("a", timeout=10) as handle:
                tiny.assert_equal_to_file(handle, tmp_path / "a")
    assert source.counts.open_readers == 0


async def test_many_headers_are_planned_in_turns_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each, so that no caller waits for those of others."""
    names = tuple("abcdef")
    source, turns, turn = stocked(tmp_path, *names), list[int](), 0
    ticking = True
    loop, plan = asyncio.get_running_loop(), plan_transfer

    def tick() -> None:
        nonlocal turn
        turn += 1
        if ticking:
            loop.call_soon(tick)

    def planned(*what: Any, **more: Any) -> Any:
        turns.append(turn)
        return plan(*what, **more)

    monkeypatch.setattr(planning, "plan_transfer", planned)
    for rank, name in enumerate(names, start=2):
        source.put(name, *tiny.files(tiny.write(tmp_path / name, rank=rank)))
    async with over(source) as there:
        tick()
        await asyncio.gather(*(there.prefetch(name, tier="disk").task for name in names))
        assert len(set(turns)) == len(turns) == len(names)
        ticking = False


@pytest.mark.parametrize("change", ["weights", "config"])
async def test_a_saved_again_adapter_loads_anew(tmp_path: Path, change: str) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there, await there.load(folder) as old:
        before = old.modules["model.layers.0.mlp.up_proj"].a.clone()
        if change == "weights":
            tiny.write(folder, seed=7)
        else:
            text = json.dumps(tiny.config(lora_alpha=16))
            (folder / "adapter_config.json").write_text(text)
        async with await there.load(folder) as new:
            assert new.key != old.key
            tiny.assert_equal_to_file(new, folder)
            module = new.modules["model.layers.0.mlp.up_proj"]
            assert module.scale == (2.0 if change == "weights" else 4.0)
            assert torch.equal(old.modules["model.layers.0.mlp.up_proj"].a, before)


async def test_a_string_needs_a_root(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "roots" / "a")
    other = tiny.write(tmp_path / "elsewhere")
    async with loader(local_roots=(tmp_path / "roots",)) as there:
        async with await there.load(str(folder)) as handle:
            assert handle.id == str(folder)
        with pytest.raises(AccessDeniedError):
            await there.load(str(other))
        with pytest.raises(AdapterNotFoundError):
            await there.load(tmp_path / "nothing")
        with pytest.raises(InvalidAdapterIdError):
            await there.load("name")
        async with await there.load(AdapterRef(folder)) as handle:
            again = there.try_acquire(handle.key)
            assert again is not None
            again.release()
        with pytest.raises(UsageError, match="itself"):
            await there.load(AdapterRef(folder), revision="main")
        with pytest.raises(UsageError, match="not int"):
            await there.load(3)  # type: ignore[arg-type]


async def test_weights_that_are_not_finite_are_refused_when_asked(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    weights = tiny.tensors(0)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    async with loader() as there:
        (await there.load(folder)).release()
    async with loader(check_finite=True) as there:
        with pytest.raises(AdapterFormatError, match="NaN or infinite"):
            await there.load(folder)
        await until(lambda: not on_device(there))


# -- where adapters are ---------------------------------------------------------------------------


async def test_where_one_adapter_is_and_which_are_nearest(tmp_path: Path) -> None:
    """Device, host, disk; more than there are is all."""
    names = ["org/disk", "org/host", "org/device"]
    source = stocked(tmp_path, *names, holdable=True)
    async with over(source, host_bytes=1 << 20) as there:
        assert there.whereabouts("org/disk") is None
        for name in names[:2]:
            async with await there.load(name):
                where = there.whereabouts(name)
                assert where is not None
                assert (where.tier, where.device_bytes, where.leases) == ("device", ONE, 1)
                assert where.layers == (4, 4)
            await there.unload(name)
        where = there.whereabouts("org/disk")
        assert where is not None
        assert where in there.residency().values()
        assert (where.tier, where.slot, where.layers) == ("disk", None, None)
        await there.prefetch(["org/host"], tier="host")
        (await there.load("org/device")).release()
        for number in range(4):
            found = there.residency(nearest=number)
            assert [each.tier for each in found.values()] == ["device", "host", "disk"][:number]
        assert there.residency(nearest=9).items() == there.residency().items()


# -- what it tells --------------------------------------------------------------------------------


async def test_events_tell_the_whole_way(tmp_path: Path) -> None:
    """A story has the turning points alone: there are hundreds of layers and bytes."""
    folder, other = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    heard: list[Event] = []
    async with loader(device_bytes=ONE, max_slots=1) as there:
        stop = there.subscribe(heard.append)
        (await there.load(folder)).release()
        kinds = [type(event) for event in heard]
        assert kinds[0] is SlotGranted
        assert kinds[-1] is Resident
        assert kinds.count(LayerReady) <= 4
        assert sum(e.nbytes for e in heard if isinstance(e, BytesMoved)) == ONE
        assert {e.slot for e in heard} == {heard[0].slot}
        layers = [e.layer for e in heard if isinstance(e, LayerReady)]
        assert layers == sorted(layers)
        assert layers[-1] == 3
        story = there.story(folder)
        assert story == (heard[0], heard[-1])
        assert there.story(other) == ()
        (await there.load(other)).release()
        assert Leaving in {type(e) for e in heard if e.key == heard[0].key}
        stop()
        stop()
        before = len(heard)
        (await there.load(folder)).release()
        assert len(heard) == before
        assert len(story) == 2, "what was given out does not grow"
        assert [type(e) for e in there.story(folder)][-2:] == [SlotGranted, Resident]
        for _ in range(STORY_LENGTH):
            (await there.load(other)).release()
            (await there.load(folder)).release()
        assert len(there.story(folder)) <= STORY_LENGTH


async def test_subscribers_come_go_and_fail_without_disturbing_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A result of a cancelled future raises CancelledError, which is no Exception."""
    source, heard, late = stocked(tmp_path, "a"), list[Event](), list[Event]()
    errors = [ValueError("mine"), asyncio.CancelledError("mine")]

    def fail(event: Event) -> None:
        assert event in there.story(event.key) or isinstance(event, LayerReady | BytesMoved)
        stop_failing()
        there.subscribe(late.append)
        raise errors[0]

    async with over(source) as there:
        for number, error in enumerate(errors):
            errors[0] = error
            caplog.clear()
            stop_failing = there.subscribe(fail)
            stops = [there.subscribe(heard.append) for _ in range(2)]
            with caplog.at_level(logging.ERROR, "lorax_async"):
                async with await there.load("a") as handle:
                    pass
            await there.unload("a")
            (record,) = caplog.records
            assert record.getMessage() == "a subscriber failed on SlotGranted"
            assert record.exc_info is not None
            assert record.exc_info[1] is error
            told = [event for event in heard if event.slot == handle.slot]
            assert told[::2] == told[1::2]
            assert [type(told[0]), type(told[-1])] == [SlotGranted, Leaving]
            assert [event for event in late[: len(told)] if event == told[0]] == [told[0]] * number
            for stop in stops:
                stop()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_subscriber_may_end_the_program(error: type[BaseException]) -> None:
    journal = Journal()

    def leave_program(event: Event) -> None:
        raise error

    journal.subscribe(leave_program)
    with pytest.raises(error):
        journal.tell(Resident(AdapterKey("somewhere", ()), SlotId(0, 1), 1, 0.0))


async def test_a_failure_is_told_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        device.failing = {0}
        with pytest.raises(TransferError):
            await there.load(folder)
        (failed,) = [event for event in heard if isinstance(event, Failed)]
        assert failed.slot is not None


async def test_statistics_are_sums_and_a_snapshot(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        empty = there.statistics()
        for name in "aab":
            (await there.load(name)).release()
        source.fail("resolve", AdapterNotFoundError("ordered"))
        with pytest.raises(AdapterNotFoundError):
            await there.load("c")
        told = there.statistics()
        assert (told.fetches, told.loads, told.departures, told.failures) == (2, 2, 1, 0)
        assert told.bytes_moved == 2 * ONE
        assert {"resolve", "fetch", "queue", "copy"} <= set(told.seconds)
        assert min(told.seconds.values()) >= 0
        assert (empty.loads, empty.bytes_moved, dict(empty.seconds)) == (0, 0, {})
        with pytest.raises(TypeError):
            told.seconds["copy"] = 2.0  # type: ignore[index]
        with pytest.raises(FrozenInstanceError):
            told.loads = 5  # type: ignore[misc]
