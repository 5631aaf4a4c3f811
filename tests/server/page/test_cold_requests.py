"""The last cold request: which one that is, when it is recorded, and who may see what of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from openai import NotFoundError

import tiny
from common import until
from lorax_async import CapacityError
from lorax_async.server import cold_requests as cold_requests_module
from lorax_async.server.calls.page import timeline as timeline_module
from server.page.reading import PICTURE, TRACE, asked, loading, names_in, watching
from server.world import FakeEngine, FakeTokens, World, serving
from tiny_sources import over, stocked

SVG = "{http://www.w3.org/2000/svg}"


async def test_the_first_request_is_cold_and_the_second_is_not(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters={"pirate": folder}) as world:
        made.append(world)
        for path in (TRACE, PICTURE):
            answer = await world.ask("GET", path)
            assert (answer.status, answer.error["code"]) == (404, "no_cold_request")
        async with watching(world) as told:
            assert told.cold is None
            assert await asked(world.client, "pirate") == "aye"
            cold = await told.until_cold(1)
            assert (cold["name"], cold["outcome"]) == ("pirate", "first token")
            assert 0 < cold["seconds"] < 20
            assert await asked(world.client, "pirate") == "aye"
            assert await asked(world.client, "base") == "aye"
            assert world.service.loader.tracer.on is None, "nothing is recorded any more"
        async with watching(world) as told:
            assert told.cold == cold
        spans = (await world.ask("GET", TRACE)).json["traceEvents"]
        (span,) = [each for each in spans if each["name"] == "request pirate"]
        assert span["args"] == {"adapter": "pirate", "outcome": "first token"}
        names = await names_in(world)
        assert {"request pirate", "load pirate", "fetch header", "layer 0"} <= names


async def test_it_is_cold_again_once_it_has_left(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters={"pirate": folder}) as world:
        made.append(world)
        for number in (1, 2):
            await asked(world.client, "pirate")
            async with watching(world) as told:
                await told.until_cold(number)
            await world.service.loader.unload(folder)


async def test_the_picture_shows_all_of_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters={"pirate": folder}) as world:
        made.append(world)
        await asked(world.client, "pirate")
        answer = await world.ask("GET", PICTURE)
        assert answer.headers["content-type"] == "image/svg+xml"
        assert answer.headers["cache-control"] == "no-store"
        picture = ET.fromstring(answer.body)
        said = {each.text for each in picture.iter(f"{SVG}text")}
        assert {"requests", "files", "copies", "layers"} <= said
        again = await world.ask("GET", PICTURE)
        assert again.body == answer.body


@pytest.mark.parametrize(("path", "what"), [(PICTURE, "_draw"), (TRACE, "_written")])
async def test_one_thread_draws_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, what: str
) -> None:
    """However many ask."""
    folder = tiny.write(tmp_path / "pirate")
    made: list[World] = []
    going, gate = [], threading.Event()
    drawn = getattr(timeline_module, what)

    def draw(*given: Any) -> Any:
        going.append(given)
        assert gate.wait(20)
        return drawn(*given)

    monkeypatch.setattr(timeline_module, what, draw)
    async with serving(FakeEngine(loading(made)), adapters={"pirate": folder}) as world:
        made.append(world)
        await asked(world.client, "pirate")
        tasks = [asyncio.create_task(world.ask("GET", path)) for _ in range(4)]
        await until(lambda: going)
        await world.ask("GET", "/health")  # those behind have been heard by now
        await world.ask("GET", "/health")
        assert len(going) == 1
        gate.set()
        answers = await asyncio.gather(*tasks)
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1
        assert len(going) == 1, "what was made is kept"


async def test_one_that_fails_is_shown_with_its_error(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/there")
    made: list[World] = []
    engine = FakeEngine(loading(made))
    async with serving(engine, over(source), adapters={"gone": "org/gone"}) as world:
        made.append(world)
        with pytest.raises(NotFoundError):
            await asked(world.client, "gone")
        async with watching(world) as told:
            assert told.cold["outcome"] == "AdapterNotFoundError"
        assert "resolve" in await names_in(world)
        assert world.service.loader.tracer.on is None


async def test_a_client_that_goes_ends_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    engine = FakeEngine()
    async with serving(engine, adapters={"one": folder}) as world:
        task = asyncio.create_task(asked(world.client, "one"))
        await engine.asked()
        assert world.service.loader.tracer.on is not None
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: world.service.loader.tracer.on is None)
        async with watching(world) as told:
            assert told.cold["outcome"] == "cancelled"


async def test_one_that_nobody_reads(tmp_path: Path) -> None:
    """It was submitted, but not the one behind it, without which there is no answer."""
    folder = tiny.write(tmp_path / "one")

    def rule(_: FakeTokens) -> None:
        if len(engine.submitted) == 2:
            raise CapacityError("there is no room for a second one")

    engine = FakeEngine(rule)
    async with serving(engine, adapters={"one": folder}) as world:
        asked = {"model": "one", "prompt": ["x", "y"]}
        assert (await world.ask("POST", "/v1/completions", asked)).status == 429
        assert world.service.loader.tracer.on is None
        async with watching(world) as told:
            assert told.cold["outcome"] == "cancelled"


async def test_one_without_a_token(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    engine = FakeEngine(lambda tokens: tokens.end())
    async with serving(engine, adapters={"one": folder}) as world:
        assert await asked(world.client, "one") == ""
        async with watching(world) as told:
            assert told.cold["outcome"] == "no token"


async def test_a_refused_one_is_none(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    engine = FakeEngine()
    async with serving(engine, adapters={"one": folder}) as world:
        engine.alive = False
        answer = await world.ask("POST", "/v1/completions", {"model": "one", "prompt": "x"})
        assert answer.status == 503
        assert world.service.loader.tracer.on is None
        assert (await world.ask("GET", TRACE)).status == 404


async def test_few_are_recorded_at_a_time(tmp_path: Path) -> None:
    """And of one adapter, one."""
    most = cold_requests_module.MOST
    folders = {f"a{n}": tiny.write(tmp_path / f"a{n}", n) for n in range(most + 1)}
    engine = FakeEngine()
    async with serving(engine, adapters=folders) as world:
        names = ["a0", *folders]
        tasks = [asyncio.create_task(asked(world.client, name)) for name in names]
        await engine.asked(len(names))
        recorder = world.service.loader.tracer.on
        assert recorder is not None
        assert len(recorder.rings) == most
        for tokens in engine.submitted:
            tokens.say("x")
            tokens.end()
        await asyncio.gather(*tasks)
        assert world.service.loader.tracer.on is None
        async with watching(world) as told:
            assert told.cold["number"] == most


async def test_the_trace_is_for_other_tools(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters={"one": folder}) as world:
        made.append(world)
        await asked(world.client, "one")
        answer = await world.ask("GET", TRACE)
        assert "attachment" in answer.headers["content-disposition"]
        assert json.loads(answer.body)["otherData"]["producer"] == "lorax_async"


async def test_strangers_keep_nobody_from_being_recorded(tmp_path: Path) -> None:
    """Whose adapters have no names, and take for ever."""
    folder = tiny.write(tmp_path / "mine")
    engine = FakeEngine()
    async with serving(engine, adapters={"mine": folder}) as world:
        names = ["org/slow", "org/slower", "mine"]
        tasks = []
        for name in names:
            tasks.append(asyncio.create_task(asked(world.client, name)))
            tokens = await engine.asked(len(tasks))
        tokens.say("x")
        tokens.end()
        assert await tasks[-1] == "x"
        async with watching(world) as told:
            assert told.cold["name"] == "mine"
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_what_was_made_is_kept(tmp_path: Path) -> None:
    """And before anything else is, there is a rest: strangers may ask as often as they like."""
    adapters = {name: tiny.write(tmp_path / name, n) for n, name in enumerate(("one", "two"))}
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters=adapters) as world:
        made.append(world)
        timeline = world.service.timeline
        await asked(world.client, "one")
        trace = await timeline.trace(operator=False)
        assert trace is not None
        assert await timeline.trace(operator=False) is trace
        assert await timeline.trace(operator=True) is not trace
        await asked(world.client, "two")
        timeline._rests_until = time.monotonic() + 0.3
        began = time.monotonic()
        assert b"request two" in (await timeline.trace(operator=False) or b"")
        assert time.monotonic() - began >= 0.3
