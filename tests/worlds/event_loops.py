"""Both kinds of event loop, and waiting on one."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


async def until(condition: Callable[[], object], seconds: int = 5) -> None:
    """Wait until the condition is true; fail after this many seconds, or some more."""
    for _ in range(1000 * seconds):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")
