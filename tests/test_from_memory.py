"""Adapters that are given as tensors: the same as their twins in files, and as long as they last."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tiny
from given import assert_holds, file_bytes, used
from lorax_async import (
    AdapterNotFoundError,
    CapacityError,
    Merge,
)
from merges import weights_of
from tiny_loaders import ONE, loader
from tiny_sources import over, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
async def test_it_is_what_its_twin_in_a_file_is(
    tmp_path: Path, device: str, dtype: torch.dtype, stored: str
) -> None:
    folder = tiny.write(tmp_path / "twin", 3, dtype=dtype, use_rslora=True)
    given = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    async with loader(device=device, dtype=stored) as there:
        config = tiny.config(use_rslora=True)
        async with await there.load_tensors("mine", given, config) as handle:
            tiny.assert_equal_to_file(handle, folder)
            async with await there.load(folder) as twin:
                assert weights_of(handle).keys() == weights_of(twin).keys()
                for name, module in handle.modules.items():
                    assert module.scale == twin.modules[name].scale
                    assert torch.equal(module.a, twin.modules[name].a)
                assert handle.key != twin.key
            assert (handle.id, handle.resident) == ("mine", True)


async def test_every_call_finds_it_by_its_name(tmp_path: Path) -> None:
    given = tiny.tensors(5)
    async with over(stocked(tmp_path)) as there:
        first = await there.load_tensors("mine", given, tiny.config())
        for handle in (
            await there.load("mine"),
            await there.load("mine", token="anybody's"),
            there.try_acquire("mine"),
            await there.load(first.key),
        ):
            assert handle is not None
            assert (handle.key, handle.slot) == (first.key, first.slot)
            handle.release()
        async with there.stream("mine") as handle:
            await handle.layer_ready(3)
            assert_holds(handle, given)
        await there.pin("mine")
        assert where(there, "mine").pins == 1
        assert there.unpin("mine")
        await there.prefetch(["mine"])
        await there.prefetch("mine", tier="host")
        assert there.story("mine")[0].key == first.key
        with pytest.raises(AdapterNotFoundError):
            await there.load("mine", revision="main")
        first.release()


async def test_it_is_a_part_of_merges(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    given = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    async with over(source) as there:
        (await there.load_tensors("mine", given, tiny.config())).release()
        plain = await there.load(Merge("ties", ["a", "b"], [0.5, -2], density=0.5))
        mixed = await there.load(Merge("ties", ["a", "mine"], [0.5, -2], density=0.5))
        expected = weights_of(plain)
        assert all(torch.equal(t, expected[name]) for name, t in weights_of(mixed).items())
        plain.release()
        mixed.release()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_it_comes_back_after_it_was_evicted(tmp_path: Path, device: str) -> None:
    source = stocked(tmp_path, "a", "b")
    given = tiny.tensors(5)
    expected = {name: tensor.clone() for name, tensor in given.items()}
    async with over(source, max_slots=2, device=device) as there:
        (await there.load_tensors("mine", given, tiny.config())).release()
        for tensor in given.values():
            tensor.fill_(7)  # the caller trains on
        for _ in range(3):
            for name in "ab":
                (await there.load(name)).release()
            found = where(there, "mine")
            assert (found.tier, found.state, found.device_bytes) == ("host", "held", 0)
            assert found.host_bytes == used(there) > file_bytes()
            async with await there.load("mine") as handle:
                assert_holds(handle, expected)
                assert where(there, "mine").device_bytes >= ONE
        assert there.statistics().fetches == 3


async def test_unloaded_it_is_gone(tmp_path: Path) -> None:
    source = stocked(tmp_path, "mine", "b")
    given = tiny.tensors(5)
    async with over(source) as there:
        (await there.load("mine")).release()
        first = await there.load_tensors("mine", given, tiny.config())
        assert_holds(first, given)
        key = first.key
        first.release()
        await there.pin("mine")
        await there.unload("mine")
        assert key not in there.residency()
        assert used(there) == 0
        assert not there._machinery.driver.files.plans.keys() & {key}
        with pytest.raises(AdapterNotFoundError, match="give them again"):
            await there.load(key)
        async with await there.load("mine") as handle:  # the source's, as before
            tiny.assert_equal_to_file(handle, tmp_path / "mine")
        source.remove("mine")
        async with await there.load_tensors("mine", given, tiny.config()) as handle:
            assert (handle.key, handle.resident) == (key, True)
            assert_holds(handle, given)
        await there.unload(key)
        with pytest.raises(AdapterNotFoundError):
            await there.load("mine")
        assert used(there) == 0


async def test_who_waits_while_it_is_unloaded_gets_it_and_then_it_goes(tmp_path: Path) -> None:
    async with over(stocked(tmp_path)) as there:
        given = tiny.tensors(5)
        first = await there.load_tensors("mine", given, tiny.config())
        unloading = asyncio.create_task(there.unload("mine"))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(there.load("mine"))
        await asyncio.sleep(0.01)
        assert {unloading.done(), waiting.done()} == {False}
        first.release()
        await unloading
        async with await waiting as handle:
            assert_holds(handle, given)
            assert used(there) > 0
            with pytest.raises(AdapterNotFoundError):
                await there.load("mine")
        assert used(there) == 0
        assert not there.residency()


async def test_the_budget_is_kept_and_freed_exactly(tmp_path: Path) -> None:
    async def body(room: int) -> None:
        async with over(stocked(tmp_path), memory_bytes=room, spill=False) as there:
            (await there.load_tensors("one", tiny.tensors(1), tiny.config())).release()
            one = used(there)
            (await there.load_tensors("two", tiny.tensors(2), tiny.config())).release()
            assert used(there) == 2 * one
            with pytest.raises(CapacityError, match="memory_bytes") as caught:
                await there.load_tensors("three", tiny.tensors(3), tiny.config())
            assert (caught.value.id, caught.value.retryable) == ("three", True)
            with pytest.raises(CapacityError) as caught:
                await there.load_tensors("three", tiny.tensors(3, 64), tiny.config(64))
            assert caught.value.retryable is False
            await there.unload("one")
            assert used(there) == one
            (await there.load_tensors("three", tiny.tensors(3), tiny.config())).release()
            assert used(there) == 2 * one
            await there.close()
            assert used(there) == 0

    header = 4096  # more than the header of this adapter, and less than a third one takes
    await body(2 * (file_bytes() + header))
