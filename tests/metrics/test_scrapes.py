"""Scrapes of another thread: how the loop is asked, and what comes of a loop that ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_async.metrics import LoaderCollector
from metrics.scraping import Samples, registered, scraped
from tiny_loaders import loader
from tiny_sources import over, stocked


async def test_a_scrape_wakes_a_loop_that_sleeps(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_debug(True)  # it raises for calls of other threads
    async with over(stocked(tmp_path, "a")) as there:
        with LoaderCollector(there, timeout=600) as collector:
            (await there.load("a")).release()
            samples = await asyncio.to_thread(scraped, registered(collector))
            assert samples["lorax_loads_total"] == 1


class Held:
    """A loop that was asked, and has not come to it."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.question: Callable[[], None] = lambda: None

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, callback: Callable[..., None], *given: object) -> None:
        self.question = lambda: callback(*given)
        self.asked.set()


async def test_a_scrape_tells_the_numbers_of_when_the_loop_answers(tmp_path: Path) -> None:
    found = list[Samples]()
    async with over(stocked(tmp_path, "a")) as there:
        with LoaderCollector(there, timeout=600) as collector:
            registry, held = registered(collector), Held()
            loop: Any = held
            collector._loop = loop
            thread = threading.Thread(target=lambda: found.append(scraped(registry)))
            thread.start()
            assert await asyncio.to_thread(held.asked.wait, 20)
            (await there.load("a")).release()
            held.question()
            await asyncio.to_thread(thread.join, 20)
    assert found[0]["lorax_loads_total"] == 1


class ClosedNow:
    """A loop that is closed after it was asked whether it is."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, *given: object) -> None:
        raise RuntimeError("Event loop is closed")


async def test_of_a_loop_that_closes_meanwhile_the_last_numbers_are_told() -> None:
    async with loader() as there:
        with LoaderCollector(there) as collector:
            registry, closed = registered(collector), ClosedNow()
            loop: Any = closed
            collector._loop = loop
            assert scraped(registry)["lorax_loads_total"] == 0
