"""Adapters by name, as in vLLM, and where they are; for the operator, by a token."""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from event_loops import until
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from server_world import TOKEN, Answer, FakeEngine, World, loading, serving
from tiny_loaders import fails, on_device
from tiny_loaders import loader as tiny_loader
from tiny_sources import make_source, over

from engines.conftest import watched
from lorax_async.errors import FetchError
from lorax_async.server.app import FILES, create_app
from lorax_async.testing import FakeSource
from lorax_async.types import AdapterKey, AdapterRef

Patch = pytest.MonkeyPatch
LOAD, UNLOAD, ADAPTERS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters"
PAGE = ("/page/events", "/page/trace.json")
PIN, UNPIN = "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"


async def load(world: World, name: str, path: object, **more: Any) -> Answer:
    return await world.admin(LOAD, {"lora_name": name, "lora_path": str(path)} | more)


async def unload(world: World, name: str) -> Answer:
    return await world.admin(UNLOAD, {"lora_name": name})


async def pin(world: World, name: str) -> Answer:
    return await world.admin(PIN, {"lora_name": name})


async def unpin(world: World, name: str) -> Answer:
    return await world.admin(UNPIN, {"lora_name": name})


def pinned(world: World) -> list[str]:
    """The ids of a fake source that are pinned."""
    here = world.service.loader.placement().adapters.items()
    return [str(key).removeprefix("memory:") for key, where in here if where.pins]


async def adapters(world: World) -> Any:
    answer = await world.ask("GET", ADAPTERS, Authorization=f"Bearer {TOKEN}")
    return answer.json["data"]


async def asked_for(world: World, model: str) -> object:
    await world.client.completions.create(model=model, prompt="x")
    return world.engine.submitted[-1].generation.adapter


