"""An open-loop load generator for servers with OpenAI's chat completions.

    python benchmarks/bench_serve.py http://127.0.0.1:8000 --models pirate shout --rate 4

Requests are sent by a Poisson process and never wait for answers. Times to the first token count
from when a request was due, so that a late generator is no excuse. A request is cold if no answer
from its model had begun when it was sent. A key for the server is taken from OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from random import Random
from time import perf_counter
from typing import Any

import aiohttp

from harness import print_table, run_on

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
LATE_MS = 10
"""If the 99th percentile of requests is sent later than this, the generator needs a faster core."""


class StreamError(Exception):
    """The answer is not a complete stream of chunks."""


@dataclass(slots=True)
class Answer:
    """One request and what came of it. Times are seconds since the run began.

    `chunks` are the times of events with text, `tokens` is the server's count of them.
    """

    model: str
    due: float
    cold: bool = False
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int | None = None
    error: str | None = None

    @property
    def token_count(self) -> int:
        return len(self.chunks) if self.tokens is None else self.tokens

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def per_token(self) -> list[float]:
        """The mean time from one token to the next; a chunk may hold several."""
        if len(self.chunks) < 2 or self.token_count < 2:
            return []
        return [(self.chunks[-1] - self.chunks[0]) / (self.token_count - 1)]


def schedule(
    random: Random, models: Sequence[str], *, rate: float, seconds: float, zipf: float
) -> list[Answer]:
    """Poisson arrivals; the n-th model is requested in proportion to 1 / n ** zipf."""
    weights = [n**-zipf for n in range(1, len(models) + 1)]
    arrivals = list[Answer]()
    due = random.expovariate(rate)
    while due < seconds:
        arrivals.append(Answer(random.choices(models, weights)[0], due))
        due += random.expovariate(rate)
    return arrivals


class Client:
    """Sends chat completions to one server and records when their chunks arrive."""

    def __init__(self, session: aiohttp.ClientSession, given: argparse.Namespace) -> None:
        self._session = session
        self._url = given.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._given = given
        self._random = Random(given.seed)
        self._start = perf_counter()
        self._answered = set[str]()

    async def play(self, arrivals: Sequence[Answer]) -> None:
        """Send every request when it is due; return after the last answer."""
        async with asyncio.TaskGroup() as group:
            for answer in arrivals:
                await asyncio.sleep(max(0.0, answer.due - self._now()))
                # uvloop's timers count whole milliseconds and may fire early.
                while self._now() < answer.due:  # noqa: ASYNC110 - there is no event to await
                    await asyncio.sleep(0)
                answer.cold = answer.model not in self._answered
                group.create_task(self._ask(answer))

    def _now(self) -> float:
        return perf_counter() - self._start

    async def _ask(self, answer: Answer) -> None:
        answer.sent = self._now()
        try:
            body = self._body(answer.model)
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                if response.status != 200:
                    raise StreamError(str(response.status))
                await self._read(response, answer)
            self._answered.add(answer.model)
        except StreamError as error:
            answer.error = str(error)
        except (AttributeError, LookupError, TypeError, ValueError):
            answer.error = "malformed chunk"
        except TimeoutError:
            answer.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            answer.error = type(error).__name__
        answer.ended = self._now()

    def _body(self, model: str) -> dict[str, Any]:
        """Prompts differ, so that no server finds their prefix in a cache."""
        prompt = " ".join(self._random.choices(WORDS, k=self._given.prompt_tokens))
        return {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._given.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({"ignore_eos": True} if self._given.ignore_eos else {})

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        async for line in response.content:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip():  # a blank line, a comment, another field
                continue
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if event.get("error"):
                raise StreamError("error in the stream")
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                answer.chunks.append(self._now())
                self._answered.add(answer.model)
            answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
        raise StreamError("hang-up")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Percentiles by nearest rank, in milliseconds."""
    ordered = sorted(value * 1e3 for value in values)
    return {f"p{p}": ordered[ceil(len(ordered) * p / 100) - 1] for p in (50, 90, 99) if ordered}


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """All numbers of a run, of all requests and of the warm and the cold ones."""
    seconds = max((each.ended for each in answers), default=0.0)
    groups = {
        "all": answers,
        "warm": [each for each in answers if not each.cold],
        "cold": [each for each in answers if each.cold],
    }
    return {
        "seconds": seconds,
        "late_ms": spread(each.sent - each.due for each in answers),
        **{name: _summary(group, seconds) for name, group in groups.items()},
    }


def _summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Times are those of complete answers; throughput counts every token that arrived."""
    complete = [each for each in answers if each.error is None]
    tokens = sum(each.token_count for each in answers)
    return {
        "requests": len(answers),
        "complete": len(complete),
        "errors": dict(Counter(each.error for each in answers if each.error is not None)),
        "ttft_ms": spread(each.chunks[0] - each.due for each in complete if each.chunks),
        "between_chunks_ms": spread(gap for each in complete for gap in each.gaps),
        "per_token_ms": spread(time for each in complete for time in each.per_token),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def show(found: dict[str, Any]) -> None:
    times = ("ttft_ms", "between_chunks_ms", "per_token_ms")
    heads = [
        f"{name.removesuffix('_ms').replace('_', ' ')} {p}" for name in times for p in (50, 99)
    ]
    rows = []
    for name in ("all", "warm", "cold"):
        of = found[name]
        cells = [f"{of[time][p]:.1f}" if of[time] else "" for time in times for p in ("p50", "p99")]
        errors = ", ".join(f"{count} × {error}" for error, count in of["errors"].items())
        counts = [f"{of['requests']:,}", f"{of['complete']:,}"]
        rows.append([name, *counts, *cells, f"{of['tokens_per_second']:.1f}", errors])
    title = f"{found['seconds']:.1f} s, times in ms"
    print_table(title, ["", "requests", "complete", *heads, "tokens/s", "errors"], rows)
    late = found["late_ms"].get("p99", 0.0)
    if late > LATE_MS:
        print(f"requests were sent {late:.1f} ms late (p99): give the generator a core of its own")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench_serve", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("url", help="the server's, for instance http://127.0.0.1:8000")
    add("--models", nargs="+", required=True, help="names to request, the most popular first")
    add("--rate", type=float, default=1.0, help="requests per second (default: %(default)s)")
    add("--seconds", type=float, default=30.0, help="how long to send (default: %(default)s)")
    add("--zipf", type=float, default=1.0, help="exponent of popularity (default: %(default)s)")
    add("--prompt-tokens", type=int, default=64, help="about: short words (default: %(default)s)")
    add("--new-tokens", type=int, default=32, help="limit of an answer (default: %(default)s)")
    add("--ignore-eos", action="store_true", help="generate all of them (not in OpenAI's API)")
    add("--timeout", type=float, default=300.0, help="of an answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args(argv)
    for name in ("rate", "seconds", "timeout", "prompt_tokens", "new_tokens"):
        if not 0 < getattr(given, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if any request was not answered to its end."""
    given = arguments(argv)
    arrivals = schedule(
        Random(given.seed), given.models, rate=given.rate, seconds=given.seconds, zipf=given.zipf
    )
    key = os.environ.get("OPENAI_API_KEY")

    async def play() -> None:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=given.timeout),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        ) as session:
            await Client(session, given).play(arrivals)

    run_on("uvloop", play)
    found = summary(arrivals)
    if given.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if found["all"]["complete"] == found["all"]["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
