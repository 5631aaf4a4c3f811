"""Work that blocks, awaited: the other half of every pair of a plain and an async call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event
from typing import TypeVar

T = TypeVar("T")

GoOn = Callable[[], bool]
"""Whether somebody still waits for the work; asked between steps."""


def always() -> bool:
    return True


async def in_thread(work: Callable[[GoOn], T], discard: Callable[[T], None] | None = None) -> T:
    """Run `work` in a thread of the running loop's executor, and await what it returns.

    A thread is never interrupted. When its waiter is cancelled, `work` is told that it need not go
    on, and what it returns all the same goes to `discard`.
    """
    abandoned = Event()
    outcome: Future[T] = Future()

    def body() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            result = work(lambda: not abandoned.is_set())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def settle(outcome: Future[T]) -> None:
        if discard is not None and not outcome.cancelled() and outcome.exception() is None:
            discard(outcome.result())

    asyncio.get_running_loop().run_in_executor(None, body)
    try:
        return await asyncio.wrap_future(outcome)
    except asyncio.CancelledError:
        abandoned.set()
        outcome.add_done_callback(settle)
        raise
