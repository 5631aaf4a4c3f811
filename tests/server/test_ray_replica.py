"""A replica of the server on Ray Serve, called as its ingress calls it, without Ray."""

import asyncio
import gc
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from server_world import llama_config, tokenizer
from transformers import LlamaForCausalLM

from lorax_async.config import LoaderConfig
from lorax_async.server.ray_serve import AdapterServer, adapter_of

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
