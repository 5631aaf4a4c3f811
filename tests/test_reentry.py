"""Callers who act while the loader is in the midst of something on the same loop."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import AdapterHandle, Event, LayerReady, Resident
from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant, Needs
from lorax_async.runtime.tenancy import Lease
from tiny_sources import over, state, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_what_a_subscriber_causes_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it unpins makes room for another, but not before all is told that was decided."""
    source, told = stocked(tmp_path, "a", "b", "c"), list[str]()
    async with over(source, max_slots=2) as there:
        await there.pin("a")
        clear = there.device.clear_column

        def cleared(slot: int) -> None:
            told.append("cleared")
            clear(slot)

        def hear(event: Event) -> None:
            if isinstance(event, LayerReady) and event.layer == 3 and not told:
                told.append("last layer")
                assert there.unpin("a")
            if isinstance(event, Resident) and event.key.location == "memory:b":
                told.append("resident")

        monkeypatch.setattr(there.device, "clear_column", cleared)
        source.hold("b")
        async with there.stream("b"):
            waiting = asyncio.create_task(there.load("c"))
            await until(lambda: state(there, "c") == "present")
            there.subscribe(hear)
            source.allow("b")
            (await waiting).release()
            assert told[:3] == ["last layer", "resident", "cleared"]


async def test_a_handle_that_is_forgotten_in_the_midst_of_a_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is collected anywhere; its lease ends in a turn of its own."""
    source, held = stocked(tmp_path, "a"), list[AdapterHandle]()
    async with over(source) as there:
        held.append(await there.load("a"))
        lifecycle = there._driver.lifecycle
        take_lease = lifecycle.take_lease

        def forgetful(key: AdapterKey) -> Grant | None:
            before = lifecycle.lives[key].leases
            held.clear()
            assert lifecycle.lives[key].leases == before
            return take_lease(key)

        monkeypatch.setattr(lifecycle, "take_lease", forgetful)
        with pytest.warns(ResourceWarning, match="never released"):
            handle = there.try_acquire("a")
        assert handle is not None
        await until(lambda: where(there, "a").leases == 1)
        handle.release()


async def test_a_release_in_the_midst_of_a_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer may call it, at any allocation: while a slot is being claimed, say."""
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        handle, lifecycle = await there.load("a"), there._driver.lifecycle
        (held,) = lifecycle.lives.values()
        claim, seen = lifecycle.budgets.device.claim, list[int]()

        def disturbed(key: AdapterKey, needs: Needs) -> Grant | None:
            handle.release()
            seen.append(held.leases)
            return claim(key, needs)

        monkeypatch.setattr(lifecycle.budgets.device, "claim", disturbed)
        (await there.load("b")).release()
        await until(lambda: where(there, "a").leases == 0)
        assert seen == [1]


async def test_a_release_in_the_midst_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The books of who holds what are open then, though nothing is being decided."""
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        outer, inner = await there.load("a"), await there.load("b")
        tenants, seen = there._driver.tenants, list[int]()
        end_lease = tenants.end_lease

        def disturbed(lease: Lease) -> None:
            inner.release()
            seen.append(where(there, "b").leases)
            end_lease(lease)

        monkeypatch.setattr(tenants, "end_lease", disturbed)
        outer.release()
        await until(lambda: where(there, "b").leases == 0)
        assert seen == [1, 1]


async def test_ends_in_threads_are_the_loops_to_decide_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, deciding = stocked(tmp_path, "a"), list[int]()

    def use_and_release(handle: AdapterHandle) -> None:
        with handle.use():
            handle.release()

    async with over(source) as there:
        handle, lifecycle = await there.load("a"), there._driver.lifecycle
        for name in ("end_lease", "end_use"):
            decide = getattr(lifecycle, name)

            def noted(*what: object, decide: Any = decide, **more: object) -> object:
                deciding.append(threading.get_ident())
                return decide(*what, **more)

            monkeypatch.setattr(lifecycle, name, noted)
        await asyncio.to_thread(use_and_release, handle)
        await until(lambda: len(deciding) == 2)
        assert set(deciding) == {threading.get_ident()}
