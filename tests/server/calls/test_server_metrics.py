"""GET /metrics, read by Prometheus' own parser, after requests known by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError
from starlette.types import Receive, Scope, Send

import tiny
from common import until
from lorax_async import FetchError
from lorax_async.server.calls.metrics import CountedRequests
from metrics.scraping import Samples, of, parsed
from server.world import POST, FakeEngine, World, failing, serving

INFO = "vllm:lora_requests_info"


async def scraped(world: World) -> Samples:
    answer = await world.ask("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return parsed(answer.body.decode())


def requests(samples: Samples) -> Samples:
    return of(samples, "lorax_server_requests_total")


async def test_requests_and_tokens() -> None:
    prompt = "five!"
    async with serving() as world:
        ask = world.client.completions.create
        await ask(model="base", prompt=prompt)
        async for _ in await ask(model="base", prompt=prompt, stream=True):
            pass
        with pytest.raises(APIStatusError):
            await ask(model="base", prompt=prompt, max_tokens=-1)
        await world.ask("GET", "/v1/models/base")
        await world.ask("GET", "/v1/models/nobody")
        await world.ask("GET", "/made/up")
        samples = await scraped(world)
        told = world.service.loader.statistics()
    assert requests(samples) == {
        "call=/v1/completions,status=200": 2,
        "call=/v1/completions,status=400": 1,
        "call=/v1/models,status=200": 1,
        "call=/v1/models,status=404": 1,
        "call=other,status=404": 1,
    }
    assert samples["lorax_server_prompt_tokens_total"] == 2 * len(prompt)
    assert samples["lorax_server_tokens_total"] == 2 * len("hello")
    assert samples["lorax_server_first_token_seconds_count"] == 2
    assert samples["lorax_server_inter_token_seconds_count"] == 2 * (len("hello") - 1)
    assert samples["lorax_loads_total"] == told.loads == 0
    assert samples["lorax_slots_limit"] == 4


async def test_what_waits_and_runs_is_told_as_vllm_does(tmp_path: Path) -> None:
    engine = FakeEngine()
    folders = {name: tiny.write(tmp_path / name) for name in ("pirate", "shout")}
    async with serving(engine, adapters=folders) as world:

        def ask(model: str) -> asyncio.Task[object]:
            return asyncio.create_task(world.client.completions.create(model=model, prompt="x"))

        tasks = [ask(model) for model in ("pirate", "shout", "org/strangers", "base")]
        await engine.asked(4)
        by_adapter = {tokens.generation.adapter: tokens for tokens in engine.submitted}
        running = by_adapter[folders["pirate"]]
        running.say("a")
        await until(lambda: world.service.metrics.sequences.running)
        samples = await scraped(world)
        ((info, now),) = of(samples, INFO).items()
        assert info == "max_lora=4,running_lora_adapters=pirate,waiting_lora_adapters=shout"
        assert now > 1.7e9
        assert samples["lorax_server_sequences_waiting"] == 3
        assert samples["lorax_server_sequences_running"] == 1
        for tokens in engine.submitted:
            tokens.end()
        await asyncio.gather(*tasks)
        samples = await scraped(world)
        assert list(of(samples, INFO)) == [
            "max_lora=4,running_lora_adapters=,waiting_lora_adapters="
        ]
        assert samples["lorax_server_sequences_waiting"] == 0
        assert samples["lorax_server_sequences_running"] == 0


async def test_who_fails_or_goes_waits_no_more() -> None:
    engine = FakeEngine()

    def requests_of(world: World) -> bool:
        return bool(next(iter(world.service.metrics.requests.collect())).samples)

    async with serving(engine) as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        content = b'{"model": "base", "prompt": "x"}'
        head = f"{POST}Content-Length: {len(content)}"
        writer.write(head.encode() + b"\r\n\r\n" + content)
        tokens = await engine.asked()
        writer.close()
        await tokens.cancelled.wait()
        await until(lambda: requests_of(world))
        engine._rule = failing(FetchError("the source is down"))
        with pytest.raises(APIStatusError):
            await world.client.completions.create(model="org/x", prompt="x")
        samples = await scraped(world)
    assert requests(samples) == {
        "call=/v1/completions,status=499": 1,
        "call=/v1/completions,status=502": 1,
    }
    assert samples["lorax_server_sequences_waiting"] == 0
    assert samples["lorax_server_tokens_total"] == 0


async def test_who_is_stopped_runs_no_more() -> None:
    """At a stop text the answer ends, and nobody asks the engine for a token again."""
    engine = FakeEngine()
    async with serving(engine) as world:
        ask = world.client.completions.create(model="base", prompt="x", stop="b")
        task = asyncio.create_task(ask)
        tokens = await engine.asked()
        tokens.say("ab")
        assert (await task).choices[0].text == "a"
        samples = await scraped(world)
    assert samples["lorax_server_sequences_running"] == 0
    assert samples["lorax_server_sequences_waiting"] == 0
    assert samples["lorax_server_tokens_total"] == 2


async def test_a_fault_is_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as world:
        monkeypatch.setattr(world.service.names, "find", lambda model: 1 / 0)
        with pytest.raises(APIStatusError):
            await world.client.completions.create(model="base", prompt="x")
        assert requests(await scraped(world)) == {"call=/v1/completions,status=500": 1}


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
        "text/plain",
        "",
    ],
)
async def test_names_are_the_same_whoever_asks(accept: str) -> None:
    """The first is what Prometheus 2 sends. Its parser wants sample and family of one name."""
    async with serving() as world:
        answer = await world.ask("GET", "/metrics", Accept=accept)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert len(of(parsed(answer.body.decode()), INFO)) == 1


async def test_what_is_no_request_is_not_counted() -> None:
    async with serving() as world:
        metrics = world.service.metrics
        heard: list[str] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            heard.append(scope["type"])

        async def nothing(*_: object) -> Any:
            raise AssertionError("nobody asks")

        for kind in ("lifespan", "websocket"):
            await CountedRequests(app, metrics)({"type": kind}, nothing, nothing)
        assert heard == ["lifespan", "websocket"]
        assert requests(await scraped(world)) == {}


async def test_a_name_with_a_comma_is_no_two_names(tmp_path: Path) -> None:
    engine = FakeEngine()
    folders = {name: tiny.write(tmp_path / name) for name in ("a,b", "c")}
    async with serving(engine, adapters=folders) as world:
        ask = world.client.completions.create
        tasks = [asyncio.create_task(ask(model=name, prompt="x")) for name in folders]
        await engine.asked(2)
        samples = await scraped(world)
        assert list(of(samples, INFO)) == [
            "max_lora=4,running_lora_adapters=,waiting_lora_adapters=c"
        ]
        for tokens in engine.submitted:
            tokens.end()
        await asyncio.gather(*tasks)


async def test_looks_at_the_loop_end_with_the_server() -> None:
    async with serving() as world:
        looks = world.service.metrics._loader._lag
        running = [looks.running]
        world.server.stop()
        await asyncio.wait([world.ended])
        assert [*running, looks.running] == [True, False]
