"""One answer and its reader: whoever waits is woken, once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorax_async import InternalError, LoaderClosedError
from lorax_async.server.decoding.answer import Answer
from lorax_async.server.decoding.sampling import Sampler
from server.generating import GREEDY, all_of, asked


class FakeTicket:
    def __init__(self) -> None:
        self.cancels = 0

    def cancel(self) -> None:
        self.cancels += 1


def answer(new: int = 9) -> tuple[Answer, FakeTicket]:
    ticket: Any = FakeTicket()
    return Answer(1, asked([1], new), Sampler(GREEDY), ticket), ticket


async def waiting(found: Answer) -> asyncio.Task[int]:
    task = asyncio.ensure_future(anext(found))
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_who_waits_is_woken_by_a_token() -> None:
    found, _ = answer()
    task = await waiting(found)
    found.add(5)
    async with asyncio.timeout(20):
        assert await task == 5


@pytest.mark.parametrize("error", [None, LoaderClosedError("closed")])
async def test_who_waits_is_woken_by_the_end(error: LoaderClosedError | None) -> None:
    found, _ = answer()
    task = await waiting(found)
    found.end(error)
    async with asyncio.timeout(20):
        with pytest.raises(StopAsyncIteration if error is None else LoaderClosedError):
            await task


async def test_who_waits_is_woken_by_cancelling_it() -> None:
    found, ticket = answer()
    task = await waiting(found)
    found.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(StopAsyncIteration):
            await task
    assert ticket.cancels == 1


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    """Its token comes in the very turn, and is the next one's."""
    found, _ = answer(2)
    task = await waiting(found)
    task.cancel()
    await asyncio.wait([task])
    found.add(5)
    assert await anext(found) == 5
    task = await waiting(found)
    task.cancel()
    found.add(6)
    await asyncio.wait([task])
    found.end()
    assert await all_of(found) == [6]


async def test_its_tokens_come_before_its_error_and_its_first_end_counts() -> None:
    found, _ = answer()
    found.add(5)
    found.end(LoaderClosedError("closed"))
    found.end(InternalError("another"))
    found.end()
    assert await anext(found) == 5
    with pytest.raises(LoaderClosedError):
        await anext(found)
