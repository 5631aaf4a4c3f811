"""The loader as its callers see it: what it loads and tells, where adapters are, who asks a source."""

import asyncio
import errno
import inspect
import logging
import os
import shutil
from dataclasses import FrozenInstanceError
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from adapter_files import file_of
from cancellation_sweep import our_tasks
from event_loops import until
from tiny_loaders import ONE, fails, gated, loader
from tiny_sources import Slowed, make_source, over, state, where

from lorax_async import AdapterLoader, errors, events
from lorax_async.events import BytesMoved, Event, LayerReady, Leaving, Resident, SlotGranted
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.runtime import fetches
from lorax_async.telemetry import STORY_LENGTH
from lorax_async.testing import FakeSource, Step
from lorax_async.types import AdapterKey, AdapterRef, Ref

Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", None])
async def test_a_file_is_cast(tmp_path: Path, stored: torch.dtype, wanted: str | None) -> None:
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_weights_that_would_ruin_a_batch_are_refused(tmp_path: Path, value: float) -> None:
    """By default; a version that was looked at stays good, and another of its folder is not."""
    folder = tiny.write(tmp_path / "a")
    async with loader(max_slots=1) as there:
        for _ in range(2):  # the second copies again
            with await there.load(folder) as handle:
                tiny.assert_equal_to_file(handle, folder)
            await there.unload(folder)
        content = tiny.tensors(1, 4, torch.float32)
        list(content.values())[-1].view(-1)[-1] = value
        safetensors.torch.save_file(content, tmp_path / "new")
        os.utime(tmp_path / "new", (0, 0))
        (tmp_path / "new").rename(folder / "adapter_model.safetensors")
        await asyncio.sleep(1)  # for which a look at the folder counts
        for _ in range(2):
            with pytest.raises(errors.AdapterFormatError, match="NaN or infinite"):
                await there.load(folder)
    async with loader(check_finite=False) as there, await there.load(folder) as handle:
        assert handle.resident


async def test_a_call_is_a_coroutine_and_a_context(tmp_path: Path) -> None:
    """However a call is awaited, it holds one lease, and none after an error or a cancellation."""
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    # Frameworks await what such a function returns; Python 3.11 has no mark for it.
    marks = [inspect.iscoroutinefunction(there.load), hasattr(inspect, "markcoroutinefunction")]
    assert len({*marks}) == 1
    async with there:
        async with there.load(folder) as inside:
            assert where(there, folder).leases == 1
        assert inside.released
        with await there.load(folder) as plain:
            assert where(there, folder).leases == 1
        assert plain.released
        with pytest.raises(errors.UsageError):
            async with there.load(folder) as inside:
                await inside.layer_ready(99)
        assert inside.released
        call = there.load(folder)
        async with call, asyncio.TaskGroup() as group, asyncio.timeout(9):
            with pytest.raises(RuntimeError, match="already awaited"):
                await call
            awaited = await there.load(folder)
            (task,) = await asyncio.gather(group.create_task(there.load(folder)))
            waited = await asyncio.wait_for(there.load(folder), 9)
            async with there.fetch(folder) as files:
                assert files.path == folder
            for handle in (awaited, task, waited):
                handle.release()
        assert files.released
        assert where(there, folder).leases == 0
        loading = asyncio.create_task(there.load(folder))
        shown, stack = repr(loading), loading.get_stack()
        (await loading).release()
        assert "AdapterLoader.load() running at" in shown
        assert stack
        there.load(folder).close()  # no warning, which would be an error here
        refused = await asyncio.gather(there.load(5), return_exceptions=True)  # type: ignore[arg-type]
        assert isinstance(refused[0], errors.InvalidAdapterIdError)
        with pytest.warns(RuntimeWarning, match=r"AdapterLoader\.load' was never awaited"):
            there.load(folder)

        await there.unload(folder)
        device.gate.clear()

        async def enter() -> None:
            async with there.load(folder):
                raise AssertionError

        for steps in range(6):
            entering = asyncio.create_task(enter())
            for _ in range(steps):
                await asyncio.sleep(0)
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
        device.gate.set()
        await until(lambda: there.placement().usage.waiting == 0)
        assert there.placement().usage.leases == 0


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
        assert where(there, folder).leases == 800
        for handle in handles:
            handle.release()
        assert where(there, folder).leases == 0


