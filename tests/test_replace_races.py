"""A replacement that comes in the midst of other calls, at the worst moment of each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from common import until
from given import assert_holds, give, put, used
from lorax_async import AdapterHandle, AdapterLoader, AdapterNotFoundError, Merge, UsageError
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.testing import FakeSource
from tiny_loaders import loader
from tiny_sources import over, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

MERGE = Merge("linear", ["mine", "a"], [1, 0.5])


class Gated(FakeSource):
    """Answers resolves once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        answer = await super().resolve(ref)
        await self.gate.wait()
        return answer


def gated_source(base: Path) -> Gated:
    source = Gated()
    source.put("a", *tiny.files(tiny.write(base / "a")))
    return source


def assert_is_of(merged: AdapterHandle, seed: int) -> None:
    """Rows of A are those of its first part, times that one's scale of 2."""
    for name, module in merged.modules.items():
        part = tiny.tensors(seed)[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(module.a[:4], 2 * part)


@pytest.mark.parametrize("held", [True, False])
async def test_while_a_merge_of_it_is_resolved(tmp_path: Path, held: bool) -> None:
    source = gated_source(tmp_path)
    async with over(source) as there:
        old = await give(there, 1)
        if not held:
            old.release()
        source.gate.clear()
        loading = asyncio.create_task(there.load(MERGE))
        await until(lambda: source.counts.resolves == 1)
        (await put(there, 2)).release()
        later = asyncio.create_task(there.load(MERGE))
        await asyncio.sleep(0.01)
        source.gate.set()
        for task in (loading, later):
            async with await task as handle:
                assert_is_of(handle, 2)
        old.release()


@pytest.mark.parametrize("end", ["replaced", "unloaded"])
async def test_while_a_merge_of_it_waits_for_room(tmp_path: Path, end: str) -> None:
    """Its part is gone when it gets the room: what the id means by then is merged."""
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        (await give(there, 1)).release()
        (await there.load(MERGE)).release()
        only = await there.load("b")
        loading = asyncio.create_task(there.load(MERGE))
        await asyncio.sleep(0.01)
        if end == "replaced":
            replacing = asyncio.create_task(
                there.replace("mine", tiny.tensors(2), tiny.config(), priority=9)
            )
            await asyncio.sleep(0.02)
            only.release()
            (await replacing).release()
            async with await loading as handle:
                assert_is_of(handle, 2)
        else:
            await there.unload("mine")
            only.release()
            with pytest.raises(AdapterNotFoundError, match="part 1"):
                await loading
            assert used(there) == 0


async def test_while_what_a_source_has_is_resolved(tmp_path: Path) -> None:
    source = gated_source(tmp_path)
    async with over(source) as there:
        source.gate.clear()
        loading = asyncio.create_task(there.load("a"))
        await until(lambda: source.counts.resolves == 1)
        new = await put(there, 2, "a")
        source.gate.set()
        async with await loading as handle:
            assert handle.key == new.key
        new.release()
        assert there.statistics().fetches == 1


def _slowed(there: AdapterLoader, go_on: asyncio.Event) -> asyncio.Event:
    """From here on the next lease is given once `go_on` is set; it is there when this is set."""
    acquiring: Any = there._acquiring
    plainly, leased = acquiring.lease, asyncio.Event()

    async def slowly(*given: Any, **named: Any) -> Any:
        acquiring.lease = plainly
        lease = await plainly(*given, **named)
        leased.set()
        try:
            await go_on.wait()
        except asyncio.CancelledError:
            lease.end()
            raise
        return lease

    acquiring.lease = slowly
    return leased


async def test_while_it_is_pinned() -> None:
    async with loader() as there:
        old = await give(there, 1)
        old_key = old.key
        old.release()
        go_on = asyncio.Event()
        leased = _slowed(there, go_on)
        pinning = asyncio.create_task(there.pin("mine"))
        await leased.wait()
        new = await put(there, 2)
        go_on.set()
        await pinning
        assert there.residency()[new.key].pins == 1
        assert old_key not in there.residency()
        new.release()


async def test_the_new_one_is_leaving_when_it_is_to_be_pinned() -> None:
    """It is loaded once more, for a pin holds nothing that goes."""
    async with loader() as there:
        (await give(there, 1)).release()
        await there.pin("mine")
        go_on = asyncio.Event()
        leased = _slowed(there, go_on)
        replacing = asyncio.create_task(put(there, 2))
        await leased.wait()
        (key,) = [key for key in there.residency() if key != where_is(there, "mine")]
        unloading = asyncio.create_task(there.unload(key))
        await asyncio.sleep(0)
        go_on.set()
        async with await replacing as new:
            assert new.key == key
            assert_holds(new, tiny.tensors(2))
        await unloading
        assert where(there, "mine").pins == 1
        assert there.statistics().loads == 3


def where_is(there: AdapterLoader, name: str) -> AdapterKey | None:
    return there._acquiring.known(AdapterRef(name))


async def test_while_it_is_unloaded() -> None:
    """What it meant goes, and the new meaning stays."""
    async with loader() as there:
        old = await give(there, 1)
        unloading = asyncio.create_task(there.unload("mine"))
        await asyncio.sleep(0)
        new = await put(there, 2)
        old.release()
        await unloading
        async with await there.load("mine") as handle:
            assert handle.key == new.key
        assert there.residency().keys() == {new.key}
        new.release()


async def test_while_the_same_is_given_by_another_name() -> None:
    """Neither call's end takes the bytes from the other."""
    async with loader() as there:
        (await give(there, 1)).release()
        go_on = asyncio.Event()
        leased = _slowed(there, go_on)
        slow = asyncio.create_task(put(there, 2))
        await leased.wait()
        (await give(there, 2, "other")).release()
        slow.cancel()
        await asyncio.wait([slow])
        await until(lambda: where(there, "other").leases == 0)
        async with await there.load("other") as handle:
            assert_holds(handle, tiny.tensors(2))
        with pytest.raises(UsageError, match="other tensors already"):
            await give(there, 2)
        await there.unload("other")
        assert used(there) == where(there, "mine").host_bytes


async def test_two_calls_for_one_new_name() -> None:
    """The first has it; the second one's content is nowhere afterwards."""
    async with loader() as there:
        calls = [asyncio.create_task(give(there, seed)) for seed in (1, 2, 1)]
        await asyncio.wait(calls)
        for task in (calls[0], calls[2]):
            async with await task as handle:
                assert_holds(handle, tiny.tensors(1))
        with pytest.raises(UsageError, match="other tensors already"):
            await calls[1]
        assert used(there) == where(there, "mine").host_bytes
        assert len(there.residency()) == 1


async def test_while_its_turn_has_not_come_the_same_is_unloaded_elsewhere() -> None:
    async with loader() as there:
        (await give(there, 1)).release()
        go_on = asyncio.Event()
        leased = _slowed(there, go_on)
        first = asyncio.create_task(put(there, 2))
        await leased.wait()
        second = asyncio.create_task(put(there, 3))
        await until(lambda: used(there) == 3 * where(there, "mine").host_bytes)
        (await give(there, 3, "other")).release()
        await there.unload("other")
        go_on.set()
        (await first).release()
        async with await second as handle:
            assert_holds(handle, tiny.tensors(3))
        assert used(there) == where(there, "mine").host_bytes


async def test_while_the_old_one_computes() -> None:
    """It is known until that has ended, and then no longer."""
    async with loader() as there:
        old = await give(there, 1)
        with old.use():
            old.release()
            (await put(there, 2)).release()
            assert old.key in there.residency()
        await until(lambda: old.key not in there._driver.lifecycle.lives)
        assert used(there) == where(there, "mine").host_bytes
