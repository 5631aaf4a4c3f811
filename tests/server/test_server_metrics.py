"""GET /metrics, read by Prometheus' own parser, after requests known by hand."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from event_loops import until
from openai import APIStatusError
from scraping import Samples, of, parsed
from server_world import FakeEngine, World, failing, request, serving
from starlette.types import Receive, Scope, Send
from tiny_loaders import fails, loader

from lorax_async.errors import AdapterNotFoundError, FetchError, LoraxError
from lorax_async.server.engine import Generation
from lorax_async.server.server_log import RequestObserver
from lorax_async.server.server_metrics import ObservedTokens, ServerMetrics
from lorax_async.server.server_settings import ModelNames

ROOT = Path(__file__).parents[2]
INFO = "vllm:lora_requests_info"
NONE = "max_lora=4,running_lora_adapters=,waiting_lora_adapters="


async def scraped(world: World) -> Samples:
    answer = await world.ask("GET", "/metrics")
    assert answer.status == 200
    return parsed(answer.body.decode())


def requests(samples: Samples) -> Samples:
    return of(samples, "lorax_server_requests_total")


def sequences(samples: Samples) -> tuple[float, float]:
    waiting, running = (f"lorax_server_sequences_{state}" for state in ("waiting", "running"))
    return samples[waiting], samples[running]


async def until_sequences(world: World, waiting: int, running: int) -> Samples:
    async with asyncio.timeout(20):
        while sequences(samples := await scraped(world)) != (waiting, running):
            pass
    return samples


async def test_requests_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "five!"
    async with serving() as world:
        ask = world.client.completions.create
        await ask(model="base", prompt=prompt)
        async for _ in await ask(model="base", prompt=prompt, stream=True):
            pass
        await fails(ask(model="base", prompt=prompt, max_tokens=-1), APIStatusError)
        for path in ("/v1/models/base", "/v1/models/nobody", "/made/up"):
            await world.ask("GET", path)
        world.engine.rule = failing(FetchError("the source is down"))
        await fails(ask(model="org/x", prompt="x"), APIStatusError)
        monkeypatch.setattr(world.service.names, "resolve", lambda model: 1 / 0)
        await fails(ask(model="base", prompt="x"), APIStatusError)
        samples = await scraped(world)
        told = world.service.loader.statistics()
    counts = {f"call=/v1/completions,status={status}": 1 for status in (200, 400, 500, 502)}
    counts |= {f"call={call},status=404": 1 for call in ("/v1/models", "other")}
    counts |= {"call=/v1/completions,status=200": 2, "call=/v1/models,status=200": 1}
    assert requests(samples) == counts
    for name, value in (
        ("server_prompt_tokens_total", 2 * len(prompt)),
        ("server_tokens_total", 2 * len("hello")),
        ("server_first_token_seconds_count", 2),
        ("server_inter_token_seconds_count", 2 * (len("hello") - 1)),
        *(("loads_total", told.loads), ("loads_total", 0), ("slots_limit", 4)),
    ):
        assert samples[f"lorax_{name}"] == value
    assert sequences(samples) == (0, 0)


async def test_prompts_are_counted_once_they_were_computed() -> None:
    """The total is that of the answers' usage: not of a request that failed, or left, before."""
    engine, loading = FakeEngine(), loader()
    async with serving(engine, loading) as world:
        gone = world.completing({"model": "org/not-there", "prompt": "68 tokens"})
        (await engine.asked(1)).fail(AdapterNotFoundError("no such repository"))
        assert (await gone).status == 404

        ask = world.client.completions.create
        empty = asyncio.create_task(ask(model="base", prompt="empty"))
        (await engine.asked(2)).end("stop")
        two = asyncio.create_task(ask(model="base", prompt="two"))
        (await engine.asked(3)).say("ab")
        samples = await until_sequences(world, waiting=0, running=1)
        assert samples["lorax_server_prompt_tokens_total"] == len("empty" + "two"), "in progress"
        engine.submitted[2].end()
        usages = [answer.usage for answer in await asyncio.gather(empty, two)]
        assert [usage and usage.prompt_tokens for usage in usages] == [len("empty"), len("two")]

        broken = world.completing({"model": "base", "prompt": "broken"})
        failing = await engine.asked(4)
        failing.say("a")
        failing.fail(FetchError("its layers did not come"))
        assert (await broken).status == 502
        leaving = asyncio.create_task(ask(model="base", prompt="left"))
        await engine.asked(5)
        leaving.cancel()
        await until(engine.submitted[4].cancelled.is_set)
        samples = await scraped(world)
    assert samples["lorax_server_prompt_tokens_total"] == len("empty" + "two" + "broken")


