"""Cancelling a coroutine at each of its suspensions in turn."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


@types.coroutine
def cancelled_at(
    main: Coroutine[Any, Any, T], at: int, late: float
) -> Generator[Any, Any, T | None]:
    """Cancel the running task at the `at`-th suspension of `main`; None if it was not reached.

    With `late` seconds between, what is awaited has meanwhile come to its end.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def cancel() -> None:
        time.sleep(late)
        task.cancel()

    step: Callable[[Any], Any] = main.send
    given: Any = None
    for suspension in range(1000):
        try:
            awaited = step(given)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if suspension == at:
            loop.call_soon(cancel)
        try:
            step, given = main.send, (yield awaited)
        except BaseException as thrown:
            step, given = main.throw, thrown
    raise AssertionError("it goes on and on")


async def was_cancelled(main: Coroutine[Any, Any, Any], at: int, late: float) -> bool:
    """Was that suspension reached? What `main` gave otherwise is closed."""

    async def steps() -> Any:
        return await cancelled_at(main, at, late)

    task = asyncio.ensure_future(steps())
    await asyncio.wait([task])
    if not task.cancelled():
        opened = getattr(task.result(), "reader", task.result())
        if hasattr(opened, "close"):
            opened.close()
    return task.cancelled()
