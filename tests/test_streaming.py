"""Layers that are used one by one, while the later ones are on their way."""

from __future__ import annotations

import asyncio
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from common import until
from lorax_async import (
    AdapterLoader,
    AdapterTimeoutError,
    HandleClosedError,
    LoaderConfig,
    TransferError,
    UsageError,
)
from lorax_async.io.devices.gated import POISON, GatedDevice
from lorax_async.io.ports import FilePieces
from lorax_async.testing import FakeSource
from tiny_loaders import gated

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_layers_come_one_by_one(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
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


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_who_streams_gets_layers_in_order_who_loads_the_files(
    tmp_path: Path, verb: str
) -> None:
    """Sorted by name a file has layer 10 before layer 2."""
    folder = tiny.write(tmp_path / "a", layers=12)
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


async def test_later_layers_are_still_poison_when_the_first_is_right(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
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
            assert bool((device.host_view(extent) == POISON).all())
        source.allow("a", 1, 2, 3)
        await handle.layer_ready(3)
        tiny.assert_equal_to_file(handle, folder)


async def test_a_failed_stream_is_counted_and_ends_its_wait(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
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


async def test_a_release_ends_the_waits_of_others(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle:
            waits = [
                asyncio.create_task(handle.layer_ready(3, timeout=30)),
                asyncio.create_task(asyncio.to_thread(handle.wait_layer, 3, 15)),
            ]
            await asyncio.sleep(0.02)
            handle.release()
            ended, _ = await asyncio.wait(waits, timeout=10)
            device.gate.set()
            assert len(ended) == 2
            for wait in waits:
                with pytest.raises(HandleClosedError):
                    await wait


async def test_who_comes_later_hears_of_the_layers_that_came_before(tmp_path: Path) -> None:
    """While many copies are under way the loop is not woken for each; a caller is told all."""
    folder, may_go_on = tiny.write(tmp_path / "a", layers=12), threading.Event()
    layout = tiny.layout(layers=12)
    device = GatedDevice(layout, dtype="F32", nbytes=1 << 20, slots=1)
    begun, ended, plain_copy = count(), list[Any](), device.copy

    def copy(*what: Any) -> Any:
        if next(begun) >= 2:
            may_go_on.wait(20)
        ended.append(plain_copy(*what))
        return ended[-1]

    device.copy = copy  # type: ignore[assignment, method-assign]
    config = LoaderConfig(device_bytes=1 << 20, max_slots=1, io_threads=1)
    async with AdapterLoader(layout, config, device=device) as there:
        loading = asyncio.create_task(there.load(folder))
        await until(lambda: len(ended) == 2)
        await asyncio.sleep(0.02)
        assert there.statistics().bytes_moved == 0
        async with there.stream(folder) as handle:
            try:
                await handle.layer_ready(1, timeout=5)
                assert len(ended) == 2
            finally:
                may_go_on.set()
        (await loading).release()
