"""What adapters are called in the timeline of the last cold request, and who is told of which."""

from __future__ import annotations

import asyncio
from pathlib import Path

import tiny
from lorax_async.server.calls.names import Names
from server.page.reading import OPERATOR, PICTURE, TRACE, asked, loading, names_in, watching
from server.world import FakeEngine, World, serving
from tiny_sources import over, stocked


async def test_others_have_no_names_in_it(tmp_path: Path) -> None:
    """A request for a named adapter is anybody's to see, but not who was loaded beside it."""
    source = stocked(tmp_path, "org/secret", "org/pirate")
    made: list[World] = []
    engine = FakeEngine()
    async with serving(engine, over(source), adapters={"pirate": "org/pirate"}) as world:
        made.append(world)
        task = asyncio.create_task(asked(world.client, "pirate"))
        tokens = await engine.asked()
        for id in ("org/secret", "org/pirate"):
            (await world.service.loader.load(id)).release()
        tokens.say("aye")
        tokens.end()
        await task
        seen = await names_in(world)
        assert not [name for name in seen if "secret" in name]
        assert {"load another adapter", "load pirate", "another adapter", "pirate"} <= seen
        picture = await world.ask("GET", PICTURE)
        assert b"secret" not in picture.body
        assert {"load secret", "load pirate"} <= await names_in(world, OPERATOR)
        picture = await world.ask("GET", PICTURE, **OPERATOR)
        assert b"secret" in picture.body


async def test_it_has_the_operators_name(tmp_path: Path) -> None:
    """Behind a link, the id that was asked for ends in one word, and what was found in another."""
    (tmp_path / "link").symlink_to(tiny.write(tmp_path / "real"))
    made: list[World] = []
    adapters = {"pirate": tmp_path / "link"}
    async with serving(FakeEngine(loading(made)), adapters=adapters) as world:
        made.append(world)
        await asked(world.client, "pirate")
        async with watching(world) as told:
            assert told.cold["name"] == "pirate"
        seen = await names_in(world)
        assert {"request pirate", "load pirate", "pirate"} <= seen
        assert not seen & {"another adapter", "link", "real"}
        picture = (await world.ask("GET", PICTURE)).body
        assert b"request pirate" in picture
        assert b"link" not in picture
        assert b"real" not in picture


async def test_who_shares_the_end_of_an_id_has_no_name(tmp_path: Path) -> None:
    """But for the adapter that was asked for."""
    source = stocked(tmp_path, "one/last", "two/last", "three/last", "four/other")
    made: list[World] = []
    adapters = {"one": "one/last", "two": "two/last", "other": "four/other"}
    async with serving(FakeEngine(loading(made)), over(source), adapters=adapters) as world:
        made.append(world)
        await asked(world.client, "one")
        assert "load one" in await names_in(world)
        engine = world.engine
        engine.rule = None
        task = asyncio.create_task(asked(world.client, "other"))
        tokens = await engine.asked(2)
        for id in ("two/last", "three/last", "four/other"):
            (await world.service.loader.load(id)).release()
        tokens.say("aye")
        tokens.end()
        await task
        seen = await names_in(world)
        assert {"load other", "load another adapter"} <= seen
        assert not [name for name in seen if "last" in name or "two" in name]


async def test_a_name_that_was_taken_back_is_told_no_more(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/pirate", "org/shout")
    made: list[World] = []
    engine = FakeEngine()
    adapters = {"arr": "org/pirate", "loud": "org/shout"}
    async with serving(engine, over(source), adapters=adapters) as world:
        made.append(world)
        task = asyncio.create_task(asked(world.client, "arr"))
        tokens = await engine.asked()
        (await world.service.loader.load("org/shout")).release()
        tokens.say("aye")
        tokens.end()
        await task
        assert "load loud" in await names_in(world)
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "loud"})
        assert "load another adapter" in await names_in(world)


async def test_one_without_a_name_is_the_operators(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/secret", "org/pirate")
    made: list[World] = []
    engine = FakeEngine(loading(made))
    async with serving(engine, over(source), adapters={"pirate": "org/pirate"}) as world:
        made.append(world)
        await asked(world.client, "pirate")
        await asked(world.client, "org/secret")
        async with watching(world) as anybody, watching(world, OPERATOR) as operator:
            assert anybody.cold["name"] == "pirate"
            assert operator.cold["name"] == "secret"
        assert "load pirate" in await names_in(world)
        assert "load secret" in await names_in(world, OPERATOR)
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "pirate"})
        assert (await world.ask("GET", TRACE)).status == 404, "its name was taken back"


def test_the_first_name_that_is_left_counts(tmp_path: Path) -> None:
    names = Names("base", {"one": "org/x", "two": "org/x", "path": tmp_path})
    assert (names.name_of("org/x"), names.name_of(tmp_path)) == ("one", "path")
    assert names.name_of(str(tmp_path)) is None, "a request's text is no path"
    names.put("one", "org/y")
    assert (names.name_of("org/x"), names.name_of("org/y")) == ("two", "one")
    assert names.take("two") == "org/x"
    assert names.name_of("org/x") is None
    assert names.take("two") is None
