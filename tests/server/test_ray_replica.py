"""A replica of the server on Ray Serve, called as its ingress calls it, without Ray."""

import asyncio
import gc
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from httpx2 import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from scraping import parsed
from server_world import llama_config, tokenizer
from transformers import LlamaForCausalLM

from lorax_async.config import LoaderConfig
from lorax_async.server.ray_serve import AdapterIngress, AdapterServer, adapter_of

REQUEST = {"model": "b", "prompt": "once", "max_tokens": 40, "stream": True}
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    "client": ("127.0.0.1", 1),
}


async def test_nothing_is_left_of_a_request_whose_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = LoaderConfig(dtype="float32", device_bytes=1 << 20, max_slots=3)
    close = AdapterServer.__del__
    monkeypatch.delattr(AdapterServer, "__del__")  # Ray awaits it
    server = AdapterServer.__new__(AdapterServer)
    await server.__init__(tmp_path, config, {"base": "b", "adapters": {}})  # type: ignore[misc]
    before = asyncio.all_tasks()
    for messages in (1, 3, 1_000):
        bodies = []
        async with aclosing(server.respond(SCOPE, json.dumps(REQUEST).encode())) as response:
            async for message in response:
                bodies.append(message.get("body", b""))
                await asyncio.sleep(0)  # the next one waits to be read
                if len(bodies) == messages:
                    break
        if left := asyncio.all_tasks() - before:
            await asyncio.wait(left, timeout=5)
        assert asyncio.all_tasks() <= before
    assert b"[DONE]" in b"".join(bodies)
    await close(server)
    del server, response
    gc.collect()


def test_what_is_no_name_is_routed_as_no_adapter() -> None:
    """It would stay in each router's memory, or fail there, and leave the request unanswered."""
    assert adapter_of(b'{"model": "org/sql"}') == "org/sql"
    bodies = b'{"model": "\\ud800"}', b'{"model": "%s"}' % (b"x" * 5_000), b'{"model": 1}', b"["
    assert {adapter_of(body) for body in bodies} == {""}


class Broadcast:
    """Ray's handle of replicas whose calls of a method have these outcomes, as far as it is used."""

    def __init__(self, outcomes: list[Any]) -> None:
        self._outcomes = outcomes

    def broadcast(self, method: str) -> "Broadcast":
        assert method == "metrics"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if isinstance(self._outcomes[0], TimeoutError):
            raise self._outcomes[0]
        return self._outcomes


async def scrape(outcomes: list[Any]) -> tuple[int, str]:
    app, ingress = FastAPI(), AdapterIngress(Broadcast(outcomes), "b")

    @app.get("/metrics")
    async def ask(request: Request) -> Any:
        return await ingress(request)

    transport = ASGITransport(app)
    async with AsyncClient(transport=transport, base_url="http://ray", trust_env=False) as client:
        answer = await client.get("/metrics")
    return answer.status_code, answer.text


def numbers(replica: str) -> tuple[str, bytes]:
    registry, size = CollectorRegistry(), len(replica)
    Counter("lorax_loads", "Loads.", ["tier"], registry=registry).labels('a "b').inc(size)
    Gauge("vllm:lora_requests_info", "Info.", registry=registry).set(size)
    Histogram("lorax_wait", "Waits.", buckets=(1.0,), registry=registry).observe(size)
    return replica, generate_latest(registry)


async def test_the_ingress_has_the_numbers_of_all_replicas() -> None:
    status, text = await scrape([numbers("one"), numbers("three"), RuntimeError("it died")])
    assert status == 200
    found = parsed(text)
    for replica, size in (("one", 3), ("three", 5)):
        assert found[f'lorax_loads_total{{replica={replica},tier=a "b}}'] == size
        assert found[f"vllm:lora_requests_info{{replica={replica}}}"] == size
        assert found[f"lorax_wait_sum{{replica={replica}}}"] == size
        assert found[f"lorax_wait_bucket{{le=+Inf,replica={replica}}}"] == 1
    assert text.count("# TYPE lorax_loads_total counter") == 1
    assert (await scrape([TimeoutError()]))[0] == 503