async def test_what_waits_and_runs_is_told_as_vllm_does(tmp_path: Path) -> None:
    """A name with a comma would be read as two, and ids of strangers are theirs."""
    engine = FakeEngine()
    folders = {name: tiny.write(tmp_path / name) for name in ("pirate", "shout", "a,b")}
    async with serving(engine, adapters=folders) as world:
        tasks = []
        for number, model in enumerate((*folders, "org/strangers", "base"), 1):
            tasks.append(world.completing({"model": model, "prompt": "x"}))
            await engine.asked(number)
        engine.submitted[0].say("a")
        samples = await until_sequences(world, waiting=4, running=1)
        assert samples["vllm:num_requests_waiting{model_name=base}"] == 4
        assert samples["vllm:num_requests_running{model_name=base}"] == 1
        assert samples["vllm:request_queue_time_seconds_sum{model_name=base}"] == 0.125
        ((info, now),) = of(samples, INFO).items()
        assert info == "max_lora=4,running_lora_adapters=pirate,waiting_lora_adapters=shout"
        assert now > 1.7e9
        for tokens in engine.submitted:
            tokens.end()
        await asyncio.gather(*tasks)
        samples = await scraped(world)
        assert list(of(samples, INFO)) == [NONE]
        assert sequences(samples) == (0, 0)
        assert samples["vllm:e2e_request_latency_seconds_count{model_name=base}"] == 1


async def test_named_adapters_have_a_tier_while_they_are_in_memory(tmp_path: Path) -> None:
    """No ids of clients, and no more than a page shows."""
    folders = {f"a{n}": tiny.write(tmp_path / str(n)) for n in range(3)}
    many = {f"b{n}": folders["a0"] for n in range(300)}
    async with serving(adapters=folders | many) as world:
        for path in (folders["a0"], folders["a1"], tiny.write(tmp_path / "stranger")):
            (await world.service.loader.load(path)).release()
        tiers = of(await scraped(world), "lorax_adapter_tier")
    assert len(tiers) == 199
    assert {tiers["adapter=a0,tier=device"], tiers["adapter=a1,tier=device"]} == {1}
    assert not any("adapter=a2," in labels or "stranger" in labels for labels in tiers)


async def test_an_ended_sequence_runs_no_more_though_its_request_goes_on() -> None:
    """By itself, at a stop string, or by its client; at a stop its tokens were all counted."""
    engine = FakeEngine()
    async with serving(engine) as world:
        asked = world.completing({"model": "base", "prompt": "x", "n": 3, "stop": "c"})
        last = await engine.asked(3)
        engine.submitted[0].say("a")
        await until_sequences(world, waiting=2, running=1)
        engine.submitted[0].end()
        await until_sequences(world, waiting=2, running=0)
        engine.submitted[1].say("bcd")
        await engine.submitted[1].cancelled.wait()
        await until_sequences(world, waiting=1, running=0)
        last.end()
        assert [choice["text"] for choice in (await asked).json["choices"]] == ["a", "b", ""]
        samples = await scraped(world)
        assert (sequences(samples), samples["lorax_server_tokens_total"]) == ((0, 0), 3)

        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request({"model": "base", "prompt": "x"}))
        await engine.asked(4)
        writer.close()
        samples = await until_sequences(world, waiting=0, running=0)
        assert requests(samples)["call=/v1/completions,status=499"] == 1


