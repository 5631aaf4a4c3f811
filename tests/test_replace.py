"""Replacing what an id means: beside the old version, in one step, and the old one ends alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest
import torch

import tiny
from common import Run, until
from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterRef,
    CapacityError,
    Event,
    Leaving,
    Merge,
    Resident,
    UsageError,
)
from test_from_memory import assert_holds, used
from tiny_loaders import ONE, gated, loader, on_device
from tiny_sources import over, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


async def give(there: AdapterLoader, seed: int, name: str = "mine") -> AdapterHandle:
    return await there.load_tensors(name, tiny.tensors(seed), tiny.config())


async def put(there: AdapterLoader, seed: int, name: str | Path = "mine") -> AdapterHandle:
    return await there.replace(name, tiny.tensors(seed), tiny.config())


def acquired(there: AdapterLoader, name: str | Path = "mine") -> AdapterHandle:
    handle = there.try_acquire(name)
    assert handle is not None
    return handle


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_new_requests_see_it_and_old_handles_keep_theirs(run: Run, device: str) -> None:
    async def body() -> None:
        async with loader(device=device) as there:
            old = await give(there, 1)
            new = await put(there, 2)
            assert old.slot != new.slot
            assert (new.id, new.resident) == ("mine", True)
            again, streamed = await there.load("mine"), there.stream("mine")
            async with again, acquired(there) as at_once, streamed as stream:
                assert {new.slot} == {again.slot, at_once.slot, stream.slot}
            another = old.clone()
            for handle, seed in ((old, 1), (another, 1), (new, 2)):
                assert_holds(handle, tiny.tensors(seed))
            assert there.story("mine")[0].key == new.key
            new.release()
            old.release()
            assert len(on_device(there)) == 2
            both = used(there)
            another.release()
            await until(lambda: len(on_device(there)) == 1)
            assert used(there) == both // 2
            assert there.residency().keys() == {new.key}

    run(body())


@pytest.mark.parametrize("kind", ["path", "str", "fake"])
def test_what_a_source_has_can_be_replaced(run: Run, tmp_path: Path, kind: str) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    name = folder if kind == "path" else str(folder) if kind == "str" else "a"
    source = stocked(tmp_path / "fake", "a", rank=2)

    async def body() -> None:
        there = over(source) if kind == "fake" else loader(local_roots=(tmp_path,))
        async with there:
            old = await there.load(name)
            before = old.key
            new = await put(there, 2, name)
            assert_holds(new, tiny.tensors(2))
            tiny.assert_equal_to_file(old, tmp_path / "fake" / "a" if kind == "fake" else folder)
            new.release()
            assert len(on_device(there)) == 2
            old.release()
            await until(lambda: len(on_device(there)) == 1)
            assert there.residency()[before].tier == "disk"
            async with await there.load(name) as handle:
                assert_holds(handle, tiny.tensors(2))
            await there.unload(name)  # what the source has is what it means again
            async with await there.load(name) as handle:
                assert handle.key == before
            assert used(there) == 0

    run(body())


def test_an_id_that_was_never_loaded_may_be_replaced(run: Run, tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")

    async def body() -> None:
        async with over(source) as there:
            async with await put(there, 2, "a") as new, await there.load("a") as handle:
                assert new.key == handle.key
            assert source.counts.resolves == 0
            for wrong in (new.key, Merge("linear", ["a"], [1])):
                with pytest.raises(UsageError, match="replace an id"):
                    await there.replace(wrong, tiny.tensors(2), tiny.config())

    run(body())


def test_a_token_has_its_own_and_no_token_is_for_all(run: Run, tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    mine = AdapterRef("a", token="mine")

    async def body() -> None:
        async with over(source) as there:
            (await there.replace(mine, tiny.tensors(2), tiny.config())).release()
            async with await there.load("a", token="mine") as handle:
                assert_holds(handle, tiny.tensors(2))
            for token in (None, "theirs"):
                async with await there.load("a", token=token) as handle:
                    tiny.assert_equal_to_file(handle, tmp_path / "a")
            (await put(there, 3, "a")).release()
            for token, seed in ((None, 3), ("theirs", 3), ("mine", 2)):
                async with await there.load("a", token=token) as handle:
                    assert_holds(handle, tiny.tensors(seed))
            await there.unload(mine)
            async with await there.load("a", token="mine") as handle:
                assert_holds(handle, tiny.tensors(3))

    run(body())


def test_pins_move_at_once(run: Run, tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")

    async def body() -> None:
        async with over(source, max_slots=3) as there:
            ids = ("a", AdapterRef("a", token="any"))
            for id in ids:
                await there.pin(id)
            old = await there.load("a")
            await there.pin(old.key)
            (await put(there, 2, "a")).release()
            new = where(there, "a")
            assert (new.pins, there.residency()[old.key].pins) == (2, 1)
            for name in "bc":
                (await there.load(name)).release()
            assert state(there, "a") == "resident"
            old_key = old.key
            old.release()
            assert there.residency()[old_key].state == "resident", "pinned by its key"
            assert there.unpin(old_key)
            await until(lambda: there.residency()[old_key].tier == "disk")
            for left, id in zip((1, 0), ids, strict=True):
                assert there.unpin(id)
                assert where(there, "a").pins == left

    run(body())


def test_there_is_no_room_beside_what_is_pinned(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with loader(max_slots=1) as there:
            (await give(there, 1)).release()
            await there.pin("mine")
            before = used(there)
            with pytest.raises(CapacityError, match="beside 1 pinned") as caught:
                await put(there, 2)
            assert caught.value.id == "mine"
            assert used(there) == before
            assert where(there, "mine").pins == 1
            there.unpin("mine")
            async with await put(there, 2) as handle, acquired(there) as other:
                assert_holds(handle, tiny.tensors(2))
                assert other.key == handle.key
            assert used(there) == before

    run(body())


def test_back_and_forth(run: Run) -> None:
    """What was to go is meant again before it went."""

    async def body() -> None:
        async with loader(max_slots=3) as there:
            first = await give(there, 1)
            (await put(there, 2)).release()
            async with await put(there, 1) as again:
                assert (again.key, again.slot) == (first.key, first.slot)
            first.release()
            await asyncio.sleep(0.02)
            async with acquired(there) as handle:
                assert_holds(handle, tiny.tensors(1))
            (await put(there, 1)).release()  # the same once more
            assert len(on_device(there)) == 1
            (await put(there, 2)).release()
            (await put(there, 1)).release()
            async with await there.load("mine") as handle:
                assert_holds(handle, tiny.tensors(1))

    run(body())


def test_several_at_once_come_in_their_order(run: Run) -> None:
    async def body(seed: int) -> None:
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
            assert used(there) == there.residency()[handle.key].host_bytes

    for seed in range(4):
        run(body(seed))


def test_while_many_load_each_sees_one_version_whole(run: Run) -> None:
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
            assert used(there) == next(iter(there.residency().values())).host_bytes

    run(body("cpu"))
    run(body("simulated"))


def test_merges_follow(run: Run, tmp_path: Path) -> None:
    """Also one that is on its way when its part is replaced and leaves."""
    source = stocked(tmp_path, "a")
    merge = Merge("linear", ["mine", "a"], [1, 0.5])

    async def body() -> None:
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

    run(body())


def test_who_waits_for_the_old_one_gets_the_old_one(run: Run) -> None:
    there, device = gated(slots=3)

    async def body() -> None:
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

    run(body())


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


def test_what_subscribers_hear(run: Run) -> None:
    async def body() -> None:
        async with loader() as there:
            old = await give(there, 1)
            heard: list[Event] = []
            there.subscribe(heard.append)
            new = await put(there, 2)
            assert [type(event) for event in heard if event.key == old.key] == []
            assert isinstance(heard[-1], Resident)
            old.release()
            assert isinstance(heard[-1], Leaving)
            assert heard[-1].key != new.key
            assert where(there, "mine").device_bytes == ONE
            new.release()

    run(body())
