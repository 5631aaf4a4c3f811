"""The loader as its callers see it, on real files and the CPU device."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from common import Run, our_threads, until
from lorax_async import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterLoader,
    AdapterNotFoundError,
    AdapterRef,
    AdapterTimeoutError,
    BytesMoved,
    CapacityError,
    ConfigError,
    Event,
    Failed,
    HandleClosedError,
    LayerReady,
    Leaving,
    LoaderClosedError,
    LoaderConfig,
    Resident,
    SlotGranted,
    TransferError,
    UsageError,
)
from lorax_async.io.devices.gated import POISON, GatedDevice
from lorax_async.io.fakes import FakeSource
from lorax_async.io.ports import FilePieces

pytestmark = pytest.mark.usefixtures("nothing_left")

ONE = 4 * 2 * 1536
"""Device bytes of one tiny F32 adapter of rank 4: 4 layers of A [4, 32] and B [64, 4], twice."""


def loader(**settings: object) -> AdapterLoader:
    plain: dict[str, object] = {"device_bytes": 1 << 20, "max_slots": 4, "io_threads": 2}
    return AdapterLoader(tiny.layout(), LoaderConfig(**(plain | settings)))  # type: ignore[arg-type]


def gated(device_bytes: int = 1 << 20, slots: int = 4) -> tuple[AdapterLoader, GatedDevice]:
    layout = tiny.layout()
    device = GatedDevice(layout, dtype="F32", nbytes=device_bytes, slots=slots)
    config = LoaderConfig(device_bytes=device_bytes, max_slots=slots, io_threads=2)
    return AdapterLoader(layout, config, device=device), device


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", None])
def test_the_device_holds_the_files_bytes(
    run: Run, tmp_path: Path, stored: torch.dtype, wanted: str | None
) -> None:
    folder = tiny.write(tmp_path / "a", rank=3, dtype=stored, lora_alpha=6)

    async def body() -> None:
        async with loader(dtype=wanted) as there, await there.load(folder) as handle:
            tiny.assert_equal_to_file(handle, folder)
            module = handle.modules["model.layers.0.mlp.up_proj"]
            assert module.a.dtype is getattr(torch, wanted or "float32")
            assert (module.rank, module.scale) == (3, 2.0)
            assert handle.rank == 3
            assert handle.layers == (0, 1, 2, 3)
            assert handle.resident

    run(body())


def test_the_tables_name_what_the_handle_shows(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
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

    run(body())


def test_a_thousand_loads_are_one(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
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

    run(body())


def test_layers_come_one_by_one(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there, device = gated()
        async with there:
            device.gate.clear()
            async with there.stream(folder) as handle:
                assert not handle.resident
                assert not handle.is_ready(0)
                assert handle.is_ready(-1), "a layer without tensors is ready once it has its slot"
                with pytest.raises(UsageError, match="layer 0 is not here yet"):
                    handle.modules["model.layers.0.mlp.up_proj"]
                with pytest.raises(UsageError, match="outside -1 … 4"):
                    await handle.layer_ready(5)
                with pytest.raises(UsageError, match="would hold the event loop"):
                    handle.wait_layer(0)
                with pytest.raises(AdapterTimeoutError, match="layer 0"):
                    await asyncio.to_thread(handle.wait_layer, 0, 0.01)
                waiting = asyncio.create_task(asyncio.to_thread(handle.wait_layer, 4, 30))
                device.gate.set()
                await handle.layer_ready(3)
                await waiting
                assert handle.layers[-1] == 3
                tiny.assert_equal_to_file(handle, folder)

    run(body())


@pytest.mark.parametrize("verb", ["load", "stream"])
def test_who_streams_gets_layers_in_order_who_loads_the_files(
    run: Run, tmp_path: Path, verb: str
) -> None:
    """Sorted by name a file has layer 10 before layer 2."""
    folder = tiny.write(tmp_path / "a", layers=12)

    async def body() -> None:
        layout = tiny.layout(layers=12)
        device = GatedDevice(layout, dtype="F32", nbytes=1 << 20, slots=1)
        offsets: list[int] = []
        plain_copy = device.copy

        def noting(pieces: FilePieces, *rest: Any) -> Any:
            offsets.append(pieces.reads[0].file_offset)
            return plain_copy(pieces, *rest)

        device.copy = noting  # type: ignore[assignment, method-assign]
        config = LoaderConfig(device_bytes=1 << 20, max_slots=1, io_threads=1)
        async with AdapterLoader(layout, config, device=device) as there:
            if verb == "load":
                (await there.load(folder)).release()
                assert offsets == sorted(offsets)
            else:
                async with there.stream(folder) as handle:
                    await handle.layer_ready(11)
                in_layer_order = [0, 1, *range(4, 12), 2, 3]
                assert [sorted(offsets).index(o) for o in offsets] == in_layer_order

    run(body())


def test_events_tell_the_whole_way(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        heard: list[Event] = []

        def broken(event: Event) -> None:
            raise RuntimeError("a subscriber's own fault")

        async with loader(device_bytes=ONE, max_slots=1) as there:
            there.subscribe(broken)
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
            other = tiny.write(tmp_path / "b", seed=1)
            (await there.load(other)).release()
            assert Leaving in {type(e) for e in heard if e.key == heard[0].key}
            stop()
            before = len(heard)
            (await there.load(folder)).release()
            assert len(heard) == before
            assert [type(e) for e in there.story(folder)][-2:] == [SlotGranted, Resident]

    run(body())


def test_the_least_recently_used_makes_room(run: Run, tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]

    async def body() -> None:
        async with loader(device_bytes=2 * ONE, max_slots=8) as there:
            for folder in (folders[0], folders[1], folders[0], folders[2]):
                (await there.load(folder)).release()
            assert there.try_acquire(folders[1]) is None
            for folder in (folders[0], folders[2]):
                handle = there.try_acquire(folder)
                assert handle is not None
                tiny.assert_equal_to_file(handle, folder)
                handle.release()
            async with await there.load(folders[1]) as handle:
                tiny.assert_equal_to_file(handle, folders[1])

    run(body())


def test_waiting_for_room_ends_with_the_lease(run: Run, tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)

    async def body() -> None:
        async with loader(max_slots=1) as there:
            first = await there.load(a)
            with pytest.raises(AdapterTimeoutError) as caught:
                await there.load(b, timeout=0.05)
            assert caught.value.stage == "queue"
            assert caught.value.retryable
            waiting = asyncio.create_task(there.load(b))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            first.release()
            async with await waiting as second:
                tiny.assert_equal_to_file(second, b)

    run(body())


def test_the_urgent_go_first(run: Run, tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]

    async def body() -> None:
        async with loader(max_slots=1) as there:
            held = await there.load(folders[0])
            order: list[int] = []

            async def late(n: int, priority: int) -> None:
                async with await there.load(folders[n], priority=priority):
                    order.append(n)

            slow = asyncio.create_task(late(1, 0))
            await asyncio.sleep(0.02)
            fast = asyncio.create_task(late(2, 5))
            await asyncio.sleep(0.02)
            held.release()
            await asyncio.gather(slow, fast)
            assert order == [2, 1]

    run(body())


def test_a_starving_request_ends_new_leases(run: Run, tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)

    async def body() -> None:
        async with loader(max_slots=1, starvation_age=0.05) as there:
            held = await there.load(a)
            waiting = asyncio.create_task(there.load(b))
            for _ in range(200):
                renewed = there.try_acquire(a)
                if renewed is None:
                    break
                held.release()
                held = renewed
                await asyncio.sleep(0.005)
            else:
                pytest.fail("the adapter in use was leased for ever")
            held.release()
            (await waiting).release()

    run(body())


def test_a_deadline_names_the_stage_it_ran_out_in(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
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

    run(body())


def test_wanted_again_while_its_fetch_is_ending(run: Run, tmp_path: Path) -> None:
    """The fetch that nobody wanted ends into the next one of the same key."""
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        source = FakeSource()
        source.put("a", *tiny.files(folder))
        config = LoaderConfig(device_bytes=1 << 20, max_slots=1)
        async with AdapterLoader(tiny.layout(), config, source=source) as there:
            for _ in range(3):
                source.put("a", *tiny.files(folder))
                source.hold("a")
                with pytest.raises(AdapterTimeoutError):
                    await there.load("a", timeout=0.02)
                source.allow("a", *range(4))
                async with await there.load("a", timeout=10) as handle:
                    tiny.assert_equal_to_file(handle, folder)
        assert source.counts.open_readers == 0

    run(body())


def test_a_failure_is_told_once(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there, device = gated()
        async with there:
            heard: list[Event] = []
            there.subscribe(heard.append)
            device.failing = {0}
            with pytest.raises(TransferError):
                await there.load(folder)
            (failed,) = [event for event in heard if isinstance(event, Failed)]
            assert failed.slot is not None

    run(body())


def test_what_never_fits_fails_at_once(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        async with loader(device_bytes=ONE - 64) as there:
            with pytest.raises(CapacityError, match="raise device_bytes") as caught:
                await there.load(folder)
            assert not caught.value.retryable
            assert str(folder) in str(caught.value)

    run(body())


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_saved_again_adapter_loads_anew(run: Run, tmp_path: Path, change: str) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
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

    run(body())


def test_a_string_needs_a_root(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "roots" / "a")
    other = tiny.write(tmp_path / "elsewhere")

    async def body() -> None:
        async with loader(local_roots=(tmp_path / "roots",)) as there:
            async with await there.load(str(folder)) as handle:
                assert handle.id == str(folder)
            with pytest.raises(AccessDeniedError):
                await there.load(str(other))
            with pytest.raises(AdapterNotFoundError):
                await there.load(tmp_path / "nothing")
            with pytest.raises(ConfigError):
                await there.load("org/name")
            async with await there.load(AdapterRef(folder)) as handle:
                again = there.try_acquire(handle.key)
                assert again is not None
                again.release()
            with pytest.raises(UsageError, match="itself"):
                await there.load(AdapterRef(folder), revision="main")
            with pytest.raises(UsageError, match="not int"):
                await there.load(3)  # type: ignore[arg-type]

    run(body())


def test_a_released_handle_shows_nothing(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        async with loader() as there:
            handle = await there.load(folder)
            modules = handle.modules
            thread = threading.Thread(target=handle.release)
            thread.start()
            thread.join()
            handle.release()
            assert handle.released
            for use in (lambda: handle.modules, lambda: modules["model.layers.0.mlp.up_proj"]):
                with pytest.raises(HandleClosedError):
                    use()
            with pytest.raises(HandleClosedError):
                await handle.layer_ready(0)
            with pytest.raises(HandleClosedError), handle.use():
                pass

    run(body())


def test_a_handle_cannot_be_copied(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        async with loader() as there, await there.load(folder) as handle:
            for copied in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(UsageError, match="cannot be copied"):
                    copied(handle)
            assert not handle.released

    run(body())


def test_threads_that_cannot_be_had(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third thread is refused; those before it end, and the loader may be entered later."""
    start = threading.Thread.start
    seen: list[str] = []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("lorax-io"):
            seen.append(thread.name)
            if len(seen) == 3:
                raise RuntimeError("can't start new thread")
        start(thread)

    async def body() -> None:
        there = loader(io_threads=4)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", limited)
            with pytest.raises(CapacityError, match="lower io_threads"):
                await there.__aenter__()
        assert not our_threads()

    run(body())