async def test_load_use_and_unload(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    async with serving() as world:
        loaded = await load(world, "pirate", folder)
        added = b"Success: LoRA adapter 'pirate' added successfully."
        assert (loaded.status, loaded.body) == (200, added)
        assert [where.state for where in on_device(world.service.loader)] == ["resident"]
        models = await world.client.models.list()
        assert [model.id for model in models.data] == ["base", "pirate"]
        assert await asked_for(world, "pirate") == folder

        assert (await load(world, "second", folder)).status == 200
        unloaded = await unload(world, "pirate")
        removed = b"Success: LoRA adapter 'pirate' removed successfully."
        assert (unloaded.status, unloaded.body) == (200, removed)
        assert len(on_device(world.service.loader)) == 1
        await unload(world, "second")
        models = await world.client.models.list()
        assert [model.id for model in models.data] == ["base"]
        assert on_device(world.service.loader) == []
        again = await unload(world, "pirate")
        assert (again.status, again.error["type"]) == (404, "NotFoundError")
        assert again.error["message"] == "The lora adapter 'pirate' cannot be found."


async def test_a_name_is_given_once(tmp_path: Path) -> None:
    """Only in place is it given to another adapter; a path that is not a folder is an id."""
    source = make_source(tmp_path, "one", "two")
    async with serving(loader=over(source)) as world:
        assert (await load(world, "a", "one")).status == 200
        assert await asked_for(world, "a") == "one"
        for name in ("a", "base"):
            again = await load(world, name, "two")
            assert (again.status, again.error["type"]) == (400, "InvalidUserInput")
            assert name == "base" or "has already been loaded" in again.error["message"]
        assert world.service.loader.statistics().loads == 1, "nothing was loaded for nothing"
        assert (await load(world, "a", "two", load_inplace=True)).status == 200
        assert await asked_for(world, "a") == "two"


async def test_of_two_loads_of_one_name_the_first_counts(tmp_path: Path) -> None:
    source = make_source(tmp_path, "first", "second")
    async with serving(loader=over(source)) as world:
        names = ("first", "second")
        for name in names:
            source.hold(name)
        first, second = (asyncio.create_task(load(world, "a", name)) for name in names)
        await until(lambda: world.service.loader.placement().usage.waiting == 2)
        source.allow("first")
        assert (await first).status == 200
        source.allow("second")
        assert (await second).status == 400
        assert await asked_for(world, "a") == "first"


async def test_an_adapter_in_use_is_unloaded_later(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("lorax_async.server.app.UNLOAD_SECONDS", 0.01)
    folder = tiny.write(tmp_path / "one")
    async with serving(adapters={"a": folder}) as world:
        async with await world.service.loader.load(folder) as handle:
            assert (await unload(world, "a")).status == 200
            assert not handle.released
        assert (await world.ask("GET", "/v1/models/a")).status == 404


async def test_a_load_is_under_way_and_none_begins_while_the_server_closes(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    source.hold("a")
    async with serving(loader=over(source)) as world:
        loading = asyncio.create_task(load(world, "a", "a"))
        await until(lambda: world.service.loader.placement().usage.waiting)
        assert not await world.service.in_flight.wait_until_idle(0)
        world.service.in_flight.close()
        assert (await load(world, "a", "a")).status == 503
        assert (await unload(world, "a")).status == 503
        source.allow("a")
        assert (await loading).status == 200


async def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    async with serving(loader=tiny_loader(local_roots=(tmp_path,))) as world:
        for status, name, path in (
            *((400, None, None), (400, "a", None), (400, "", "x/y"), (404, "a", "no id")),
            *((404, "a", "./nowhere"), (404, "a", "/etc/nowhere"), (404, "a", "../nowhere")),
            *((404, "a", "no/such/folder"), (404, "a", "x/\0"), (400, 5, "x/y")),
        ):
            fields = {"lora_name": name, "lora_path": path}
            body = {key: value for key, value in fields.items() if value is not None}
            answer = await world.admin(LOAD, body)
            assert answer.status == status, body
            assert status == 400 or "no such folder" in answer.error["message"]
            assert "pathlib" not in answer.body.decode()
        assert len((await world.client.models.list()).data) == 1


@pytest.mark.parametrize(
    ("spoil", "status", "code"),
    [
        (lambda folder: tiny.write(folder, layers=9), 422, "adapter_incompatible"),
        (shutil.rmtree, 404, "model_not_found"),
        (lambda bad: bad.rename(f"{bad}x") and bad.write_text("x"), 422, "adapter_malformed"),
    ],
)
async def test_a_refused_one_is_unnamed(tmp_path: Path, spoil: Any, status: int, code: str) -> None:
    """And a name that it was to get in place keeps its meaning."""
    good, bad = tiny.write(tmp_path / "good", 1), tiny.write(tmp_path / "bad", 2)
    spoil(bad)
    async with serving() as world:
        refused = await load(world, "a", bad)
        assert (refused.status, refused.error["code"]) == (status, code)
        assert str(bad) in refused.error["message"]
        assert (await world.ask("GET", "/v1/models/a")).status == 404
        assert (await unload(world, "a")).status == 404
        usage = world.service.loader.placement().usage
        assert (usage.waiting, usage.leases, usage.device_bytes.used) == (0, 0, 0)

        assert (await load(world, "a", good)).status == 200
        again = await load(world, "a", bad, load_inplace=True)
        assert (again.status, again.error["code"]) == (status, code)
        assert await asked_for(world, "a") == good


async def test_where_adapters_are(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    async with serving() as world:
        await load(world, "a", folder)
        async with await world.service.loader.load(folder):
            (one,) = await adapters(world)
    assert one["names"] == ["a"]
    assert one["id"].endswith(str(folder))
    assert (one["tier"], one["state"], one["leases"], one["pins"]) == ("device", "resident", 1, 0)
    assert one["slot"] == {"index": 0, "generation": 1}
    assert one["device_bytes"] == 4 * 2 * 1536
    assert [event["event"] for event in one["story"]] == ["SlotGranted", "Resident"]
    assert one["story"][0]["layers"] == [0, 1, 2, 3]


async def test_neither_the_disk_nor_a_long_list_holds_the_loop(monkeypatch: Patch) -> None:
    looks = watched(monkeypatch, Path, "is_dir")
    lists = watched(monkeypatch, JSONResponse, "render")
    async with serving() as world:
        await load(world, "a", "no/such")
        await adapters(world)
    threads = [look.thread for look in looks if str(look.args[0]) == "no/such"]
    threads += [made.thread for made in lists if "data" in made.args[1]]
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_a_failure_stands_in_the_story_with_its_error(tmp_path: Path) -> None:
    source = make_source(tmp_path, "org/a")
    source.fail("fetch_groups", FetchError("the line was cut", retryable=False))
    async with serving(loader=over(source)) as world:
        await fails(world.service.loader.load("org/a"), FetchError)
        (await world.service.loader.load("org/a")).release()
        story = (await adapters(world))[0]["story"]
    names = [event["event"] for event in story]
    assert names == ["SlotGranted", "Failed", "Leaving", "SlotGranted", "Resident"]
    assert story[1]["error"]["error"] == "FetchError"
    assert "the line was cut" in story[1]["error"]["message"]


async def test_a_pinned_adapter_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    there = over(make_source(tmp_path, *names), max_slots=2)
    async with serving(loader=there, adapters={name: name for name in names}) as world:
        for _ in range(2):
            answer = await pin(world, "a")
            said = b"Success: LoRA adapter 'a' pinned successfully."
            assert (answer.status, answer.body) == (200, said)
        for name in "bcb":
            (await there.load(name)).release()
        (one,) = (each for each in await adapters(world) if each["names"] == ["a"])
        assert (one["tier"], one["state"], one["pins"]) == ("device", "resident", 1)

        assert (await unpin(world, "a")).status == 200
        assert [where.pins for where in on_device(there)] == [0, 0]
        (await there.load("c")).release()
        assert there.try_acquire("a") is None, "it was evicted like any other"
        again = await unpin(world, "a")
        assert (again.status, again.error["type"]) == (404, "NotFoundError")
        assert again.error["message"] == "The lora adapter 'a' is not pinned."
        for call in (pin, unpin):
            unknown = await call(world, "d")
            assert unknown.status == 404
            assert unknown.error["message"] == "The lora adapter 'd' cannot be found."


async def test_a_pin_ends_with_the_last_name_and_follows_one_that_is_loaded_in_place(
    tmp_path: Path,
) -> None:
    there = over(make_source(tmp_path, "one", "two", "three"))
    async with serving(loader=there, adapters={"a": "one", "b": "one"}) as world:
        await pin(world, "a")
        await unload(world, "a")
        assert pinned(world) == ["one"], "another name has it"
        assert (await load(world, "b", "two", load_inplace=True)).status == 200
        assert pinned(world) == ["two"]
        await load(world, "c", "two")
        await load(world, "b", "three", load_inplace=True)
        assert pinned(world) == ["two"]
        assert (await unload(world, "c")).status == 200
        assert pinned(world) == []
        assert there.try_acquire("two") is None, "an unload of a pinned one takes it away"


async def test_what_was_saved_again_is_pinned_by_a_load_in_place(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with serving(adapters={"a": folder}) as world:
        await pin(world, "a")
        tiny.write(folder, 2)
        await load(world, "a", folder, load_inplace=True)
        assert len(pinned(world)) == 1
        where = world.service.loader.placement().find(folder)
        assert where is not None
        assert where.pins == 1
        tiny.write(folder, 3)
        (await world.service.loader.load(folder)).release()
        assert len(pinned(world)) == 1, "the version that was pinned"
        await unload(world, "a")
        assert pinned(world) == []


class RevisionedSource(FakeSource):
    """Ids with a revision mean the one version that the id alone has."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        assert isinstance(ref.id, str)
        return await super().resolve(replace(ref, id=ref.id.partition("@")[0]))


SPELLINGS: list[Callable[[Path], object]] = [
    lambda v3: v3.parent / "link",
    lambda v3: v3.parent / "linked parent" / "v3",
    lambda v3: f"{v3}/",
    lambda v3: f"{v3}/../v3",
    lambda v3: f"{v3.parent}/./v3/.",
    os.path.relpath,
]


@asynccontextmanager
async def serving_spellings(tmp_path: Path, spell: Any) -> AsyncIterator[tuple[World, Any, Any]]:
    """A server with two names, prod and trial, for one adapter; the spellings come with it."""
    if isinstance(spell, tuple):
        source = RevisionedSource()
        for seed, name in enumerate(("org/v3", "org/v4")):
            source.put(name, *tiny.files(tiny.write(tmp_path / name, seed)))
        there, (first, second) = over(source), spell
    else:
        first = tiny.write(tmp_path / "adapters" / "v3")
        (first.parent / "link").symlink_to("v3")
        (first.parent / "linked parent").symlink_to(first.parent)
        there, second = tiny_loader(), spell(first)
    async with serving(loader=there) as world:
        for name, path in (("prod", first), ("trial", second)):
            assert (await load(world, name, path)).status == 200
        yield world, first, second


HUB = [("org/v3", "org/v3@main"), ("org/v3@main", "org/v3"), ("org/v3@a", "org/v3@b")]
any_spelling = pytest.mark.parametrize("spell", [*SPELLINGS, *HUB], ids=[*"abcdefghi"])


async def pins(world: World) -> list[tuple[int, list[str]]]:
    """The pins and the names of each adapter on the device."""
    rows = [row for row in await adapters(world) if row["tier"] == "device"]
    return [(row["pins"], row["names"]) for row in rows]


@any_spelling
async def test_an_unload_leaves_what_another_spelling_names(tmp_path: Path, spell: Any) -> None:
    for first, last in (("trial", "prod"), ("prod", "trial")):
        async with serving_spellings(tmp_path / first, spell) as (world, *_):
            assert (await pin(world, "prod")).status == 200
            assert await pins(world) == [(1, ["prod", "trial"])]
            assert (await unload(world, first)).status == 200
            assert await pins(world) == [(1, [last])], "its pin is the last name's"
            assert (await unload(world, last)).status == 200
            assert await pins(world) == [], "with its last name it goes"


@any_spelling
async def test_an_unpin_leaves_the_pin_of_another_name(tmp_path: Path, spell: Any) -> None:
    async with serving_spellings(tmp_path, spell) as (world, first, _):
        await load(world, "same", first)
        await pin(world, "prod")
        for other in ("trial", "same"):
            refused = await unpin(world, other)
            assert refused.status == 404
            said = f"The lora adapter '{other}' is not pinned; its adapter is, as 'prod'."
            assert refused.error["message"] == said
            assert (await pin(world, other)).status == 200
            assert (await unpin(world, other)).status == 200
            assert [count for count, _ in await pins(world)] == [1]
        await pin(world, "trial")
        assert (await unpin(world, "prod")).status == 200
        assert [count for count, _ in await pins(world)] == [1]
        await unload(world, "prod")
        await unload(world, "same")
        assert (await unpin(world, "trial")).status == 200
        assert await pins(world) == [(0, ["trial"])]


@any_spelling
async def test_a_load_in_place_leaves_what_another_spelling_names(
    tmp_path: Path, spell: Any
) -> None:
    other: object = "org/v4" if isinstance(spell, tuple) else tiny.write(tmp_path / "v4", 4)
    async with serving_spellings(tmp_path, spell) as (world, first, second):
        await pin(world, "prod")
        assert (await load(world, "prod", second, load_inplace=True)).status == 200
        assert await pins(world) == [(1, ["prod", "trial"])], "the same version"
        assert (await load(world, "prod", other, load_inplace=True)).status == 200
        assert sorted(await pins(world)) == [(0, ["prod"]), (1, ["trial"])]
        await load(world, "prod", first, load_inplace=True)
        await pin(world, "prod")
        await load(world, "prod", other, load_inplace=True)
        assert sorted(await pins(world)) == [(1, ["prod"]), (1, ["trial"])], "each has its own"
        await load(world, "trial", other, load_inplace=True)
        assert (1, ["prod", "trial"]) in await pins(world)
        for own in (other, first, second):
            await load(world, "trial", own, load_inplace=True)
        assert sorted(await pins(world)) == [(1, ["prod"]), (1, ["trial"])], "it moves along"
        await load(world, "prod", first, load_inplace=True)
        await unpin(world, "prod")
        await load(world, "trial", first, load_inplace=True)
        assert (await unpin(world, "trial")).status == 200, "its own pin stayed its own"
        for name in ("trial", "prod"):
            await load(world, name, other, load_inplace=True)
        await pin(world, "trial")
        await unload(world, "prod")
        assert (1, ["trial"]) in await pins(world)


async def test_a_pin_of_an_earlier_version_outlives_the_unload_of_another_name(
    tmp_path: Path,
) -> None:
    """A name counts for the version that it has pinned, and for the one that it means now."""
    folder = tiny.write(tmp_path / "v3", 1)
    link = tmp_path / "link"
    link.symlink_to("v3")
    async with serving(adapters={"prod": folder, "trial": link}) as world:
        await pin(world, "prod")
        await pin(world, "trial")
        tiny.write(folder, 2)
        (
            await world.service.loader.load(folder)
        ).release()  # prod means it now, and trial did not ask
        assert sorted(await pins(world)) == [(0, ["prod"]), (1, ["trial"])]
        await unload(world, "trial")
        assert sorted(await pins(world)) == [(0, ["prod"]), (1, [])], "pinned by prod"
        await pin(world, "prod")
        assert sorted(await pins(world)) == [(0, []), (1, ["prod"])], "its pin moved"
        await unload(world, "prod")
        assert await pins(world) == [(0, [])], "the earlier one stays until it is evicted"


async def test_a_name_that_goes_during_its_pin_leaves_none(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with serving(loader=over(source), adapters={"a": "a"}) as world:
        source.hold("a")
        pinning = asyncio.create_task(pin(world, "a"))
        await until(lambda: world.service.loader.placement().usage.waiting)
        unloading = asyncio.create_task(unload(world, "a"))
        await until(lambda: not world.service.names.adapters)
        source.allow("a")
        assert ((await unloading).status, (await pinning).status) == (200, 404)
        assert pinned(world) == []


async def test_a_pin_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = tiny.write(tmp_path / "broken", layers=9)
    there = over(make_source(tmp_path, "a", "b"), max_slots=1, timeout=0.2)
    engine = FakeEngine(loading(there))
    async with serving(engine, there, adapters={"x": broken, "a": "a", "b": "b"}) as world:
        assert (await pin(world, "a")).status == 200
        full = await pin(world, "b")
        assert (full.status, full.error["code"]) == (429, "over_capacity")
        assert full.error["message"].endswith("the only slot is pinned")
        asked = await world.ask("POST", "/v1/completions", {"model": "b", "prompt": "x"})
        assert (asked.status, asked.error["message"]) == (429, full.error["message"])
    async with serving(adapters={"x": broken}) as world:
        refused = await pin(world, "x")
        assert (refused.status, refused.error["code"]) == (422, "adapter_incompatible")
        assert pinned(world) == []


async def call_with(world: World, method: str, path: str, key: str | None) -> Answer:
    """Send this as the field `Authorization`, in Latin-1; without a key, no such field."""
    fields = "" if key is None else f"Authorization: {key}\r\n"
    return await world.raw(
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{fields}"
        "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".encode("latin-1")
    )


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer x", f"Basic {TOKEN}", "Bearer \xe9", None])
async def test_calls_of_the_operator_need_the_token(key: str | None) -> None:
    """Without one in the settings, whatever is sent; the page's calls, if a token is sent."""
    token, sent = (None, f"Bearer {TOKEN}") if key is None else (TOKEN, key)
    async with serving(admin_token=token) as world:
        calls = [*(("POST", path) for path in (LOAD, UNLOAD, PIN, UNPIN)), ("GET", ADAPTERS)]
        calls += [("GET", path) for path in PAGE if sent.startswith("Bearer ")]
        for method, path in calls:
            answer = await call_with(world, method, path, sent)
            if key is None:
                assert (answer.status, answer.error["code"]) == (403, "admin_disabled")
            else:
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert TOKEN not in answer.body.decode()


OPEN = {"/health", "/ping", "/version", "/metrics", "/openapi.json", *FILES}


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer onetwo", "Basic one", "Bearer \xe9"])
async def test_every_call_but_probes_needs_a_key_where_there_are_keys(sent: str | None) -> None:
    async with serving(api_keys=("one", "two")) as world:
        routes = [*iter_route_contexts(create_app(world.service).routes)]
        assert {route.path for route in routes} > OPEN
        for route in routes:
            (method,) = (route.methods or set()) - {"HEAD"}
            path = str(route.path).replace("{name:path}", "base")
            answer = await call_with(world, method, path, sent)
            assert answer.status == (200 if path in OPEN else 401), path
            if path not in OPEN:
                assert answer.error["type"] == "invalid_request_error"
                assert (answer.error["code"], answer.error["param"]) == ("invalid_api_key", None)
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_each_key_and_the_admin_token_open_what_is_theirs() -> None:
    async with serving(api_keys=("one", "two")) as world:
        for key in ("one", "two", TOKEN):
            client = world.client.with_options(api_key=key)
            assert [model.id async for model in await client.models.list()] == ["base"]
            await client.completions.create(model="base", prompt="x")
            page = await world.ask("HEAD", "/page/events", Authorization=f"Bearer {key}")
            assert page.status == 200
            listed = await world.ask("GET", ADAPTERS, Authorization=f"Bearer {key}")
            assert listed.status == (200 if key == TOKEN else 401)
        wrong = world.client.with_options(api_key="three")
        refused = await fails(
            wrong.completions.create(model="base", prompt="x"), openai.AuthenticationError
        )
        assert "three" not in str(refused)
    async with serving(api_keys=("one",), admin_token=None) as world:
        listed = await world.ask("GET", ADAPTERS, Authorization="Bearer one")
        assert (listed.status, listed.error["code"]) == (403, "admin_disabled")
