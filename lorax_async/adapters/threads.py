"""Await blocking work in a thread: the async half of every pair of calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event
from typing import TypeVar

T = TypeVar("T")

IsWanted = Callable[[], bool]
"""Returns whether a caller still waits for the result; call it between steps."""


async def in_thread(work: Callable[[IsWanted], T], discard: Callable[[T], None] | None = None) -> T:
    """Run `work` in the running loop's executor and await its result.

    No thread is interrupted: after a cancellation `IsWanted` returns False, and the result of
    `work` goes to `discard`.
    """
    abandoned, outcome = Event(), Future[T]()

    def run() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work(lambda: not abandoned.is_set()))
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                outcome.set_exception(error)

    def discard_result(future: Future[T]) -> None:
        if discard is not None and not future.cancelled() and future.exception() is None:
            discard(future.result())

    asyncio.get_running_loop().run_in_executor(None, run)
    try:
        return await asyncio.wrap_future(outcome)
    except asyncio.CancelledError:
        abandoned.set()
        outcome.add_done_callback(discard_result)
        raise
