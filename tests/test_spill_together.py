"""Many calls at once that give, load, unload and cancel, where memory and disk are small."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

import tiny
from common import until
from given import assert_holds, put, used
from lorax_async import LoraxError
from lorax_async.adapter import TensorsKey
from spilling_loaders import FILE, entries, in_memory, nbytes_on_disk, roomy

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("seed", range(4))
async def test_all_at_once(tmp_path: Path, seed: int) -> None:
    """Budgets are kept at every moment, and whoever gets an adapter gets its own bytes."""
    random = Random(seed)
    peaks = [0, 0]
    async with roomy(tmp_path, 2.5, cache_bytes=int(6.5 * FILE)) as there:
        meaning = {str(name): {100 + name} for name in range(5)}
        for number in range(5):
            (await put(there, 100 + number, str(number))).release()

        async def call(name: str, number: int) -> None:
            verb = random.choice(["put", "put", "load", "load", "unload"])
            if verb == "put":
                meaning[name].add(number)
                handle = await put(there, number, name)
                try:
                    assert_holds(handle, tiny.tensors(number))
                finally:
                    handle.release()
            elif verb == "load":
                async with await there.load(name) as handle:
                    a = handle.modules[min(handle.modules)].a
                    known = [tiny.tensors(each) for each in meaning[name]]
                    first = f"base_model.model.{min(handle.modules)}.lora_A.weight"
                    assert any((each[first].to(a.dtype) == a).all() for each in known)
            else:
                await there.unload(name, timeout=20)

        tasks = []
        for number in range(40):
            name = random.choice(list(meaning))
            tasks.append(asyncio.create_task(call(name, number)))
            if random.random() < 0.2:
                random.choice(tasks).cancel()
            await asyncio.sleep(random.random() / 300)
            peaks[0] = max(peaks[0], used(there))
            peaks[1] = max(peaks[1], nbytes_on_disk(tmp_path))
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, LoraxError | asyncio.CancelledError), end
        await until(lambda: used(there) == sum(there._machinery.given.values()))
        assert there.statistics().spills >= 3
        meant = {key for key in there.residency() if isinstance(key, TensorsKey)}
        await until(lambda: len(entries(tmp_path)) == len(meant) - len(in_memory(there)))
    assert 0 < peaks[0] <= there.config.memory_bytes
    assert peaks[1] <= there.config.cache_bytes
    assert entries(tmp_path) == []
