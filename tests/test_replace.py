"""Replacing what an id means: beside the old version, in one step, and the old one ends alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from given import acquired, assert_holds, give, put, used
from lorax_async import (
    AdapterRef,
    CapacityError,
    Event,
    Leaving,
    Merge,
    Resident,
    UsageError,
)
from lorax_async.adapter import AdapterId
from tiny_loaders import ONE, loader, on_device
from tiny_sources import over, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_new_requests_see_it_and_old_handles_keep_theirs(device: str) -> None:
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


@pytest.mark.parametrize("kind", ["path", "str", "fake"])
async def test_what_a_source_has_can_be_replaced(tmp_path: Path, kind: str) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    name = folder if kind == "path" else str(folder) if kind == "str" else "a"
    source = stocked(tmp_path / "fake", "a", rank=2)
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


async def test_an_id_that_was_never_loaded_may_be_replaced(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        async with await put(there, 2, "a") as new, await there.load("a") as handle:
            assert new.key == handle.key
        assert source.counts.resolves == 0
        for wrong in (new.key, Merge("linear", ["a"], [1])):
            with pytest.raises(UsageError, match="replace an id"):
                await there.replace(wrong, tiny.tensors(2), tiny.config())


async def test_a_token_has_its_own_and_no_token_is_for_all(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    mine = AdapterRef("a", token="mine")
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


async def test_pins_move_at_once(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=3) as there:
        ids: tuple[AdapterId, ...] = ("a", AdapterRef("a", token="any"))
        for each in ids:
            await there.pin(each)
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
        for left, pinned in zip((1, 0), ids, strict=True):
            assert there.unpin(pinned)
            assert where(there, "a").pins == left


async def test_there_is_no_room_beside_what_is_pinned(tmp_path: Path) -> None:
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


async def test_back_and_forth() -> None:
    """What was to go is meant again before it went."""
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


async def test_what_subscribers_hear() -> None:
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
