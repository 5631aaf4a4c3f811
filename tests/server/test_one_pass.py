"""Clients who stream answers of different adapters, and what the model computed for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from lorax_async import LoaderConfig
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.server.assembly import Base, Capacity, assembled
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.ports import Part
from lorax_async.server.serving import Serving, listen
from lorax_async.server.settings import ServerSettings

NAMES = ("pirate", "shout")
NEW = 8


@asynccontextmanager
async def served(examples: Path) -> AsyncIterator[AsyncOpenAI]:
    """A whole server of SmolLM2, on loopback."""
    base = Base.load(prepare_base(), dtype="float32", device="cpu")
    settings = ServerSettings(base="smollm2", adapters={name: examples / name for name in NAMES})
    config = LoaderConfig(dtype="float32", device_bytes=64 << 20, max_slots=2)
    async with assembled(base, config, settings, Capacity(sequences=4, length=128)) as service:
        ready = asyncio.Event()
        server, listener = Serving(service, ready.set), listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        ended = asyncio.create_task(server.serve([listener]))
        await ready.wait()
        http = DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=url, api_key="a key", http_client=http) as client:
            yield client
        server.stop()
        await ended


async def begun(client: AsyncOpenAI, model: str) -> AsyncIterator[str]:
    """A stream whose first piece has come; it says as much as it may."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is ice?"}],
        temperature=0,
        max_tokens=NEW,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return (chunk.choices[0].delta.content or "" async for chunk in stream)


async def text_of(stream: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in stream])


def test_two_adapters_are_in_one_forward_pass(
    examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = list[list[str]]()
    forward = TransformersDecoder._forward

    def traced(self: TransformersDecoder, parts: Sequence[Part]) -> torch.Tensor:
        passes.append([Path(str(part.handle.id)).name if part.handle else "" for part in parts])
        return forward(self, parts)

    monkeypatch.setattr(TransformersDecoder, "_forward", traced)

    async def main() -> Any:
        async with served(examples) as client:
            alone = [await text_of(await begun(client, name)) for name in NAMES]
            assert all(len(rows) == 1 for rows in passes)
            assert len(passes) >= 2 * NEW
            passes.clear()
            streams = await asyncio.gather(*(begun(client, name) for name in NAMES))
            assert await asyncio.gather(*map(text_of, streams)) == alone
            return alone

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pirate, shout = runner.run(main())
    assert ["pirate", "shout"] in map(sorted, passes)
    assert len(passes) < 2 * NEW, "one after the other it would be as many"
    assert pirate.startswith("Arr")
    assert shout.isupper()
