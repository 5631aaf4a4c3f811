"""Which ids requests may name, and for whose the hub sees the operator's token."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn
from user_loads import at, contents, loader, written

from lorax_async.cli.arguments import as_source, request_sources, server_loader_settings
from lorax_async.cli.serve import find_adapters
from lorax_async.ids.allow import Allow
from lorax_async.types import AdapterRef
from server.world import Answer, FakeEngine, World, echo, loading, serving

pytestmark = pytest.mark.usefixtures("nothing_left", "hub_client")

TOKEN = "hf_0perat0rsToken"
OWN = f"Bearer {TOKEN}"
CHAT = "/v1/chat/completions"
PRIVATE, PUBLIC, ELSEWHERE = "org/private", "org/public", "other/private"


async def ask(world: World, model: str) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    return await world.ask("POST", CHAT, body)


async def test_requests_may_name_no_id_by_default() -> None:
    engine = FakeEngine(echo)
    async with serving(engine, adapters={"sql": "org/name"}, sources=()) as world:
        for model in (
            *("org/name", "org/name@main", "org/name@refs/pr/1", "s3://bucket/a", "gs://bucket/a"),
            *("az://container/a", "https://host.example/a", "http://127.0.0.1:1/a"),
        ):
            answer = await ask(world, model)
            assert (answer.status, answer.error["code"]) == (403, "model_access_denied")
            assert answer.error["param"] == "model"
            assert "--source" in answer.error["message"]
        assert not engine.submitted
        for name in ("sql", "base"):
            assert (await ask(world, name)).status == 200


async def test_requests_may_name_what_is_below_a_source() -> None:
    sources = (Allow("hub", prefix="org/"), Allow("s3", "bucket", prefix="loras/"))
    async with serving(FakeEngine(echo), sources=sources) as world:
        statuses = {
            model: (await ask(world, model)).status
            for model in (
                *("org/name", "org/name@v1", "s3://bucket/loras/a", "./folder"),
                *("other/name", "Org/name", "org/name@refs/pr/1", "s3://bucket/loras2/a"),
            )
        }
        # Folders are the loader's to judge, by its local_roots.
        assert list(statuses.values()) == [200, 200, 200, 200, 403, 403, 403, 403], statuses


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = contents(written(tmp_path / "adapter", layers=4, rank=4))
    with HubStandIn() as found:
        found.put(PUBLIC, files)
        for repo in (PRIVATE, ELSEWHERE):
            found.put(repo, files, private_token=TOKEN)
        yield found


@asynccontextmanager
async def served(
    hub: HubStandIn, cache: Path, adapters: list[str], sources: list[str], *, offline: bool = False
) -> AsyncIterator[World]:
    """A server with a loader, as the command line makes them."""
    found, places = find_adapters(adapters), [as_source(text) for text in sources]
    arguments = argparse.Namespace(source=places, hub_endpoint=hub.endpoint, offline=offline)
    refs = [ref for ref in found.values() if isinstance(ref, AdapterRef)]
    config = server_loader_settings(arguments, refs)
    config["allow"] = (*config["allow"], at(hub.store_netloc))
    there = loader(cache, layers=4, **config)
    engine = FakeEngine(loading(there))
    async with serving(engine, there, adapters=found, sources=request_sources(arguments)) as world:
        yield world


def sent(hub: HubStandIn, repo: str) -> set[str | None]:
    return {each.fields.get("authorization") for each in hub.asked if repo in each.target}


@pytest.mark.parametrize(
    ("sources", "statuses", "tokens"),
    [
        # What strangers get for a public repository, a private one, and one of others; and the
        # authority on which the hub was asked for each.
        ([], [403, 403, 403], [set(), set(), set()]),
        (["hub"], [200, 403, 403], [{None}, {None}, {None}]),
        (["hub:org/"], [200, 200, 403], [{OWN}, {OWN}, set()]),
        (["hub", "hub:org/"], [200, 200, 403], [{OWN}, {OWN}, {None}]),
    ],
    ids=["closed", "hub", "org", "hub and org"],
)
async def test_a_strangers_id_gets_the_token_of_its_source_alone(
    hub: HubStandIn, tmp_path: Path, sources: list[str], statuses: list[int], tokens: Any
) -> None:
    async with served(hub, tmp_path, [], sources) as world:
        found = [await ask(world, model) for model in (PUBLIC, PRIVATE, ELSEWHERE)]
        assert [answer.status for answer in found] == statuses
        assert all(TOKEN.encode() not in answer.body for answer in found)
    assert [sent(hub, repo) for repo in (PUBLIC, PRIVATE, ELSEWHERE)] == tokens


@pytest.mark.parametrize("by", ["--adapters", "the admin"])
async def test_operators_names_get_their_token(hub: HubStandIn, tmp_path: Path, by: str) -> None:
    """And that makes it no stranger's, though it is on the device and the hub is open to all."""
    commit = hub.repos[PRIVATE].refs["main"]
    given = [f"sql={PRIVATE}"] if by == "--adapters" else []
    async with served(hub, tmp_path, given, ["hub"]) as world:
        if by == "the admin":
            body = {"lora_name": "sql", "lora_path": PRIVATE}
            assert (await world.admin("/v1/load_lora_adapter", body)).status == 200
        assert (await ask(world, "sql")).status == 200
        assert sent(hub, PRIVATE) == {OWN}
        begun = len(hub.asked)
        for id in (PRIVATE, f"{PRIVATE}@main", f"{PRIVATE}@{commit}"):
            assert (await ask(world, id)).status == 403
        assert {each.fields.get("authorization") for each in hub.asked[begun:]} == {None}
        assert (await ask(world, "sql")).status == 200


async def test_offline_no_source_is_asked(hub: HubStandIn, tmp_path: Path) -> None:
    async with served(hub, tmp_path, [f"sql={PRIVATE}"], ["hub:org/"], offline=True) as world:
        for model in ("sql", PRIVATE, PUBLIC):
            assert (await ask(world, model)).status == 502
    assert not hub.asked