async def test_a_deadline_names_the_stage_it_ran_out_in(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        caught = await fails(there.load(folder, timeout=0.3), errors.AdapterTimeoutError)
        assert (caught.stage, caught.attempt) == ("copy", 1)
        device.gate.set()
        for odd in (-1, float("nan"), float("inf"), True, "1"):
            call = there.load(folder, timeout=odd)  # type: ignore[arg-type]
            await fails(call, errors.UsageError, "a timeout is from 0")


async def test_one_plan_per_loop_turn(tmp_path: Path, monkeypatch: Patch) -> None:
    names = tuple("abcdef")
    source, turns, turn = make_source(tmp_path, *names), list[int](), count()
    for rank, name in enumerate(names, start=2):
        source.put(name, *tiny.files(tiny.write(tmp_path / name, rank=rank)))

    def planned(*what: Any, **more: Any) -> Any:
        turns.append(now[0])
        return plan_transfer(*what, **more)

    monkeypatch.setattr(fetches, "plan_transfer", planned)
    now = [0]
    async with over(source) as there:
        hints = [there.prefetch(name, tier="disk") for name in names]
        while not all(hint.done for hint in hints):
            now[0] = next(turn)
            await asyncio.sleep(0)
    assert len(set(turns)) == len(turns) == len(names)


async def test_an_adapter_with_another_config_loads_anew(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there, await there.load(folder) as old:
        before = old.modules["model.layers.0.mlp.up_proj"].a.clone()
        tiny.write(folder, seed=7, lora_alpha=16)
        async with await there.load(folder) as new:
            assert new.key != old.key
            tiny.assert_equal_to_file(new, folder)
            module = new.modules["model.layers.0.mlp.up_proj"]
            assert module.scale == 4.0
            assert torch.equal(old.modules["model.layers.0.mlp.up_proj"].a, before)


async def test_a_string_needs_a_root(tmp_path: Path) -> None:
    folder, other = tiny.write(tmp_path / "roots" / "a"), tiny.write(tmp_path / "elsewhere")
    async with loader(local_roots=(tmp_path / "roots",)) as there:
        async with await there.load(str(folder)) as handle:
            assert handle.id == str(folder)
        wrong: list[tuple[Any, type[Exception]]] = [
            (str(other), errors.AccessDeniedError),
            (tmp_path / "nothing", errors.AdapterNotFoundError),
            ("name", errors.InvalidAdapterIdError),
            (3, errors.UsageError),
        ]
        for id, error in wrong:
            await fails(there.load(id), error)
        await fails(there.load(AdapterRef(folder), revision="main"), errors.UsageError, "itself")


async def test_a_missing_adapter_is_named_by_its_path(tmp_path: Path, monkeypatch: Patch) -> None:
    """To the program, not to clients, whose ids are str."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    async with loader(local_roots=[tmp_path]) as there:
        for name, words in (
            ("gone", f"there is no such folder as '{tmp_path}/gone'"),
            ("empty", f"the folder '{tmp_path}/empty' has no adapter_config.json and no"),
        ):
            error = await fails(there.load(Path(name)), errors.AdapterNotFoundError)
            assert words in str(error)
            assert "ENOENT" not in str(error)
            error = await fails(there.load(f"./{name}"), errors.AdapterNotFoundError)
            assert str(tmp_path) not in str(error)


async def test_where_one_adapter_is_and_which_are_nearest(tmp_path: Path) -> None:
    names = ["org/disk", "org/host", "org/device"]
    async with over(make_source(tmp_path, *names, holdable=True), host_bytes=1 << 20) as there:
        assert there.placement().find("org/disk") is None
        async with await there.load("org/disk"):
            found = where(there, "org/disk")
            assert (found.tier, found.device_bytes, found.leases) == ("device", ONE, 1)
            assert found.layers == (4, 4)
        await there.unload("org/disk")
        found = where(there, "org/disk")
        assert found in there.placement().adapters.values()
        assert (found.tier, found.slot, found.layers) == ("disk", None, None)
        await there.prefetch(["org/host"], tier="host")
        (await there.load("org/device")).release()
        for number in range(4):
            nearest = there.placement().nearest(number).values()
            assert [each.tier for each in nearest] == ["device", "host", "disk"][:number]
        assert there.placement().nearest(9).items() == there.placement().adapters.items()


async def test_the_steps_of_calls(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    heard: list[events.CallEvent] = []
    async with loader() as there:
        stop = there.subscribe(heard.append, events.CallEvent)
        (await there.load(folder)).release()
        await there.pin(folder)
        await fails(there.load(tmp_path / "none"), errors.AdapterNotFoundError)
        stop()
        (await there.load(folder)).release()
    load, pin, missing = (
        [event for event in heard if event.call == number]
        for number in sorted({event.call for event in heard})
    )
    assert [type(event) for event in load] == [events.CallBegan, events.CallWaits, events.CallEnded]
    assert [type(event) for event in missing] == [events.CallBegan, events.CallEnded]
    for steps, method in ((load, "load"), (pin, "pin"), (missing, "load")):
        assert isinstance(steps[0], events.CallBegan)
        assert steps[0].method == method
        assert [event.time for event in steps] == sorted(event.time for event in steps)
    for steps, found in ((load, ("source", "fetch")), (pin, ("device", "ready"))):
        assert isinstance(steps[1], events.CallWaits)
        assert (steps[1].hit, steps[1].stage) == found
    ends = [event.error for event in heard if isinstance(event, events.CallEnded)]
    assert [type(error) for error in ends] == [type(None)] * 2 + [errors.AdapterNotFoundError]


async def test_events_tell_the_whole_way(tmp_path: Path) -> None:
    folder, other = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    heard: list[Event] = []
    async with loader(device_bytes=ONE, max_slots=1) as there:
        stop = there.subscribe(heard.append)
        (await there.load(folder)).release()
        kinds = [type(event) for event in heard]
        assert kinds[:2] == [events.HeaderChecked, SlotGranted]
        assert kinds[-1] is Resident
        assert kinds.count(LayerReady) <= 4
        assert sum(e.nbytes for e in heard if isinstance(e, BytesMoved)) == ONE
        assert heard[0].slot is None
        assert {e.slot for e in heard[1:]} == {heard[1].slot}
        layers = [e.layer for e in heard if isinstance(e, LayerReady)]
        assert layers == sorted(layers)
        assert layers[-1] == 3
        story = there.placement().story(folder)
        assert story == (heard[1], heard[-1])
        assert there.placement().story(other) == ()
        (await there.load(other)).release()
        assert Leaving in {type(e) for e in heard if e.key == heard[0].key}
        stop()
        stop()
        before = len(heard)
        (await there.load(folder)).release()
        assert len(heard) == before
        assert len(story) == 2, "what was given out does not grow"
        assert [type(e) for e in there.placement().story(folder)][-2:] == [SlotGranted, Resident]
        for _ in range(STORY_LENGTH):
            (await there.load(other)).release()
            (await there.load(folder)).release()
        assert len(there.placement().story(folder)) <= STORY_LENGTH


@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError("mine")], ids=type)
async def test_subscribers_come_go_and_fail_without_disturbing_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """A result of a cancelled future raises CancelledError, which is no Exception."""
    source, heard, late = make_source(tmp_path, "a"), list[Event](), list[Event]()

    def fail(event: Event) -> None:
        assert event in there.placement().story(event.key)
        stop_failing()
        there.subscribe(late.append)
        raise error

    async with over(source) as there:
        stop_failing = there.subscribe(fail, SlotGranted)
        for _ in range(2):
            there.subscribe(heard.append)
        with caplog.at_level(logging.ERROR, "lorax_async"):
            (await there.load("a")).release()
        await there.unload("a")
        (record,) = caplog.records
        assert record.getMessage() == "a subscriber failed on SlotGranted"
        assert record.exc_info is not None
        assert record.exc_info[1] is error
        assert heard[::2] == heard[1::2]
        kinds = [type(heard[0]), *(type(event) for event in heard[-4::2])]
        assert kinds == [events.HeaderChecked, Leaving, events.SlotFreed]
        assert late == heard[4::2]


async def test_statistics_are_sums_and_a_snapshot(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        empty = there.statistics()
        for name in "aab":
            (await there.load(name)).release()
        source.fail("resolve", errors.AdapterNotFoundError("ordered"))
        await fails(there.load("c"), errors.AdapterNotFoundError)
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


REF = AdapterRef("one")


def slow(tmp_path: Path) -> tuple[FakeSource, Slowed, AdapterLoader]:
    source = make_source(tmp_path, "one", "two")
    return source, Slowed(source, "resolve"), over(source)


async def start_loads(loader: AdapterLoader, ref: Ref, times: int) -> list[asyncio.Task[Any]]:
    """Calls whose question is under way."""
    tasks = [asyncio.create_task(loader.load(ref)) for _ in range(times)]
    for _ in range(4):
        await asyncio.sleep(0)
    return tasks


async def ends(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """The keys, or what went wrong; every handle is released."""
    found = await asyncio.gather(*tasks, return_exceptions=True)
    for each in found:
        if not isinstance(each, BaseException):
            each.release()
    return [each if isinstance(each, BaseException) else each.key for each in found]


async def test_another_scope_asks_for_itself(tmp_path: Path) -> None:
    """One caller's answer says nothing about what another may see."""
    source, resolving, loader = slow(tmp_path)
    others: list[Any] = [{"token": "a"}, {"token": "b"}, {"revision": "main"}, {"source": "s3"}]
    refs = [REF, AdapterRef(Path("one")), *(AdapterRef("one", **other) for other in others)]
    async with loader:
        tasks = [task for ref in refs for task in await start_loads(loader, ref, 2)]
        assert set(our_tasks()) == {"lorax resolve one"}, "no name tells a token"
        resolving.may_go_on.set()
        await ends(tasks)
        assert source.counts.resolves == len(refs)


async def test_a_cancelled_caller_leaves_the_others_their_answer(tmp_path: Path) -> None:
    source, resolving, loader = slow(tmp_path)
    async with loader:
        tasks = await start_loads(loader, REF, 3)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert (tasks[0].cancelled(), resolving.cancelled) == (True, 0)
        for task in tasks[1:]:
            assert resolving.cancelled == 0
            task.cancel()
            await asyncio.wait([task])
        await until(lambda: resolving.cancelled == 1)
        assert loader.placement().find(REF) is None
        await until(lambda: not our_tasks())
        tasks = await start_loads(loader, REF, 3)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        resolving.may_go_on.set()
        _, second, third = await ends(tasks)
        assert isinstance(second, AdapterKey)
        assert second == third
        assert (source.counts.resolves, resolving.cancelled) == (1, 1)


@pytest.mark.parametrize("step", ["resolve", "open", "fetch_groups"])
@pytest.mark.parametrize(
    ("short", "named"),
    [
        (MemoryError(), "ulimit -v"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory.max"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "ulimit -v"),
    ],
    ids=["memory", "ENOMEM", "threads", "torch"],
)
async def test_a_process_at_its_limits_says_which(
    step: Step, short: Exception, named: str, tmp_path: Path
) -> None:
    source, resolving, loader = slow(tmp_path)
    resolving.may_go_on.set()
    source.fail(step, short)
    async with loader:
        error = await fails(loader.load(REF), errors.CapacityError, named)
        assert ";" in str(error)
        assert error.retryable
        async with await loader.load(REF):
            pass


async def test_each_caller_has_an_error_of_its_own(tmp_path: Path) -> None:
    source, resolving, loader = slow(tmp_path)
    order = errors.AccessDeniedError("not yours")
    order.__cause__ = cause = OSError("403")
    async with loader:
        source.fail("resolve", order)
        tasks = await start_loads(loader, REF, 3)
        resolving.may_go_on.set()
        found = await ends(tasks)
        assert len(set(map(id, found))) == 3
        for error in found:
            assert isinstance(error, errors.AccessDeniedError)
            assert (error.id, error.stage, error.retryable) == ("one", "resolve", False)
            assert (error.problem, error.__cause__) == ("not yours", cause)
        source.fail("resolve", errors.LoraxError("something", stage="verify"))
        await fails(loader.load(REF), errors.LoraxError, "adapter 'one', stage verify: something")
        source.fail("resolve", foreign := ZeroDivisionError("oops"))
        caught = await fails(loader.load(REF), errors.InternalError, "ZeroDivisionError: oops")
        assert caught.__cause__ is foreign
        (await loader.load(REF)).release()  # and the next question is a new one


async def test_the_last_answer_is_known(tmp_path: Path, monkeypatch: Patch) -> None:
    source, resolving, loader = slow(tmp_path)
    resolving.may_go_on.set()
    async with loader:
        await ends(await start_loads(loader, REF, 1))
        assert state(loader, "one") == "resident"
        assert loader.placement().find(AdapterRef("one", token="theirs")) is None
        assert source.counts.resolves == 1
        source.put("one", *tiny.files(tiny.write(tmp_path / "one", 7)))
        assert state(loader, "one") == "resident"
        async with await loader.load("one") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        source.remove("one")
        await fails(loader.load("one"), errors.AdapterNotFoundError)
        assert state(loader, "one") == "nowhere"
        assert loader.try_acquire("one") is None
        monkeypatch.setattr("lorax_async.runtime.resolver.MAX_REMEMBERED", 3)
        for name in "abcad":
            source.put(name, *tiny.files(tmp_path / "two"))
            await loader.prefetch(name, tier="disk")
        assert [state(loader, name) for name in "abcd"] == ["present", "nowhere", *["present"] * 2]


@pytest.mark.parametrize("steps", range(8))
async def test_the_loader_closes_and_a_caller_is_cancelled(tmp_path: Path, steps: int) -> None:
    _, resolving, loader = slow(tmp_path)
    await loader.__aenter__()
    first, *others = await start_loads(loader, REF, 3)
    closing = asyncio.create_task(loader.close())
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = first.cancel()
    end, *ends_of_others = await ends([first, *others])
    assert type(end) is (asyncio.CancelledError if cancelled else errors.LoaderClosedError)
    for error in ends_of_others:
        assert isinstance(error, errors.LoaderClosedError)
    await closing
    assert resolving.cancelled == 1
    assert our_tasks() == []


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_tensors_may_lie_in_any_order(tmp_path: Path, device: str) -> None:
    """Every A before every B, and the layers back to front: each layer is several spans."""
    one = tiny.write(tmp_path / "one", 3)
    saved = safetensors.torch.load_file(one / "adapter_model.safetensors")
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(one / "adapter_config.json", odd)
    order = sorted(sorted(saved, reverse=True), key=lambda name: "lora_B" in name)
    content = file_of([(name, saved[name]) for name in order])
    (odd / "adapter_model.safetensors").write_bytes(content)
    for dtype in ("float32", "bfloat16"):
        small = loader(device=device, dtype=dtype, staging_bytes=4096)
        async with small as there, there.stream(odd) as handle:
            await handle.layer_ready(0)
            await handle.layer_ready(tiny.LAYERS - 1)
            tiny.assert_equal_to_file(handle, one)