async def test_names_are_the_same_for_every_client() -> None:
    """The first is what Prometheus 2 sends. Its parser wants sample and family of one name."""
    async with serving() as world:
        first = (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        )
        other = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"
        for accept in (first, other, "text/plain", ""):
            answer = await world.ask("GET", "/metrics", Accept=accept)
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert len(of(parsed(answer.body.decode()), INFO)) == 1


async def test_a_tokens_time_is_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, one = FakeEngine(), Generation(None, (1,), 3)
    async with loader() as there:
        metrics, clock = ServerMetrics(there, ModelNames("base", {})), [100.0]
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: clock[0])
            submitted = engine.submit(one)
            submitted.say("abc")
            tokens = ObservedTokens(cast(Any, submitted), "base", metrics)
            for seconds in (0.5, 0.25, 0.125):
                clock[0] += seconds
                await anext(tokens)
        sums = []
        for histogram in (metrics.first, metrics.between):
            (family,) = histogram.collect()
            values = {each.name.rpartition("_")[2]: each.value for each in family.samples}
            sums.append((values["count"], values["sum"]))
        assert sums == [(1, 0.5), (2, 0.375)]
        tokens.cancel()
        metrics.close()


async def test_a_status_that_was_sent_is_the_one_that_counts() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200})
            raise RuntimeError("in the middle of the answer")

    async def nothing(*_: Any) -> Any: ...

    async with serving() as world:
        counted = RequestObserver(app, world.service.metrics.count_request)
        await counted({"type": "lifespan"}, nothing, nothing)
        with pytest.raises(RuntimeError, match="middle"):
            await counted({"type": "http", "path": "/health"}, nothing, nothing)
        mounted = {"type": "http", "path": "/inner/ping", "root_path": "/inner"}
        with pytest.raises(RuntimeError, match="middle"):
            await counted(mounted, nothing, nothing)
        calls = ("/health", "/ping")
        assert requests(await scraped(world)) == {f"call={call},status=200": 1 for call in calls}


async def test_behind_a_proxy_paths_may_have_its_prefix() -> None:
    async with serving(root_path="/llm") as world:
        for path in ("/v1/models", "/llm/v1/models", "/llm/page/page.css", "/llm/"):
            assert (await world.ask("GET", path)).status == 200, path
        for path in ("/llmv1/models", "/llm/llm/v1/models"):
            assert (await world.ask("GET", path)).status == 404, path
        counted = requests(await scraped(world))
    calls = {"/v1/models,status=200": 2, "/page,status=200": 1, "/,status=200": 1}
    assert counted == {f"call={call}": n for call, n in calls.items()} | {
        "call=other,status=404": 2
    }


async def test_the_dashboard_asks_for_what_there_is(tmp_path: Path) -> None:
    """Each metric of a query, with the labels by which it is grouped, chosen or named."""
    folder = tiny.write(tmp_path / "sql")
    async with serving(adapters={"sql": folder}) as world:
        await world.client.completions.create(model="sql", prompt="x")
        (await world.service.loader.load(folder)).release()
        await fails(world.service.loader.load(tiny.write(tmp_path / "b", layers=9)), LoraxError)
        samples = await scraped(world)
    labels: dict[str, set[str]] = {}
    for sample in samples:
        name, _, inner = sample.partition("{")
        labels[name] = set(re.findall(r"(\w+)=", inner))
    board = json.loads((ROOT / "examples/grafana/lorax-async.json").read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    assert len(targets) > 20
    for target in targets:
        names = re.findall(r"\b(?:lorax_|vllm:)\w+", target["expr"])
        assert names
        asked = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        asked |= set(re.findall(r"(\w+)=~?\"", target["expr"]))
        for grouped in re.findall(r"(?:by|without|ignoring) ?\(([\w, ]+)\)", target["expr"]):
            asked |= set(re.split(", *", grouped))
        for name in names:
            assert name in labels, name
            assert asked <= labels[name], (name, asked)
