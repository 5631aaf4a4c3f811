"""What all tests share: both event loops, and a look at what a test leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine to its end, on asyncio's loop and on uvloop's."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner.run


def open_files() -> set[str]:
    """What the process's descriptors point to, without the loop's own plumbing."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("/") and not target.startswith("/dev") and int(fd) > 2:
            found.add(f"{fd} {target}")
    return found


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lorax")}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if it leaves a file open or a thread of ours running."""
    gc.collect()
    files = open_files()
    yield
    gc.collect()
    assert open_files() <= files
    assert not our_threads()


async def until(condition: Callable[[], object]) -> None:
    """Wait, for seconds at most, until something that is on its way has happened."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")
