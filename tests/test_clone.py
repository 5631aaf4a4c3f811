"""Clones of handles, and computing beside copies: `clone`, `queue_behind`, `use`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from common import Run, until
from lorax_async import (
    AdapterHandle,
    AdapterInUseError,
    AdapterTimeoutError,
    HandleClosedError,
    TransferError,
    UsageError,
)
from tiny_loaders import gated, loader
from tiny_sources import WEIGHTS, is_resident, over, simulated, state, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

MODULE = f"model.layers.{tiny.LAYERS - 1}.mlp.up_proj"


def weights_of(folder: Path) -> torch.Tensor:
    return load_file(folder / WEIGHTS)[f"base_model.model.{MODULE}.lora_B.weight"]


async def test_two_leases_that_end_by_themselves(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        handle = await there.load("a")
        clone = handle.clone()
        assert (clone.id, clone.key, clone.slot) == ("a", handle.key, handle.slot)
        assert where(there, "a").leases == 2
        handle.release()
        with pytest.raises(HandleClosedError):
            handle.clone()
        tiny.assert_equal_to_file(clone, tmp_path / "a")
        with pytest.raises(AdapterTimeoutError):
            await there.load("b", timeout=0.02)
        clone.release()
        clone.release()
        (await there.load("b")).release()


async def test_a_clone_names_who_took_it(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")

    async def cloned(handle: AdapterHandle) -> AdapterHandle:
        return handle.clone()

    async with over(source) as there:
        handle = await asyncio.create_task(there.load("a"), name="prefill")
        clone = await asyncio.create_task(cloned(handle), name="decode")
        for held, by in ((2, "decode, prefill"), (1, "decode")):
            with pytest.raises(AdapterInUseError, match=f": {held}, by {by};"):
                await there.unload("a", timeout=0)
            handle.release()
        clone.release()


def test_only_on_the_loaders_loop(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        async with loader(timeout=20) as there, await there.load(folder) as handle:
            for elsewhere in (handle.clone, lambda: asyncio.run(_call(handle.clone))):
                with pytest.raises(UsageError, match="event loop of its loader"):
                    await asyncio.to_thread(elsewhere)
            assert where(there, folder).leases == 1

    async def _call(clone: Callable[[], AdapterHandle]) -> AdapterHandle:
        return clone()

    run(body())


async def test_on_an_adapter_that_is_leaving(tmp_path: Path) -> None:
    """Who has it may have it twice, and it leaves after both."""
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        handle = await there.load("a")
        unloading = asyncio.create_task(there.unload("a"))
        await until(lambda: state(there, "a") == "leaving")
        clone = handle.clone()
        handle.release()
        await asyncio.sleep(0)
        assert not unloading.done()
        tiny.assert_equal_to_file(clone, tmp_path / "a")
        clone.release()
        await unloading


async def test_on_an_adapter_that_broke(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.failing = {3}
        async with there.stream(folder) as handle:
            with pytest.raises(TransferError):
                await handle.layer_ready(3)
            with pytest.raises(TransferError):
                handle.clone()
            with pytest.raises(TransferError):
                handle.queue_behind(3)
        await until(lambda: state(there, folder) == "present")


async def test_a_clone_of_a_stream_is_waited_for_by_layers(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle, handle.clone() as clone:
            assert not clone.resident
            device.gate.set()
            await clone.layer_ready(3, timeout=20)
            tiny.assert_equal_to_file(clone, folder)


async def test_behind_copies_on_a_device_that_computes_at_once(tmp_path: Path) -> None:
    """Nothing has been asked for while a copy waits in its thread; then all has happened."""
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle:
            assert not handle.queue_behind(0)
            assert not handle.queue_behind(3)
            assert handle.queue_behind(-1), "a layer without tensors has nothing to wait for"
            with pytest.raises(UsageError, match="outside"):
                handle.queue_behind(tiny.LAYERS + 1)
            device.gate.set()
            await handle.layer_ready(3)
            assert handle.queue_behind(3)
            assert await asyncio.to_thread(handle.queue_behind, 3)
        with pytest.raises(HandleClosedError):
            handle.queue_behind(3)


async def test_a_kernel_behind_copies_sees_their_bytes(tmp_path: Path) -> None:
    """It is put on its stream before they have run; the device orders the two."""
    source = stocked(tmp_path, "a", rank=8)
    seen: list[torch.Tensor] = []
    async with over(source, device="simulated") as there:
        device = simulated(there)
        row, streams = there.layout.index(MODULE), (None, device.stream("another"))
        source.hold("a")
        async with there.stream("a") as handle:
            assert not handle.queue_behind(0), "no copy has been asked for"
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
    for tensor in seen:
        assert torch.equal(tensor, weights_of(tmp_path / "a"))


async def test_a_stream_of_another_device_is_refused(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source, device="simulated") as there, await there.load("a") as handle:
        with (
            pytest.raises(UsageError, match="a stream of another device"),
            handle.use(object()),
        ):
            pass
        handle.release()
        await there.unload("a", timeout=0)


@pytest.mark.parametrize("release", ["inside", "after"])
async def test_a_slot_is_kept_until_the_device_has_computed(tmp_path: Path, release: str) -> None:
    source = stocked(tmp_path, "a", "b")
    go = threading.Event()
    seen: list[torch.Tensor] = []
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
        with pytest.raises(AdapterTimeoutError):
            await there.load("b", timeout=0.05)
        assert state(there, "a") == "leaving"
        go.set()
        async with await waiting as other:
            assert torch.equal(seen[0], weights_of(tmp_path / "a"))
            tiny.assert_equal_to_file(other, tmp_path / "b")
        assert is_resident(there, "b")


async def test_a_stream_waits_for_the_layers_before_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the device's copies have."""
    source = stocked(tmp_path, "a", rank=8)
    async with over(source, device="simulated") as there:
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
