"""Sends each request when it is due, whatever became of those before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lorax_async.commands.benching.streaming_client import Answer, Client, cancelled
from lorax_async.core.request_schedule import Arrival
from lorax_async.errors import ConfigError

if TYPE_CHECKING:
    from aiohttp import ClientSession

NOT_SENT = "not sent"

Ended = Callable[[Answer], None]
Body = Callable[[Arrival], dict[str, Any]]


@dataclass(slots=True)
class Played:
    """All answers, in the order of the arrivals, and the most that were under way at once."""

    answers: list[Answer] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the last answer."""
        return max((each.ended for each in self.answers if each.ended is not None), default=0.0)


async def play(
    client: Client,
    arrivals: Sequence[Arrival],
    body: Body,
    *,
    most_at_once: int,
    ended: Ended = lambda _: None,
    clock: Callable[[], float] = perf_counter,
) -> Played:
    """Send every request at its time, and wait for the last answer.

    An arrival that finds `most_at_once` under way does not wait for them: it is not sent, which is
    its error. `ended` is told of each answer when it is complete.
    """
    played = Played([Answer(arrival) for arrival in arrivals])
    under_way: set[asyncio.Task[None]] = set()
    unanswered: dict[str, list[Answer]] = {}
    start = clock()

    def through(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            under_way.discard(task)  # one that failed is told of at the end

    async def one(answer: Answer) -> None:
        await client.ask(answer, body(answer.arrival), start)
        ended(answer)

    try:
        for answer in played.answers:
            # Also when it is late, so that answers are taken in between: 0 lets the others run.
            await asyncio.sleep(max(0.0, answer.arrival.due - (clock() - start)))
            # uvloop counts in whole milliseconds, and may wake too early by one.
            while clock() - start < answer.arrival.due:  # noqa: ASYNC110 - it is no event
                await asyncio.sleep(0)
            answer.cold = _is_cold(answer, unanswered)
            if len(under_way) >= most_at_once:
                answer.error, answer.ended = NOT_SENT, clock() - start
                ended(answer)
                continue
            task = asyncio.create_task(one(answer), name=f"ask {answer.arrival.model}")
            under_way.add(task)
            task.add_done_callback(through)
            played.most_at_once = max(played.most_at_once, len(under_way))
        await asyncio.gather(*under_way)
    finally:
        await cancelled(set(under_way))
    return played


def _is_cold(answer: Answer, unanswered: dict[str, list[Answer]]) -> bool:
    """Whether its model has answered nobody yet; `unanswered` are by model those who asked."""
    before = unanswered.setdefault(answer.arrival.model, [])
    if any(each.has_come for each in before):
        return False
    before.append(answer)
    return True


@asynccontextmanager
async def session(seconds: float, key: str | None) -> AsyncIterator[ClientSession]:
    """As many connections as it takes. Raises `ConfigError` where aiohttp is missing."""
    try:
        import aiohttp  # noqa: PLC0415 - heavy, and only here
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lorax-async[measure]'") from error
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("the key for the server has signs that no header can hold")
    timeout = aiohttp.ClientTimeout(total=seconds)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, trust_env=False
    ) as opened:
        yield opened
