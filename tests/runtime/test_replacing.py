"""Replacing what an id means: beside the old version, in one step, whatever else is under way."""

import asyncio
from pathlib import Path
from random import Random

import pytest
import tiny
import torch
from event_loops import until
from tensor_adapters import acquired, assert_means, give, held_bytes, put, used
from tiny_loaders import ONE, fails, gated, loader, on_device
from tiny_sources import Slowed, make_source, over, state, where

from lorax_async import Event, Leaving, Resident, SlotFreed, errors
from lorax_async.types import AdapterId, AdapterRef

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_new_requests_get_the_new_version_and_old_handles_keep_theirs(device: str) -> None:
    async with loader(device=device) as there:
        old = await give(there, 1)
        heard: list[Event] = []
        there.subscribe(heard.append)
        new = await put(there, 2)
        assert not [event for event in heard if event.key == old.key]
        assert isinstance(heard[-1], Resident)
        assert old.slot != new.slot
        assert (new.id, new.resident) == ("mine", True)
        again, streamed = await there.load("mine"), there.stream("mine")
        async with again, acquired(there) as at_once, streamed as stream:
            assert {new.slot} == {again.slot, at_once.slot, stream.slot}
        another = old.clone()
        for handle, seed in ((old, 1), (another, 1), (new, 2)):
            tiny.assert_holds(handle, tiny.tensors(seed))
        assert there.placement().story("mine")[0].key == new.key
        new.release()
        old.release()
        assert len(on_device(there)) == 2
        both = used(there)
        another.release()
        await until(lambda: len(on_device(there)) == 1)
        assert [type(event) for event in heard[-2:]] == [Leaving, SlotFreed]
        assert {event.key for event in heard[-2:]} == {old.key}
        assert used(there) == both // 2
        assert there.placement().adapters.keys() == {new.key}
        assert where(there, "mine").device_bytes == ONE * (1 if device == "cpu" else 2)


@pytest.mark.parametrize("kind", ["path", "str", "fake"])
async def test_an_id_of_a_source_is_replaced_until_unloaded(tmp_path: Path, kind: str) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    name = folder if kind == "path" else str(folder) if kind == "str" else "a"
    source = make_source(tmp_path / "fake", "a", rank=2)
    there = over(source) if kind == "fake" else loader(local_roots=(tmp_path,))
    async with there:
        old = await there.load(name)
        before = old.key
        new = await put(there, 2, name)
        tiny.assert_holds(new, tiny.tensors(2))
        tiny.assert_equal_to_file(old, tmp_path / "fake" / "a" if kind == "fake" else folder)
        new.release()
        assert len(on_device(there)) == 2
        old.release()
        await until(lambda: len(on_device(there)) == 1)
        assert there.placement().adapters[before].tier == "disk"
        await assert_means(there, name, 2)
        await there.unload(name)  # what the source has is what it means again
        async with await there.load(name) as handle:
            assert handle.key == before
        assert used(there) == 0


