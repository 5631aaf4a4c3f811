"""Calls of the operator beside each other, and while the server closes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import until
from lorax_async.server.calls import admin
from server.world import TOKEN, FakeEngine, serving
from tiny_sources import over, stocked

LOAD, UNLOAD, ADAPTERS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters"


async def test_a_load_is_under_way(tmp_path: Path) -> None:
    """And whoever asks for one while the server closes is refused."""
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with serving(loader=over(source)) as world:
        body = {"lora_name": "a", "lora_path": "a"}
        loading = asyncio.create_task(world.admin(LOAD, body))
        await until(lambda: world.service.loader.usage().waiting)
        assert not await world.service.under_way.ended(0)
        world.service.under_way.close()
        assert (await world.admin(LOAD, body)).status == 503
        assert (await world.admin(UNLOAD, {"lora_name": "a"})).status == 503
        source.allow("a")
        assert (await loading).status == 200


async def test_of_two_loads_of_one_name_the_first_counts(tmp_path: Path) -> None:
    source = stocked(tmp_path, "first", "second")
    source.hold("first")
    source.hold("second")
    async with serving(loader=over(source)) as world:
        first, second = (
            asyncio.create_task(world.admin(LOAD, {"lora_name": "a", "lora_path": path}))
            for path in ("first", "second")
        )
        await until(lambda: world.service.loader.usage().waiting == 2)
        source.allow("first")
        assert (await first).status == 200
        source.allow("second")
        assert (await second).status == 400
        assert world.service.names.find("a") == "first"


async def test_for_a_name_that_is_taken_nothing_is_loaded(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with serving(loader=over(source)) as world:
        assert (await world.admin(LOAD, {"lora_name": "a", "lora_path": "a"})).status == 200
        assert (await world.admin(LOAD, {"lora_name": "a", "lora_path": "b"})).status == 400
        assert world.service.loader.statistics().loads == 1


@pytest.mark.parametrize("what", ["_adapter_at", "_listed"])
async def test_the_loop_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder, original = tiny.write(tmp_path / "one"), getattr(admin, what)
    threads = list[threading.Thread]()

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*given)

    monkeypatch.setattr(admin, what, noted)
    async with serving() as world:
        await world.admin(LOAD, {"lora_name": "a", "lora_path": str(folder)})
        await world.ask("GET", ADAPTERS, Authorization=f"Bearer {TOKEN}")
    assert len(threads) == 1
    assert threading.main_thread() not in threads


# -- numbers --------------------------------------------------------------------------------------


async def test_who_has_ended_runs_no_more() -> None:
    """Though its request goes on."""
    engine = FakeEngine()
    async with serving(engine) as world:
        create = world.client.completions.create
        asked = asyncio.create_task(create(model="base", prompt="x", n=2))
        other = await engine.asked(2)
        sequences = world.service.metrics.sequences
        engine.submitted[0].say("a")
        await until(lambda: sequences.running)
        engine.submitted[0].end()
        await until(lambda: not sequences.running)
        assert sequences.waiting == {"base": 1}
        other.end()
        await asked


async def test_who_has_its_stop_string_runs_no_more() -> None:
    engine = FakeEngine(lambda tokens: tokens.say("one STOP two"))
    async with serving(engine) as world:
        create = world.client.completions.create
        await create(model="base", prompt="x", stop=["STOP"])
        sequences = world.service.metrics.sequences
        assert (sequences.waiting, sequences.running) == ({}, {})


async def test_who_was_cancelled_before_its_first_token_never_runs() -> None:
    """The token may be on its way already."""
    async with serving(FakeEngine()) as world:
        tokens = world.engine.submit(None)
        measured = world.service.metrics.measured(tokens, "base", 1)
        reading = asyncio.create_task(anext(measured))
        await asyncio.sleep(0)
        measured.cancel()
        tokens.say("a")
        await reading
        sequences = world.service.metrics.sequences
        assert (sequences.waiting, sequences.running) == ({}, {})
