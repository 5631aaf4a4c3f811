"""The loader as its callers see it, on real files and the CPU device."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

import tiny
from common import until
from lorax_async import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterLoader,
    AdapterNotFoundError,
    AdapterRef,
    AdapterTimeoutError,
    BytesMoved,
    Event,
    Failed,
    InvalidAdapterIdError,
    LayerReady,
    Leaving,
    LoaderConfig,
    Resident,
    SlotGranted,
    TransferError,
    UsageError,
)
from lorax_async.testing import FakeSource
from tiny_loaders import ONE, gated, loader, on_device

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


async def test_events_tell_the_whole_way(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
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


async def test_wanted_again_while_its_fetch_is_ending(tmp_path: Path) -> None:
    """The fetch that nobody wanted ends into the next one of the same key."""
    folder = tiny.write(tmp_path / "a")
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
    from safetensors.torch import save_file

    save_file(weights, folder / "adapter_model.safetensors")
    async with loader() as there:
        (await there.load(folder)).release()
    async with loader(check_finite=True) as there:
        with pytest.raises(AdapterFormatError, match="NaN or infinite"):
            await there.load(folder)
        await until(lambda: not on_device(there))
