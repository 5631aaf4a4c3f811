"""Nobody waits for where a folder is any more, or one answer is enough: nothing goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from web_folder import CONFIG, WEIGHTS, Folder, World, world

from common import until
from lorax_async.errors import AdapterNotFoundError, FetchError
from lorax_async.io.http.asking import Ask
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.remote.beginning import FIRST_BYTES

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.each_loop]

DATA = bytes(FIRST_BYTES + 10_000)
FILES = {CONFIG: b'{"r": 4}', WEIGHTS: DATA}


def stall(folder: Folder, *names: str) -> None:
    folder.instead = {name: lambda _, client: client.stall() for name in names}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """Whatever an engine is asked."""
    asked: list[Ask] = []
    ask = RangeEngine.ask

    def noted(*given: Any, **more: Any) -> Ask:
        asked.append(ask(*given, **more))
        return asked[-1]

    monkeypatch.setattr(RangeEngine, "ask", noted)
    return asked


async def given_up(jobs: list[Ask]) -> None:
    await until(lambda: all(job.done.done() for job in jobs))
    for job in jobs:
        with pytest.raises(FetchError, match="nobody waits"):
            job.done.result()


async def test_the_first_failure_ends_both(jobs: list[Ask]) -> None:
    with world({WEIGHTS: DATA}) as it:
        stall(it.folder, WEIGHTS)
        with pytest.raises(AdapterNotFoundError, match=CONFIG):
            await it.locator.locate(it.ref())
        await given_up(jobs[1:])


async def test_a_cancellation_ends_both_and_waits_for_nothing(jobs: list[Ask]) -> None:
    others = asyncio.all_tasks()

    async def cancelled(it: World) -> None:
        task = asyncio.create_task(it.locator.locate(it.ref()))
        await until(lambda: len(it.folder.asked) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() <= others
        await given_up(jobs)

    with world(FILES) as it:
        stall(it.folder, CONFIG, WEIGHTS)
        await cancelled(it)
        it.folder.instead = {}
        assert (await it.locator.locate(it.ref())).files[1].nbytes == len(DATA)
