"""Handles: layers that come one by one, computing beside copies, clones, and how leases end."""

import asyncio
import copy
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from event_loops import until
from gated_device import GatedDevice
from safetensors.torch import load_file, save_file
from tiny_loaders import fails, gated, loader
from tiny_sources import WEIGHTS, make_source, over, simulated, state, where

from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, errors
from lorax_async.events import Event, LayerReady, Resident
from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Arena
from lorax_async.planning.transfer_plan import ReadMove

Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

MODULE = f"model.layers.{tiny.LAYERS - 1}.mlp.up_proj"


def weights_of(folder: Path) -> torch.Tensor:
    return load_file(folder / WEIGHTS)[f"base_model.model.{MODULE}.lora_B.weight"]


async def test_layers_come_one_by_one(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    weights = {n: t for n, t in tiny.tensors(0).items() if ".layers.1." not in n}
    save_file(weights, tmp_path / "a" / WEIGHTS)
    source.put("a", *tiny.files(tmp_path / "a"))
    source.hold("a")
    async with over(source) as there, there.stream("a", timeout=20) as handle:
        before = handle.resident
        assert [handle.is_ready(layer) for layer in range(-1, 5)] == [True, 0, True, 0, 0, True]
        with pytest.raises(errors.UsageError, match="layer 0 is not ready yet"):
            handle.modules["model.layers.0.mlp.up_proj"]
        for layer in (-2, 5):
            await fails(handle.layer_ready(layer), errors.UsageError, "outside -1 … 4")
            with pytest.raises(errors.UsageError, match="outside -1 … 4"):
                handle.is_ready(layer)
        with pytest.raises(errors.UsageError, match="would block the event loop"):
            handle.wait_layer(0)
        for wait in (handle.layer_ready(0, 0.01), asyncio.to_thread(handle.wait_layer, 0, 0.01)):
            await fails(wait, errors.AdapterTimeoutError, "layer 0")
        waits = {}
        for layer in (0, 2, 3):
            in_thread = asyncio.to_thread(handle.wait_layer, layer, 30)
            waits[layer] = [*map(asyncio.ensure_future, (handle.layer_ready(layer), in_thread))]
        left = asyncio.create_task(handle.layer_ready(0))
        await asyncio.sleep(0.01)
        left.cancel()
        for group, layer in enumerate((0, 2, 3)):
            assert not any(each.done() for each in waits[layer])
            source.allow("a", group)
            await asyncio.gather(*waits[layer])
            assert [handle.is_ready(n) for n in (0, 2, 3)] == [n <= layer for n in (0, 2, 3)]
        assert (before, handle.resident) == (False, True)
        assert handle.layers == (0, 2, 3)
        assert left.cancelled()
        tiny.assert_equal_to_file(handle, tmp_path / "a")


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_order_of_reads(tmp_path: Path, verb: str) -> None:
    """Sorted by name a file has layer 10 before layer 2."""
    folder, layout = tiny.write(tmp_path / "a", layers=12), tiny.layout(layers=12)
    device = GatedDevice(layout, dtype="F32", nbytes=1 << 20, slots=1)
    offsets, plain_read = list[int](), device.read

    def noting(reader: Reader, moves: Sequence[ReadMove]) -> None:
        offsets.extend(move.file_offset for move in moves)
        plain_read(reader, moves)

    device.read = noting  # type: ignore[method-assign]
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


async def both_wait(handle: AdapterHandle) -> list[asyncio.Task[None]]:
    """A task and a thread that wait for the last layer."""
    waits = [
        asyncio.create_task(handle.layer_ready(3, timeout=30)),
        asyncio.create_task(asyncio.to_thread(handle.wait_layer, 3, 15)),
    ]
    await asyncio.sleep(0.02)
    assert not any(wait.done() for wait in waits)
    return waits


async def test_a_failure_reaches_all_who_wait(tmp_path: Path) -> None:
    source, error = make_source(tmp_path, "a"), errors.FetchError("torn")
    error.__cause__ = cause = OSError("no such disk")
    source.hold("a")
    source.allow("a", 0)
    async with over(source) as there:
        async with there.stream("a", timeout=10) as handle:
            await handle.layer_ready(0)
            waits = await both_wait(handle)
            source.fail("fetch_groups", error, at=3)
            source.allow("a")
            ends = await asyncio.gather(*waits, return_exceptions=True)
            assert len({id(error), *map(id, ends)}) == 3
            for end in ends:
                assert isinstance(end, errors.FetchError)
                assert (end.id, end.key, end.__cause__) == ("a", handle.key, cause)
            for use in (handle.clone, lambda: handle.queue_behind(3), handle.use().__enter__):
                with pytest.raises(errors.FetchError):
                    use()
        assert there.statistics().failures == 1
        await fails(handle.layer_ready(3), errors.HandleClosedError, "released")
        await until(lambda: state(there, "a") == "nowhere")


async def test_a_release_ends_the_waits_of_others(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle, handle.clone() as clone:
            waits = await both_wait(handle)
            other = asyncio.create_task(clone.layer_ready(3, timeout=30))
            handle.release()
            ended, _ = await asyncio.wait(waits, timeout=10)
            assert len(ended) == 2
            for wait in waits:
                await fails(wait, errors.HandleClosedError)
            assert not other.done()
            assert not clone.resident
            device.gate.set()
            await other
            tiny.assert_equal_to_file(clone, folder)


async def test_a_kernel_behind_copies_sees_their_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", rank=8)
    seen: list[torch.Tensor] = []
    async with over(source, device="simulated") as there:
        device = simulated(there)
        row, streams = there.layout.index(MODULE), (None, device.stream("another"))
        source.hold("a")
        async with there.stream("a") as handle:
            assert not handle.queue_behind(0), "no copy has been asked for"
            assert handle.queue_behind(-1), "a layer without tensors has nothing to wait for"
            with pytest.raises(errors.UsageError, match="outside"):
                handle.queue_behind(tiny.LAYERS + 1)
            device.gate.clear()
            source.allow("a")
            await until(lambda: handle.queue_behind(3))

            def kernel() -> None:
                operands = device.operands(row, handle.slot.index)
                seen.append(operands[1].clone() if operands else torch.empty(0))

            for stream in streams:
                assert handle.queue_behind(3, stream)
                (stream or device.compute).run(kernel)
            assert not seen
            assert not handle.is_ready(0)
            device.gate.set()
            await until(lambda: len(seen) == 2)
            with pytest.raises(errors.UsageError, match="another device"):  # noqa: SIM117
                with handle.use(object()):
                    pass
    for tensor in seen:
        assert torch.equal(tensor, weights_of(tmp_path / "a"))


async def test_a_stream_awaits_all_before(tmp_path: Path, monkeypatch: Patch) -> None:
    async with over(make_source(tmp_path, "a", rank=8), device="simulated") as there:
        device, waited = simulated(there), list[object]()
        monkeypatch.setattr(device, "wait_for", lambda ticket, _: waited.append(ticket))
        device.gate.clear()
        async with there.stream("a") as handle:
            await until(lambda: handle.queue_behind(3))
            assert len(set(waited)) == 4
            assert handle.queue_behind(1)
            assert waited[4:] == waited[:2]
            device.gate.set()
            await handle.layer_ready(3)


@pytest.mark.parametrize("release", ["inside", "after"])
async def test_a_slot_is_kept_until_the_device_has_computed(tmp_path: Path, release: str) -> None:
    source = make_source(tmp_path, "a", "b")
    go, seen = threading.Event(), list[torch.Tensor]()
    async with over(source, device="simulated", max_slots=1) as there:
        device = simulated(there)
        row = there.layout.index(MODULE)
        handle = await there.load("a")

        def kernel() -> None:
            go.wait(20)
            operands = device.operands(row, 0)
            seen.append(operands[1][:, :4].clone() if operands else torch.empty(0))

        with handle.use():
            device.compute.run(kernel)
            if release == "inside":
                handle.release()
        handle.release()
        waiting = asyncio.create_task(there.load("b"))
        await fails(there.load("b", timeout=0.05), errors.AdapterTimeoutError)
        assert state(there, "a") == "leaving"
        go.set()
        async with await waiting as other:
            assert torch.equal(seen[0], weights_of(tmp_path / "a"))
            tiny.assert_equal_to_file(other, tmp_path / "b")


async def test_release_while_a_use_begins(tmp_path: Path, monkeypatch: Patch) -> None:
    """Else the slot would be given away while the use goes on."""
    async with over(make_source(tmp_path, "a", "b"), max_slots=1) as there:
        handle, getpid = await there.load("a"), os.getpid
        ending = threading.Thread(target=handle.release)

        def release_meanwhile() -> int:
            """A use asks for the process while it begins, with its lock held."""
            monkeypatch.undo()
            ending.start()
            ending.join(0.05)
            return getpid()

        monkeypatch.setattr(os, "getpid", release_meanwhile)
        with handle.use():
            ending.join(10)
            assert handle.released
            await fails(there.load("b", timeout=0.05), errors.AdapterTimeoutError)
        (await there.load("b")).release()


async def test_a_clone_is_a_lease_of_its_own(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a"), max_slots=1) as there:
        handle = await asyncio.create_task(there.load("a"), name="prefill")
        clone = handle.clone()
        assert (clone.id, clone.key, clone.slot) == ("a", handle.key, handle.slot)
        await fails(there.unload("a", timeout=0), errors.AdapterInUseError, ": 2, by .*prefill")
        handle.release()
        unloading = asyncio.create_task(there.unload("a"))
        await until(lambda: state(there, "a") == "leaving")
        async with clone.clone():
            clone.release()
            await asyncio.sleep(0)
            assert not unloading.done()
        await unloading


async def test_a_handle_is_cloned_and_awaited_only_on_its_loop(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def call(clone: Callable[[], AdapterHandle]) -> AdapterHandle:
        return clone()

    async with loader(timeout=20) as there, await there.load(folder) as handle:
        for elsewhere, words in (
            (handle.clone, "event loop of its loader"),
            (lambda: asyncio.run(call(handle.clone)), "event loop of its loader"),
            (lambda: asyncio.run(handle.layer_ready(0)), "on the event loop"),
        ):
            await fails(asyncio.to_thread(elsewhere), errors.UsageError, words)
        assert where(there, folder).leases == 1


async def test_a_released_handle_shows_nothing_and_none_can_be_copied(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there:
        handle = await there.load(folder)
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(errors.UsageError, match="cannot be copied"):
                copied(handle)
        modules = handle.modules
        await asyncio.to_thread(handle.release)
        handle.release()
        assert handle.released
        uses = (lambda: handle.modules, lambda: modules[MODULE], handle.use().__enter__)
        for use in (*uses, handle.clone):
            with pytest.raises(errors.HandleClosedError):
                use()
        await fails(handle.layer_ready(0), errors.HandleClosedError)


async def test_the_loop_decides_on_ends(tmp_path: Path, monkeypatch: Patch) -> None:
    source, deciding = make_source(tmp_path, "a"), list[int]()
    async with over(source) as there:
        handle, clear = await there.load("a"), there.device.clear_column

        def cleared(slot: int) -> None:
            deciding.append(threading.get_ident())
            clear(slot)

        def use_and_release() -> None:
            with handle.use():
                handle.release()

        monkeypatch.setattr(there.device, "clear_column", cleared)
        unloading = asyncio.create_task(there.unload("a"))
        await until(lambda: state(there, "a") == "leaving")
        await asyncio.to_thread(use_and_release)
        await unloading
        assert deciding == [threading.get_ident()]


@pytest.mark.parametrize("how", ["forgotten", "released"])
async def test_end_in_a_decision(tmp_path: Path, monkeypatch: Patch, how: str) -> None:
    """Garbage is collected anywhere, and a finalizer may release: while a slot is claimed, say."""
    source, held, leases = make_source(tmp_path, "a", "b"), list[AdapterHandle](), list[int]()
    async with over(source) as there:
        held.append(await there.load("a"))
        allocate = Arena.allocate

        def disturbed(arena: Arena, sizes: Any) -> Any:
            if held and how == "released":
                held[0].release()
            held.clear()
            leases.append(where(there, "a").leases)
            return allocate(arena, sizes)

        monkeypatch.setattr(Arena, "allocate", disturbed)
        if how == "forgotten":
            with pytest.warns(ResourceWarning, match="never released"):
                (await there.load("b")).release()
        else:
            (await there.load("b")).release()
        await until(lambda: where(there, "a").leases == 0)
        assert leases[0] == 1


async def test_a_subscriber_unpins(tmp_path: Path, monkeypatch: Patch) -> None:
    source, told = make_source(tmp_path, "a", "b", "c"), list[str]()
    async with over(source, max_slots=2) as there:
        await there.pin("a")
        clear = there.device.clear_column

        def cleared(slot: int) -> None:
            told.append("cleared")
            clear(slot)

        def hear(event: Event) -> None:
            if isinstance(event, LayerReady) and event.layer == 3 and not told:
                told.append("last layer")
                assert there.unpin("a")
            if isinstance(event, Resident) and event.key.location == "memory:b":
                told.append("resident")

        monkeypatch.setattr(there.device, "clear_column", cleared)
        source.hold("b")
        async with there.stream("b"):
            waiting = asyncio.create_task(there.load("c"))
            await until(lambda: state(there, "c") == "present")
            there.subscribe(hear)
            source.allow("b")
            (await waiting).release()
            assert told[:3] == ["last layer", "resident", "cleared"]