async def test_an_id_that_was_never_loaded_may_be_replaced(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with over(source) as there:
        async with await put(there, 2, "a") as new, await there.load("a") as handle:
            assert new.key == handle.key
        assert source.counts.resolves == 0
        other = AdapterRef("a", digest="0" * 64)  # whatever was known of it
        newer = await there.replace(other, tiny.tensors(3), tiny.config())
        async with newer, await there.load("a") as handle:
            assert handle.key == newer.key != new.key
        call = there.replace(new.key, tiny.tensors(2), tiny.config())
        await fails(call, errors.UsageError, "replace an id")


async def test_a_token_has_its_own_version_and_no_token_is_for_all(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    mine = AdapterRef("a", token="mine")
    async with over(source) as there:
        (await there.replace(mine, tiny.tensors(2), tiny.config())).release()
        await assert_means(there, "a", 2, token="mine")
        for token in (None, "theirs"):
            async with await there.load("a", token=token) as handle:
                tiny.assert_equal_to_file(handle, tmp_path / "a")
        (await put(there, 3, "a")).release()
        for token, seed in ((None, 3), ("theirs", 3), ("mine", 2)):
            await assert_means(there, "a", seed, token=token)
        await there.unload(mine)
        await assert_means(there, "a", 3, token="mine")


async def test_pins_of_an_id_move_at_once_and_pins_of_a_key_stay(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "a", "b", "c"), max_slots=3) as there:
        ids: tuple[AdapterId, ...] = ("a", AdapterRef("a", token="any"))
        for each in ids:
            await there.pin(each)
        old = await there.load("a")
        await there.pin(old.key)
        (await put(there, 2, "a")).release()
        new = where(there, "a")
        assert (new.pins, there.placement().adapters[old.key].pins) == (2, 1)
        for name in "bc":
            (await there.load(name)).release()
        assert state(there, "a") == "resident"
        old_key = old.key
        old.release()
        assert there.placement().adapters[old_key].state == "resident", "pinned by its key"
        assert there.unpin(old_key)
        await until(lambda: there.placement().adapters[old_key].tier == "disk")
        for left, pinned in zip((1, 0), ids, strict=True):
            assert there.unpin(pinned)
            assert where(there, "a").pins == left


async def test_a_replacement_needs_room_beside_what_is_pinned() -> None:
    async with loader(max_slots=1) as there:
        (await give(there, 1)).release()
        await there.pin("mine")
        before = used(there)
        error = await fails(put(there, 2), errors.CapacityError, "the only slot is pinned")
        assert error.id == "mine"
        assert used(there) == before
        assert where(there, "mine").pins == 1
        there.unpin("mine")
        async with await put(there, 2) as handle, acquired(there) as other:
            tiny.assert_holds(handle, tiny.tensors(2))
            assert other.key == handle.key
        assert used(there) == before


async def test_an_old_version_that_is_put_back_before_it_went_stays() -> None:
    async with loader(max_slots=3) as there:
        first = await give(there, 1)
        (await put(there, 2)).release()
        async with await put(there, 1) as again:
            assert (again.key, again.slot) == (first.key, first.slot)
        first.release()
        await until(lambda: len(on_device(there)) == 1)
        async with acquired(there) as handle:
            tiny.assert_holds(handle, tiny.tensors(1))
        for seed in (1, 2, 1):
            (await put(there, seed)).release()
        await assert_means(there, "mine", 1)


@pytest.mark.parametrize("seed", range(4))
async def test_several_replacements_at_once_come_in_their_order(seed: int) -> None:
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
        for task in random.sample(tasks[:-1], 4):
            task.cancel()
            await asyncio.sleep(random.random() / 2000)
        await asyncio.wait(tasks)
        assert seen == sorted(seen)
        assert seen[-1] == 11
        async with await there.load("mine") as handle:
            tiny.assert_holds(handle, tiny.tensors(11, handle.rank, dtype=torch.bfloat16))
        await until(lambda: len(on_device(there)) == 1)
        assert there.placement().adapters.keys() == {handle.key}
        only = there.placement().adapters[handle.key]
        # The thread of one that was cancelled has its memory until its step is through.
        await until(lambda: used(there) == only.host_bytes)


async def test_each_of_many_loads_sees_one_version_whole_and_none_that_is_outdated() -> None:
    versions = [tiny.tensors(seed) for seed in range(6)]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    async with loader(max_slots=6) as there:
        (await give(there, 0)).release()
        latest, seen = 0, set[int]()

        async def load_until_the_last(number: int) -> None:
            while latest < 5:
                least, token = latest, None if number % 5 else "t"
                async with await there.load("mine", token=token) as handle:
                    a = handle.modules["model.layers.0.self_attn.q_proj"].a
                    (version,) = (n for n, each in enumerate(versions) if torch.equal(each[key], a))
                    tiny.assert_holds(handle, versions[version])
                    assert version >= least, "older than when it was asked for"
                    seen.add(version)
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(load_until_the_last(number)) for number in range(20)]
        for number in range(1, 6):
            (await put(there, number)).release()
            await until(lambda number=number: number in seen)  # type: ignore[misc]
            latest = number
        await asyncio.gather(*tasks)
        await until(lambda: used(there) == where(there, "mine").host_bytes)


