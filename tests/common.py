"""What several tests use: both event loops, and a look at what is open or running."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


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


def open_sockets() -> int:
    """How many sockets the process has."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lorax")}


async def until(condition: Callable[[], object]) -> None:
    """Wait, for seconds at most, until something that is on its way has happened."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")


def mapped_files() -> list[str]:
    """Maps of adapters' files; nothing of ours maps a file that it does not own."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "adapter_model" in line]
