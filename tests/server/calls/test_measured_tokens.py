"""Tokens and requests by hand: what is counted of each, and when."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from lorax_async.server.calls.metrics import CountedRequests, ServerMetrics
from lorax_async.server.calls.names import Names
from lorax_async.server.generation import Finish
from tiny_loaders import loader

pytestmark = pytest.mark.usefixtures("nothing_left")


class Three:
    """Three tokens, also for who has cancelled them."""

    finish: Finish | None = None

    def cancel(self) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[int]:
        for token in range(3):
            yield token


def sums(metrics: ServerMetrics) -> list[tuple[float, float]]:
    """Of the first tokens, and between tokens: how many, and seconds in all."""
    found = []
    for histogram in (metrics.first, metrics.between):
        (family,) = histogram.collect()
        values = {each.name.rpartition("_")[2]: each.value for each in family.samples}
        found.append((values["count"], values["sum"]))
    return found


async def test_between_two_tokens_is_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async with loader() as there:
        metrics = ServerMetrics(there, Names("base", {}))
        with monkeypatch.context() as patch:
            clock = [100.0]
            patch.setattr(time, "monotonic", lambda: clock[0])
            tokens = metrics.measured(Three(), "base", 5)
            for seconds in (0.5, 0.25, 0.125):
                clock[0] += seconds
                await anext(tokens)
            assert sums(metrics) == [(1, 0.5), (2, 0.375)]
        tokens.cancel()
        metrics.close()


async def test_who_was_cancelled_runs_no_more() -> None:
    """A token may be on its way then."""
    async with loader() as there:
        metrics = ServerMetrics(there, Names("base", {}))
        tokens = metrics.measured(Three(), "base", 5)
        assert metrics.sequences.waiting.total() == 1
        tokens.cancel()
        await anext(tokens)
        assert not metrics.sequences.waiting
        assert not metrics.sequences.running
        metrics.close()


async def test_a_status_that_was_sent_is_the_one_that_counts() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("in the middle of the answer")

    async def nothing(*_: object) -> Any:
        return None

    async def send(_: Message) -> None:
        return None

    async with loader() as there:
        metrics = ServerMetrics(there, Names("base", {}))
        with pytest.raises(RuntimeError, match="middle"):
            await CountedRequests(failing, metrics)(
                {"type": "http", "path": "/health"}, nothing, send
            )
        (family,) = metrics.requests.collect()
        counted = [each.labels for each in family.samples if each.name.endswith("_total")]
        assert counted == [{"call": "/health", "status": "200"}]
        metrics.close()
