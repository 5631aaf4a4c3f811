"""Many clients in one process of their own, each of which asks again and again.

    python tests/server/clients.py < what.json > answers.jsonl

Prints each answer, or the error in its place, as a line of JSON.
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


async def ask(client: AsyncOpenAI, model: str, prompt: str, *, stream: bool) -> dict[str, Any]:
    create: Any = client.chat.completions.create
    messages = [{"role": "user", "content": prompt}]
    try:
        answer = await create(
            model=model, messages=messages, temperature=0, max_tokens=32, stream=stream
        )
        if not stream:
            return {"text": answer.choices[0].message.content}
        pieces = [chunk.choices[0].delta.content or "" async for chunk in answer]
    except APIStatusError as error:
        return {"status": error.status_code, "said": str(error)}
    return {"text": "".join(pieces)}


async def asking(what: dict[str, Any], number: int, client: AsyncOpenAI, until: float) -> None:
    draw, models = random.Random(7 + number), what["models"]
    weights = [1 / (place + 1) ** 0.7 for place in range(len(models))]
    while monotonic() < until:
        (model,) = draw.choices(models, weights)
        found = await ask(client, model, draw.choice(PROMPTS), stream=draw.random() < 0.5)
        sys.stdout.write(json.dumps({"model": model} | found) + "\n")


async def main() -> None:
    what = json.loads(sys.stdin.read())
    http = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(
        base_url=what["url"], api_key="a key", max_retries=0, http_client=http, timeout=300
    ) as client:
        until = monotonic() + what["seconds"]
        await asyncio.gather(*(asking(what, n, client, until) for n in range(what["clients"])))


if __name__ == "__main__":
    asyncio.run(main())
