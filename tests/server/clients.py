"""Many clients in one process of their own, each of which asks again and again.

    python tests/server/clients.py < what.json > answers.jsonl

Tells each answer, or the error in its place, in a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from time import monotonic
from typing import Any

from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient

PROMPTS = ("What is ice?", "What do bees make?", "What color is grass?", "Where do penguins live?")


async def ask(client: AsyncOpenAI, model: str, draw: random.Random) -> dict[str, Any]:
    """One question, by either call, streaming or not."""
    prompt = draw.choice(PROMPTS)
    begun = monotonic()
    try:
        text = await said(client, model, prompt, streaming=draw.random() < 0.5)
        found: dict[str, Any] = {"text": text}
    except APIStatusError as error:
        found = {"status": error.status_code, "said": str(error)}
    return {"model": model, "prompt": prompt, "seconds": monotonic() - begun, **found}


async def said(client: AsyncOpenAI, model: str, prompt: str, *, streaming: bool) -> str:
    given: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 32,
    }
    if not streaming:
        whole = await client.chat.completions.create(**given)
        return str(whole.choices[0].message.content)
    parts = []
    async for chunk in await client.chat.completions.create(**given, stream=True):
        parts += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(parts)


async def asking(what: dict[str, Any], number: int, client: AsyncOpenAI, until: float) -> None:
    draw = random.Random(what["seed"] + number)
    models = what["models"]
    weights = [1 / (place + 1) ** what["exponent"] for place in range(len(models))]
    while monotonic() < until:
        (model,) = draw.choices(models, weights)
        sys.stdout.write(json.dumps(await ask(client, model, draw)) + "\n")


async def main() -> None:
    what = json.loads(sys.stdin.read())
    http = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(
        base_url=what["url"] + "/v1", api_key="a key", max_retries=0, http_client=http, timeout=300
    ) as client:
        until = monotonic() + what["seconds"]
        await asyncio.gather(*(asking(what, n, client, until) for n in range(what["clients"])))


if __name__ == "__main__":
    asyncio.run(main())
