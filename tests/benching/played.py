"""Requests over loopback to a server that answers by script."""

from __future__ import annotations

from typing import Any

from benching.stand_in import Script, standing_in
from common import Run
from lorax_async.commands.benching.open_loop import Played, play, session
from lorax_async.commands.benching.streaming_client import Answer, Client
from lorax_async.core.request_schedule import Arrival


def body(arrival: Arrival) -> dict[str, Any]:
    return {"model": arrival.model}


def arrivals(count: int, due: float = 0.0) -> list[Arrival]:
    return [Arrival(due, f"m{n}") for n in range(count)]


async def played(script: Script, count: int = 1, seconds: float = 20, **options: Any) -> Played:
    async with standing_in(script) as there, session(seconds, None) as opened:
        client = Client(opened, there.url, "chat")
        settings = {"most_at_once": 100} | options
        return await play(client, arrivals(count), body, **settings)


def one(run: Run, script: Script, **options: Any) -> Answer:
    (answer,) = run(played(script, **options)).answers
    assert isinstance(answer, Answer)
    return answer
