"""Spills that are given up, at every step: each adapter is somewhere, and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from disk_cache_world import open_below

import tiny
from common import until
from given import used
from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterTimeoutError,
    LoaderClosedError,
)
from spilling_loaders import (
    STEPS,
    assert_all_there,
    entries,
    entry_of,
    given,
    in_memory,
    roomy,
    stalled,
)
from sweeping import cancel_at, count_steps, released

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("step", STEPS)
async def test_the_loader_closes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    there = roomy(tmp_path, 1)
    async with there:
        await given(there, 0)
        with stalled(monkeypatch, step) as stall:
            giving = asyncio.create_task(given(there, 1))
            await stall.reached()
            closing = asyncio.create_task(there.close(timeout=0.01))
            await asyncio.sleep(0.02)
            stall.go_on.set()
            await closing
        with pytest.raises(LoaderClosedError):
            await giving
        assert used(there) == 0
        assert entries(tmp_path) == []
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_deadline_passes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with roomy(tmp_path, 1) as there:
        key = await given(there, 0)
        with stalled(monkeypatch, step) as stall:
            giving = asyncio.create_task(
                there.load_tensors("1", tiny.tensors(1), tiny.config(), timeout=0.3)
            )
            await stall.reached()
            with pytest.raises(AdapterTimeoutError) as caught:
                await giving
            assert (caught.value.id, caught.value.stage) == ("1", "fetch")
            assert in_memory(there) == [key]
            await assert_all_there(there, 0)
        await given(there, 1)
        await assert_all_there(there, 0, 1)
        assert len(entries(tmp_path)) == 1


async def test_cancelled_at_every_await(tmp_path: Path) -> None:
    def call(there: AdapterLoader) -> Coroutine[Any, Any, AdapterHandle]:
        return there.load_tensors("1", tiny.tensors(1), tiny.config())

    async def cancelled(folder: Path, step: int) -> bool:
        """Each is somewhere; whether it was."""
        async with roomy(folder, 1) as there:
            key = await given(there, 0)
            if not await cancel_at(call(there), step):
                return False
            on_disk = entry_of(folder, key)
            await until(lambda: (key in in_memory(there)) != on_disk.is_dir())
            await assert_all_there(there, 0)
            await until(lambda: used(there) == sum(there._machinery.given.values()))
            await given(there, 1)
            await assert_all_there(there, 0, 1)
        assert entries(folder) == []
        assert open_below(folder) == []
        return True

    async with roomy(tmp_path / "counted", 1) as there:
        await given(there, 0)
        steps = await count_steps(released(call(there)))
    assert steps >= 4, "the spill is waited for, too"
    ends = [await cancelled(tmp_path / str(step), step) for step in range(1, steps)]
    assert ends[:3] == [True] * 3
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_it_ends_between_two_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before it is published it stays in memory, and afterwards it is on disk."""
    on_disk = step in {"publish", "switch"}
    async with roomy(tmp_path, 1) as there:
        key = await given(there, 0)
        with stalled(monkeypatch, step) as stall:
            giving = asyncio.create_task(given(there, 1))
            await stall.reached()
            giving.cancel()
            await asyncio.wait([giving])
            assert giving.cancelled()
            assert in_memory(there) == [key]
        await until(lambda: there._machinery._tensors.copies.idle or not in_memory(there))
        assert (there.statistics().spills, len(entries(tmp_path))) == (on_disk, on_disk)
        assert in_memory(there) == ([] if on_disk else [key])
        await assert_all_there(there, 0)


@pytest.mark.parametrize("step", ["hash", "write"])
async def test_unloaded_meanwhile_it_keeps_no_other_from_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with roomy(tmp_path, 2) as there:
        await given(there, 0)
        other = await given(there, 1)
        with stalled(monkeypatch, step) as stall:
            large = there.load_tensors("large", tiny.tensors(2, 8), tiny.config(8))
            giving = asyncio.create_task(large)
            await stall.reached()
            await there.unload("0")
            stall.go_on.set()
            (await giving).release()
        assert entries(tmp_path) == [entry_of(tmp_path, other).name]
        await assert_all_there(there, 1)