async def test_replaced_while_the_source_resolves_it(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    resolving = Slowed(source, "resolve")
    async with over(source) as there:
        loading = asyncio.create_task(there.load("a"))
        await until(lambda: resolving.asked)
        new = await put(there, 2, "a")
        resolving.may_go_on.set()
        async with await loading as handle:
            assert handle.key == new.key
        new.release()
        assert there.statistics().fetches == 1


async def test_a_load_that_fails_once_it_is_replaced_gets_the_new_version(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    opening = Slowed(source, "open")
    async with over(source) as there:
        loading = asyncio.create_task(there.load("a"))
        await until(lambda: opening.asked)
        source.remove("a")
        (await put(there, 2, "a")).release()
        opening.may_go_on.set()
        async with await loading as handle:
            tiny.assert_holds(handle, tiny.tensors(2))


async def test_waiters_for_the_old_version_get_the_old_version(tmp_path: Path) -> None:
    there, device = gated(slots=1)
    async with there:
        async with await give(there, 1) as first:
            key = first.key
        (await there.load(tiny.write(tmp_path / "other"))).release()  # takes the slot
        device.gate.clear()
        waiting = [asyncio.create_task(there.load("mine")) for _ in range(3)]
        await until(lambda: state(there, "mine") == "filling")
        replacing = asyncio.create_task(put(there, 2))
        await until(lambda: used(there) == 2 * where(there, key).host_bytes)
        waiting[0].cancel()
        device.gate.set()
        for task in waiting[1:]:
            async with await task as handle:
                assert handle.key == key
                tiny.assert_holds(handle, tiny.tensors(1))
        async with await replacing as new:
            assert new.key != key
        await until(lambda: key not in there.placement().adapters)


async def test_a_pin_that_waits_for_the_old_version_ends_on_the_new_one(tmp_path: Path) -> None:
    async with loader(max_slots=1) as there:
        async with await give(there, 1) as old:
            old_key = old.key
        other = await there.load(tiny.write(tmp_path / "other"))  # has the slot
        pinning = asyncio.create_task(there.pin("mine"))
        call = there.replace("mine", tiny.tensors(2), tiny.config(), priority=9)
        replacing = asyncio.create_task(call)
        await until(lambda: there.placement().usage.waiting == 2)
        size = where(there, "mine").host_bytes
        await until(lambda: held_bytes(there) == 2 * size)  # both wait for the slot
        other.release()
        async with await replacing as new:
            new_key = new.key
        await pinning
        assert there.placement().adapters[new_key].pins == 1
        assert old_key not in there.placement().adapters


async def test_a_new_version_that_leaves_before_it_is_pinned_is_loaded_once_more() -> None:
    async with loader() as there:
        (await give(there, 1)).release()
        await there.pin("mine")
        unloading: list[asyncio.Task[None]] = []

        def unload(event: Event) -> None:
            if isinstance(event, Resident) and not unloading:
                unloading.append(asyncio.create_task(there.unload(event.key)))

        there.subscribe(unload)
        async with await put(there, 2) as new:
            tiny.assert_holds(new, tiny.tensors(2))
        await unloading[0]
        assert where(there, "mine").pins == 1
        assert there.statistics().loads == 3


@pytest.mark.each_loop
async def test_replaced_while_it_is_unloaded_the_new_meaning_stays() -> None:
    async with loader() as there:
        old = await give(there, 1)
        unloading = asyncio.create_task(there.unload("mine"))
        await asyncio.sleep(0)
        new = await put(there, 2)
        old.release()
        await unloading
        async with await there.load("mine") as handle:
            assert handle.key == new.key
        assert there.placement().adapters.keys() == {new.key}
        new.release()


async def test_a_cancelled_call_takes_no_bytes_from_another_name() -> None:
    there, device = gated()
    async with there:
        (await give(there, 1)).release()
        device.gate.clear()
        replacing = asyncio.create_task(put(there, 2))
        tensor_adapters = asyncio.create_task(give(there, 2, "other"))
        await until(lambda: there.placement().usage.waiting == 2)
        replacing.cancel()
        await asyncio.wait([replacing])
        device.gate.set()
        async with await tensor_adapters as handle:
            tiny.assert_holds(handle, tiny.tensors(2))
        await fails(give(there, 2), errors.UsageError, "other tensors already")
        await there.unload("other")
        assert used(there) == where(there, "mine").host_bytes


async def test_of_two_calls_for_a_new_name_the_first_has_it() -> None:
    async with loader() as there:
        calls = [asyncio.create_task(give(there, seed)) for seed in (1, 2, 1)]
        await asyncio.wait(calls)
        for task in (calls[0], calls[2]):
            async with await task as handle:
                tiny.assert_holds(handle, tiny.tensors(1))
        await fails(calls[1], errors.UsageError, "other tensors already")
        assert used(there) == where(there, "mine").host_bytes
        assert len(there.placement().adapters) == 1


async def test_an_old_version_is_there_until_its_kernels_have_ended() -> None:
    async with loader() as there:
        old = await give(there, 1)
        with old.use():
            old.release()
            (await put(there, 2)).release()
            assert old.key in there.placement().adapters
        await until(lambda: old.key not in there.placement().adapters)
        assert there.placement().story(old.key) == ()
        assert used(there) == where(there, "mine").host_bytes
