"""The embedding example: a real model behind a real web framework, asked without a network."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlencode

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def _get(app: Any, path: str, **query: str) -> tuple[int, dict[str, str], Any]:
    """One GET by the ASGI protocol; returns status, headers and the JSON body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "query_string": urlencode(query).encode(),
        "headers": [],
    }
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers, json.loads(body)


@pytest.mark.slow
def test_a_server_embeds_the_loader() -> None:
    app = _example("embed_fastapi").smollm2_with_examples()

    async def ask(adapter: str) -> tuple[int, dict[str, str], Any]:
        return await _get(app, "/answer", adapter=adapter, prompt="What is ice?")

    async def main() -> None:
        async with app.router.lifespan_context(app):
            asked = await asyncio.gather(
                ask("pirate"), ask("shout"), ask("absent"), ask("../../.git"), ask("\x00")
            )
            leases = [place.leases for place in app.state.loader.residency().values()]
        (pirate, shout), refused = asked[:2], asked[2:]
        assert pirate[0] == shout[0] == 200
        assert pirate[2]["answer"].startswith("Arr")
        assert shout[2]["answer"].isupper()
        assert [(status, body["error"]) for status, _, body in refused] == [
            (404, "AdapterNotFoundError"),
            (403, "AccessDeniedError"),
            (400, "InvalidAdapterIdError"),
        ]
        assert not any("retry-after" in headers for _, headers, _ in refused)
        assert leases == [0, 0]

    asyncio.run(main())


def test_every_error_has_a_status() -> None:
    example = _example("embed_fastapi")
    kinds = [kind for kind, _ in example.STATUS]
    for earlier, kind in enumerate(kinds):
        assert not any(issubclass(kind, broader) for broader in kinds[:earlier]), kind
    assert kinds[-1].__name__ == "LoraxError"
