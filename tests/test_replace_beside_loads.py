"""Replacing an id while others load it, or replace it, or wait for what it was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest
import torch

import tiny
from common import until
from given import acquired, assert_holds, give, put, used
from lorax_async import (
    AdapterLoader,
    Merge,
)
from tiny_loaders import gated, loader, on_device
from tiny_sources import over, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_several_at_once_come_in_their_order() -> None:
    for seed in range(4):
        random = Random(seed)
        async with loader(max_slots=8) as there:
            (await give(there, 0)).release()
            seen: list[int] = []

            async def one(number: int) -> None:
                rank = random.choice((2, 4, 16))
                given = tiny.tensors(number, rank, dtype=torch.bfloat16)
                async with await there.replace("mine", given, tiny.config(rank)):
                    seen.append(number)

            tasks: list[asyncio.Task[None]] = []
            for number in range(1, 12):
                tasks.append(asyncio.create_task(one(number)))
                await asyncio.sleep(random.random() / 2000)
            gone = random.sample(tasks[:-1], 4)
            for task in gone:
                task.cancel()
                await asyncio.sleep(random.random() / 2000)
            await asyncio.wait(tasks)
            assert seen == sorted(seen)
            assert seen[-1] == 11
            async with await there.load("mine") as handle:
                given = tiny.tensors(11, handle.rank, dtype=torch.bfloat16)
                assert_holds(handle, given)
            await until(lambda: len(on_device(there)) == 1)
            assert there.residency().keys() == {handle.key}
            only = there.residency()[handle.key]
            # The thread of one that was cancelled has its memory until its step is through.
            await until(lambda: used(there) == only.host_bytes)


async def test_while_many_load_each_sees_one_version_whole() -> None:
    versions = [tiny.tensors(seed) for seed in range(8)]

    async def body(device: str) -> None:
        async with loader(device=device, max_slots=6) as there:
            (await there.load_tensors("mine", versions[0], tiny.config())).release()
            ended = False
            known = 0
            seen = set()

            async def one(number: int) -> None:
                while not ended:
                    least = known
                    call = there.load("mine") if number % 5 else there.load("mine", token="t")
                    async with await call as handle:
                        name, found = next(iter(handle.modules.items()))
                        a = f"base_model.model.{name}.lora_A.weight"
                        (version,) = (
                            n for n, given in enumerate(versions) if torch.equal(given[a], found.a)
                        )
                        assert_holds(handle, versions[version])
                        assert version >= least, "older than when it was asked for"
                        seen.add(version)
                        await asyncio.sleep(0)

            tasks = [asyncio.create_task(one(number)) for number in range(50)]
            for number in range(1, 8):
                (await there.replace("mine", versions[number], tiny.config())).release()
                known = number
                await asyncio.sleep(0.01)
            ended = True
            await asyncio.gather(*tasks)
            assert {1, 7} <= seen
            await until(lambda: len(there.residency()) == 1)
            (last,) = there.residency().values()
            await until(lambda: used(there) == last.host_bytes)

    await body("cpu")
    await body("simulated")


async def test_merges_follow(tmp_path: Path) -> None:
    """Also one that is on its way when its part is replaced and leaves."""
    source = stocked(tmp_path, "a")
    merge = Merge("linear", ["mine", "a"], [1, 0.5])
    async with over(source, max_slots=8) as there:
        (await give(there, 1)).release()
        async with await there.load(merge) as first:
            before = first.key

        async def load() -> None:
            (await there.load(merge)).release()

        loading: list[asyncio.Task[None]] = []
        for seed in range(2, 12):
            loading += [asyncio.create_task(load()) for _ in range(2)]
            await asyncio.sleep(0.0003 * (seed % 4))
            (await put(there, seed)).release()
            assert there.try_acquire(merge) is None
        await asyncio.gather(*loading)
        async with await there.load(merge) as last, acquired(there) as part:
            assert last.key != before
            module = "model.layers.3.mlp.up_proj"
            assert torch.equal(last.modules[module].a[:4], 2 * part.modules[module].a)
            assert_holds(part, tiny.tensors(11))
        await there.unload("mine")
        assert there.try_acquire(merge) is None


async def test_who_waits_for_the_old_one_gets_the_old_one() -> None:
    there, device = gated(slots=3)
    async with there:
        (await give(there, 1)).release()
        key = acquired_key(there)
        await there.prefetch("mine")
        await evict(there)
        device.gate.clear()
        waiting = [asyncio.create_task(there.load("mine")) for _ in range(3)]
        await until(lambda: state(there, "mine") == "filling")
        replacing = asyncio.create_task(put(there, 2))
        await asyncio.sleep(0.02)
        waiting[0].cancel()
        device.gate.set()
        new = await replacing
        for task in waiting[1:]:
            async with await task as handle:
                assert handle.key == key
                assert_holds(handle, tiny.tensors(1))
        assert new.key != key
        new.release()
        await until(lambda: key not in there.residency())


def acquired_key(there: AdapterLoader) -> object:
    handle = acquired(there)
    handle.release()
    return handle.key


async def evict(there: AdapterLoader) -> None:
    """By others, that leave afterwards."""
    for seed in (71, 72, 73):
        (await give(there, seed, f"other {seed}")).release()
    for seed in (71, 72, 73):
        await there.unload(f"other {seed}")
    assert where(there, "mine").tier == "host"
