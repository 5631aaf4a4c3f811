"""What a fetch does when its files' threads and those that hash come in each other's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from lorax_async.core.runs import Span
from lorax_async.core.split_file import Place, SplitArrivals, SplitPlan
from lorax_async.errors import FetchError
from lorax_async.io.ports import Demand
from lorax_async.io.remote import fetch as fetch_module
from lorax_async.io.remote.fetch import Fetch
from lorax_async.io.remote.workers import Workers
from telling import TellingLock

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


class ToldJob:
    """Ends when it is told to."""

    def __init__(self) -> None:
        self.done: Future[None] = Future()

    def cancel(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def hasten(self, urgency: int) -> None:
        """It needs no thread."""


class ToldEngine:
    """`told` are what its jobs call when a group is here, by the number of their file."""

    def __init__(self) -> None:
        self.told: list[Callable[[int], None]] = []
        self.jobs: list[ToldJob] = []

    def download(
        self, _: object, __: object, ___: object, told: Callable[[int], None], **____: object
    ) -> ToldJob:
        self.told.append(told)
        self.jobs.append(ToldJob())
        return self.jobs[-1]


class HeldFile:
    """A file of a download; hashing it takes until `go`."""

    resumed, expected = False, None

    def __init__(self) -> None:
        self.begun, self.go, self.ended = Event(), Event(), Event()

    def missing(self) -> list[tuple[int, int]]:
        return []

    def hash_along(self) -> int:
        self.begun.set()
        self.go.wait(20)
        self.ended.set()
        return 0


class ToldDownload:
    """What came of it."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.on_close: Callable[[], None] = lambda: None

    def publish(self) -> str:
        return "entry"

    def close(self) -> None:
        self.on_close()
        self.ends.append("closed")


def fetching(
    workers: Workers, files: Sequence[HeldFile], download: ToldDownload | None = None
) -> tuple[Fetch, ToldEngine]:
    """Of two files with 20 bytes each, behind a header of 8."""
    engine = ToldEngine()
    plan = SplitPlan(b"", 48, (Place(0, 8, 0), Place(8, 28, 8), Place(28, 48, 8)))
    parts = [SimpleNamespace(answer=None, nbytes=28) for _ in files]
    given: Any = (
        engine,
        workers,
        download or ToldDownload(),
        files,
        SimpleNamespace(plan=plan, parts=parts),
    )
    return Fetch(*given, resumable=True), engine


async def begun(fetch: Fetch, groups: Any, told: list[int]) -> asyncio.Task[Any]:
    bringing = asyncio.create_task(fetch.bring(groups, told.append, Demand()))
    await asyncio.sleep(0)
    return bringing


async def test_groups_of_two_files_are_told_of_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that has found the first one whole is slow to say so."""
    found, go_on = Event(), Event()

    class Slow(SplitArrivals):
        def landed(self, number: int, n: int) -> list[int]:
            groups = super().landed(number, n)
            if number == 1:
                found.set()
                go_on.wait(20)
            return groups

    monkeypatch.setattr(fetch_module, "Lock", partial(TellingLock, go_on))
    monkeypatch.setattr(fetch_module, "SplitArrivals", Slow)
    workers, told = Workers(2), list[int]()
    files = [HeldFile(), HeldFile()]
    fetch, engine = fetching(workers, files)
    bringing = await begun(fetch, [[Span(8, 28)], [Span(28, 48)]], told)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(engine.told[0], 0)
        assert found.wait(20)
        second = threads.submit(engine.told[1], 0)
        second.add_done_callback(lambda _: go_on.set())
    assert first.result() is second.result() is None
    for file, job in zip(files, engine.jobs, strict=True):
        file.go.set()
        job.done.set_result(None)
    assert await bringing == "entry"
    assert told == [0, 1]
    workers.close()


async def test_one_thread_hashes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have something else to do."""
    workers, submitted = Workers(2), list[Any]()
    submit = workers.submit

    def noted(work: Any) -> Future[Any]:
        submitted.append(work)
        return submit(work)

    monkeypatch.setattr(workers, "submit", noted)
    files, told = [HeldFile(), HeldFile()], list[int]()
    fetch, engine = fetching(workers, files)
    bringing = await begun(fetch, [[Span(8, 10)], [Span(10, 20)], [Span(20, 28)]], told)
    engine.told[0](0)
    assert files[0].begun.wait(20)
    engine.told[0](1)
    assert submitted == [files[0].hash_along]
    engine.told[1](0)
    assert submitted == [files[0].hash_along, files[1].hash_along]
    for file in files:
        file.go.set()
    await asyncio.to_thread(fetch._hashing[0].result, 20)
    engine.told[0](2)
    assert submitted[2:] == [files[0].hash_along]
    for job in engine.jobs:
        job.done.set_result(None)
    await bringing
    assert told == [0, 1, 2]
    workers.close()


class Asked(Future[int]):
    """Tells when somebody waits for it."""

    def __init__(self, waited: Event) -> None:
        super().__init__()
        self._waited = waited

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._waited.set()
        return super().exception(timeout)


async def test_nothing_reads_a_download_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is being hashed, the other waits for a thread."""
    workers, files, download = Workers(2), [HeldFile(), HeldFile()], ToldDownload()
    hashing = Asked(files[0].go)

    def submit(work: Any) -> Future[Any]:
        if work == files[0].hash_along:
            assert hashing.set_running_or_notify_cancel()
            workers.threads.submit(lambda: hashing.set_result(work()))
            return hashing
        return Future() if work == files[1].hash_along else workers.threads.submit(work)

    def close() -> None:
        download.ends.append("read" if not hashing.done() else "let go")
        files[0].go.set()

    download.on_close = close
    monkeypatch.setattr(workers, "submit", submit)
    fetch, engine = fetching(workers, files, download)
    bringing = await begun(fetch, [[Span(8, 28)], [Span(28, 48)]], [])
    engine.told[0](0)
    engine.told[1](0)
    waiting = fetch._hashing[1]
    assert files[0].begun.wait(20)
    engine.jobs[1].done.set_result(None)
    engine.jobs[0].cancel(FetchError("as told"))
    with pytest.raises(FetchError, match="as told"):
        await bringing
    assert download.ends == ["let go", "closed"]
    assert waiting.cancelled()
    assert not files[1].begun.is_set()
    workers.close()