def test_a_forgotten_handle_warns_and_is_released(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        async with loader() as there:
            handle = await there.load(folder)
            with pytest.warns(ResourceWarning, match="never released"):
                handle.__del__()
            del handle
            await until(lambda: [w.leases for w in there.residency().values()] == [0])

    run(body())


def test_a_kernel_keeps_its_bytes_after_release(run: Run, tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)

    async def body() -> None:
        async with loader(max_slots=1) as there:
            handle = await there.load(a)
            with handle.use():
                handle.release()
                with pytest.raises(AdapterTimeoutError):
                    await there.load(b, timeout=0.05)
            (await there.load(b)).release()

    run(body())


def test_close_fails_waiters_and_revokes_leases(run: Run, tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)

    async def body() -> None:
        async with loader(max_slots=1) as there:
            handle = await there.load(a)
            waiting = asyncio.create_task(there.load(b))
            await asyncio.sleep(0.01)
            await there.close(timeout=0.05)
            with pytest.raises(LoaderClosedError):
                await waiting
            with pytest.raises(HandleClosedError, match="loader was closed"):
                _ = handle.modules
            with pytest.raises(LoaderClosedError):
                await there.load(a)
            await there.close()

    run(body())


def test_close_goes_on_when_its_caller_is_cancelled(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there = loader()
        await there.__aenter__()
        handle = await there.load(folder)
        closing = asyncio.create_task(there.close(timeout=5))
        await asyncio.sleep(0.01)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        handle.release()
        await there.close()

    run(body())


def _in_a_fork(use: Callable[[], object]) -> str:
    """Name of the exception that `use` raises in a forked child."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        try:
            use()
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_opening_does_not_hold_the_loop(run: Run) -> None:
    """Claiming memory takes a while; the loop must turn meanwhile, however slowly."""

    async def body() -> None:
        turns = 0
        opening = asyncio.create_task(_open_and_close())
        while not opening.done():
            await asyncio.sleep(0.001)
            turns += 1
        await opening
        assert turns > 20

    async def _open_and_close() -> None:
        async with loader(device_bytes=512 << 20, staging_bytes=256 << 20):
            pass

    run(body())


def test_more_wait_than_are_remembered_and_all_hear_of_the_end(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        source = FakeSource()
        names = [str(n) for n in range(1100)]
        for name in names:
            source.put(name, *tiny.files(folder))
        config = LoaderConfig(device_bytes=1 << 20, max_slots=1)
        async with AdapterLoader(tiny.layout(), config, source=source) as there:
            held = await there.load(names[0])
            waiting = [asyncio.create_task(there.load(name)) for name in names[1:]]
            await until(lambda: source.counts.opens == len(names))
            closing = asyncio.create_task(there.close())
            done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
            assert {type(each) for each in done} == {LoaderClosedError}
            held.release()
            await closing

    run(body())


def test_a_failed_stream_is_counted_and_ends_its_wait(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there, device = gated()
        async with there:
            device.gate.clear()
            async with there.stream(folder) as handle:
                with pytest.raises(AdapterTimeoutError, match="layer 0"):
                    await handle.layer_ready(0, timeout=0.01)
                assert not handle._lease.tenancy._sleepers
                device.failing = {0, 1}
                device.gate.set()
                with pytest.raises(TransferError):
                    await handle.layer_ready(3)
            assert there.statistics().failures == 1

    run(body())


def test_it_belongs_to_one_loop_and_one_process(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there = loader()
        with pytest.raises(UsageError, match="enter the loader first"):
            await there.load(folder)
        async with there:
            loop = asyncio.get_running_loop()
            with pytest.raises(UsageError, match="event loop that entered it"):
                await asyncio.to_thread(lambda: asyncio.run(there.load(folder)))
            handle = await asyncio.to_thread(
                lambda: asyncio.run_coroutine_threadsafe(there.load(folder), loop).result()
            )
            handle.release()
            with pytest.raises(UsageError, match="entered before"):
                await there.__aenter__()
            async with await there.load(folder) as held:
                with pytest.raises(UsageError, match="awaited on the event loop"):
                    await asyncio.to_thread(lambda: asyncio.run(held.layer_ready(0)))
                assert _in_a_fork(lambda: there.try_acquire(folder)) == "UsageError"
                assert _in_a_fork(lambda: held.modules) == "UsageError"
                assert _in_a_fork(held.release) == ""
                assert not held.released

    run(body())


def test_weights_that_are_not_finite_are_refused_when_asked(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    weights = tiny.tensors(0)
    next(iter(weights.values()))[0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, folder / "adapter_model.safetensors")

    async def body() -> None:
        async with loader() as there:
            (await there.load(folder)).release()
        async with loader(check_finite=True) as there:
            with pytest.raises(AdapterFormatError, match="NaN or infinite"):
                await there.load(folder)
            await until(lambda: not there.residency())

    run(body())


def test_later_layers_are_still_poison_when_the_first_is_right(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        layout = tiny.layout()
        device = GatedDevice(layout, dtype="F32", nbytes=1 << 20, slots=4)
        source = FakeSource()
        source.put("a", *tiny.files(folder))
        source.hold("a")
        source.allow("a", 0)
        config = LoaderConfig(device_bytes=1 << 20, max_slots=4)
        there = AdapterLoader(layout, config, source=source, device=device)
        async with there, there.stream("a", timeout=10) as handle:
            await handle.layer_ready(0)
            module = handle.modules["model.layers.0.self_attn.q_proj"]
            name = "base_model.model.model.layers.0.self_attn.q_proj"
            saved = load_file(folder / "adapter_model.safetensors")
            assert torch.equal(module.a, saved[f"{name}.lora_A.weight"])
            assert torch.equal(module.b, saved[f"{name}.lora_B.weight"])
            assert not handle.is_ready(1)
            for extent in handle._lease.tenancy.grant.extents[1:]:
                assert bool((device.host_memory(extent) == POISON).all())
            source.allow("a", 1, 2, 3)
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, folder)

    run(body())


def test_a_program_ends_without_closing_its_loader(tmp_path: Path) -> None:
    """No thread of ours keeps the interpreter, and it says what was forgotten."""
    folder = tiny.write(tmp_path / "a")
    program = f"""
import asyncio, pathlib, tiny
from lorax_async import AdapterLoader, LoaderConfig

async def main():
    loader = AdapterLoader(tiny.layout(), LoaderConfig(device_bytes=1 << 20))
    await loader.__aenter__()
    (await loader.load(pathlib.Path({str(folder)!r}))).release()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        cwd=Path(__file__).parent,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "was never closed" in done.stderr
