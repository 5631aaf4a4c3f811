"""A remote source behind its port: what it checks, what waits for what, and what has ended when that is told."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread
from types import SimpleNamespace
from typing import Any

import pytest
import remote_world
from disk_cache_world import begun
from event_loops import until
from fault_server import Asked, Client, answer
from remote_world import RemoteWorld, fetch_file, opened
from source_conformance import PopulateConformance, SourceConformance, held, mapped
from source_inputs import CONFIG, weights
from tiny_loaders import fails

from lorax_async.cache.base import CacheKey
from lorax_async.cache.disk_cache import ls
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.errors import AdapterFormatError, EvictedError, FetchError, IntegrityError
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.formats.spans import ByteSpan
from lorax_async.remote import opening
from lorax_async.remote.base import FIRST_BYTES, Confirmation, track
from lorax_async.remote.readers import EntryReader, FetchReader, ReopenedReader, entry_gone
from lorax_async.types import AdapterRef, RemoteKey

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.each_loop]
settings, world = remote_world.settings, remote_world.world


class TestConformance(SourceConformance):
    pass


class TestCached(PopulateConformance):
    @pytest.fixture
    def settings(self) -> dict[str, Any]:
        return {"cached": True}

    @pytest.mark.parametrize("part", ["config", "weights"])
    async def test_another_version_is_not_held(self, world: Any, part: str) -> None:
        """What is held is what was resolved, for the cache has its own copy."""
        key = await world.source.resolve(world.put("one", CONFIG, weights(1)))
        config = CONFIG.replace(b"8", b"9") if part == "config" else CONFIG
        world.put("one", config, weights(2 if part == "weights" else 1, {"note": "longer"}))
        with mapped(await held(world.source, key, holdable=True)) as pages:
            assert pages is not None
            assert pages.nbytes == len(weights(1))


@pytest.mark.parametrize("late", [0.0, 0.003])
async def test_opening_an_entry_is_cancelled_at_any_await(world: RemoteWorld, late: float) -> None:
    world.put("one", CONFIG, weights(1))
    (await fetch_file(world)).reader.close()
    await SourceConformance().test_cancelled_at_any_await(world, "open", late)
    assert not any(in_use(world))


async def test_known_callers_while_the_source_is_down(world: RemoteWorld) -> None:
    world.stock()
    first, second, stranger = (replace(world.ref("one"), token=token) for token in "abc")
    version = world.locator.there["one"].version
    for ref in (first, second):
        await fetch_into_cache(world, ref)
    world.locator.error = FetchError("it is down")
    for ref in (first, second):
        await world.source.resolve(replace(ref, revision=version))
    await fails(world.source.resolve(replace(stranger, revision=version)), FetchError, "it is down")


async def test_a_stale_answer_is_for_callers_without_a_token_or_public(world: RemoteWorld) -> None:
    """An answer to a caller with a token does not replace the one to callers without."""
    for name in ("public", "private"):
        world.stock(name)
    world.locator.there["private"].token = "mine"
    public, private = world.ref("public"), replace(world.ref("private"), token="mine")
    old = world.locator.there["public"].version
    for ref in (public, private):
        await fetch_into_cache(world, ref)
    world.stock("public", seed=7)
    await fetch_into_cache(world, replace(public, token="mine"))
    world.locator.error = FetchError("it is down")
    for token in (None, "mine", "other"):
        key = await world.source.resolve(replace(public, token=token, allow_stale=True))
        assert isinstance(key, RemoteKey)
        assert (key.version, key.stale) == (old, True)
    await fails(world.source.resolve(replace(private, allow_stale=True)), FetchError, "it is down")
    pinned = replace(private, revision=world.locator.there["private"].version)
    key = await world.source.resolve(pinned)
    assert isinstance(key, RemoteKey)
    assert not key.stale


async def fetch_into_cache(world: RemoteWorld, ref: AdapterRef) -> None:
    """Fetch the adapter that `ref` names into the cache."""
    file = await world.source.open(await world.source.resolve(ref), FetchControl())
    await world.source.fetch_groups(file, [], lambda _: None, FetchControl())
    file.reader.close()


async def test_another_version_is_not_stored_under_the_name_of_the_one(world: RemoteWorld) -> None:
    """It is located anew when the places that the source told have expired."""
    key = await world.source.resolve(world.put("one", CONFIG, weights(1)))
    world.later = 3600.0
    world.put("one", CONFIG, weights(2))
    await fails(world.source.open(key, FetchControl()), IntegrityError, "another version by now")


def in_use(world: RemoteWorld) -> list[bool]:
    return [listed.in_use for listed in ls(world.cache)]


async def test_jobs_end_with_whoever_follows_them() -> None:
    """Their threads leave some turns of the loop after they were cancelled."""
    jobs, soon = [held_job(), held_job()], asyncio.get_running_loop().call_soon
    for job in jobs:
        job.cancel = lambda error, end=job.done.set_exception: soon(soon, end, error)
    with pytest.raises(ZeroDivisionError):
        async with track(FetchControl(urgent=False), *jobs):
            raise ZeroDivisionError
    assert all(job.done.done() for job in jobs)


async def test_an_entry_stays_for_as_long_as_it_is_read(world: RemoteWorld) -> None:
    world.stock()
    file = await fetch_file(world)
    assert in_use(world) == [True]
    file.reader.close()
    assert in_use(world) == [False]


async def test_groups_are_reported_on_the_loop(world: RemoteWorld) -> None:
    world.stock()
    file, told = await opened(world), list[tuple[int, Thread]]()
    half, nbytes = file.reader.nbytes // 2, file.reader.nbytes

    def note(group: int) -> None:
        told.append((group, current_thread()))

    groups = [[ByteSpan(0, half)], [ByteSpan(half, nbytes)]]
    await world.source.fetch_groups(file, groups, note, FetchControl())
    assert told == [(0, current_thread()), (1, current_thread())]
    file.reader.close()


async def test_a_reader_closed_meanwhile_keeps_nothing(world: RemoteWorld) -> None:
    world.stock()
    file = await opened(world)
    bringing = asyncio.create_task(
        world.source.fetch_groups(file, [], lambda _: None, FetchControl())
    )
    await asyncio.sleep(0)
    file.reader.close()
    await bringing
    assert in_use(world) == [False]


async def test_a_release_is_done_though_it_was_cancelled_before_it_began() -> None:
    workers, busy, done = WorkerThreads(1), Event(), Event()
    workers.submit(busy.wait)
    letting_go = asyncio.create_task(workers.finish(done.set))
    for _ in range(3):
        await asyncio.sleep(0)
        letting_go.cancel()
    await asyncio.sleep(0)
    assert not letting_go.done()
    busy.set()
    await asyncio.wait([letting_go])
    assert done.is_set()
    workers.shutdown()


async def test_a_cancelled_caller_waits_for_its_thread_and_undoes_the_result() -> None:
    workers, begun, go = WorkerThreads(1), Event(), Event()
    undone: list[bool] = []

    def work() -> bool:
        begun.set()
        return go.wait(10)

    running = asyncio.create_task(workers.run(work, undone.append))
    await until(begun.is_set)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
    early = running.done()
    go.set()
    await asyncio.wait([running])
    assert running.cancelled()
    assert not early
    assert undone == [True]
    workers.shutdown()


def held_job() -> Any:
    """Ends when it is told to, by `done` or by `cancel`."""
    done = Future[None]()

    def cancel(error: Exception) -> None:
        if not done.done():
            done.set_exception(error)

    return SimpleNamespace(done=done, cancel=cancel, raise_priority=lambda urgency: None)


class HeldFile:
    """A file of a download; hashing it takes until `go`."""

    nbytes, resumed, expected = 28, False, None

    def __init__(self) -> None:
        self.begun, self.go = Event(), Event()

    def missing(self) -> list[tuple[int, int]]:
        return []

    def reader(self) -> Any:
        """It is not read."""
        return SimpleNamespace(nbytes=self.nbytes, close=lambda: None)

    def write(self, offset: int, data: memoryview) -> None:
        """Nothing is kept."""

    def hash_along(self) -> int:
        self.begun.set()
        self.go.wait(20)
        return 0


async def bringing_begun(
    workers: WorkerThreads, file: HeldFile, close: Any = lambda: None
) -> tuple[asyncio.Task[Any], Callable[[int], None], Any]:
    """Bring one group; return what the download calls when it is here, and the download."""
    begun: list[Any] = []

    def download(_: object, __: object, ___: object, call: Any, **____: object) -> Any:
        begun.extend((call, held_job()))
        return begun[-1]

    rest = Future[memoryview]()
    rest.set_result(memoryview(b""))
    fetched = SimpleNamespace(answer=SimpleNamespace(start=b"", rest=rest), nbytes=28)
    given: Any = (
        *(RemoteKey("one", ()), SimpleNamespace(download=download), workers),
        *(SimpleNamespace(publish=lambda: "entry", close=close), file, fetched),
    )
    how: Any = {"resumable": True, "layers_first": False}
    fetch = FetchReader(*given, **how, confirmation=Confirmation(None, list))
    groups = [[ByteSpan(8, 28)]]
    bringing = asyncio.create_task(fetch.fetch_groups(groups, lambda _: None, FetchControl()))
    await until(lambda: len(begun) == 2)
    return bringing, *begun


class AskedFuture(Future[int]):
    """Tells when somebody waits for it."""

    def __init__(self, waited: Event) -> None:
        super().__init__()
        self._waited = waited

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._waited.set()
        return super().exception(timeout)


@pytest.mark.parametrize("running", [True, False], ids=["hashed", "to be hashed"])
async def test_nothing_reads_a_download_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    """Neither the thread that hashes it, nor one for which that waits."""
    workers, file, ends = WorkerThreads(2), HeldFile(), list[str]()
    hashing, plain = AskedFuture(file.go), workers.submit
    if running:
        assert hashing.set_running_or_notify_cancel()

    def submit(work: Any) -> Future[Any]:
        if work != file.hash_along:
            return plain(work)
        if running:
            plain(lambda: hashing.set_result(work()))
        return hashing

    def close() -> None:
        ends.append("let go" if hashing.done() else "read")
        file.go.set()

    monkeypatch.setattr(workers, "submit", submit)
    bringing, call, job = await bringing_begun(workers, file, close)
    call(0)
    assert not running or file.begun.wait(20)
    job.cancel(FetchError("as told"))
    await fails(bringing, FetchError, "as told")
    assert ends == ["let go"]
    assert (hashing.cancelled(), file.begun.is_set()) == (not running, running)
    workers.shutdown()


async def test_what_changes_between_two_answers_is_noticed(world: RemoteWorld) -> None:
    """Of a header that does not come with the first bytes."""
    world.locator.promises = False
    world.put("one", CONFIG, weights(1, {"note": "long" * FIRST_BYTES}))

    def changing(asked: Asked, client: Client) -> None:
        data, etag = world.content(asked.target)
        again = asked.span and asked.span[1] != FIRST_BYTES and '"another"'
        answer(asked, client, data, f"ETag: {again or etag}")

    world.server.behave = changing
    await fails(opened(world), IntegrityError, "changed while it was read")


@pytest.mark.parametrize("what", ["the same", "room"])
async def test_waiting_ends_with_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """For who downloads the same, and for who has the room that it needs."""
    monkeypatch.setattr(opening, "PATIENCE_SECONDS", 60)
    with RemoteWorld(tmp_path, cache_bytes=1_000_000) as world:
        world.stock()
        key = await world.source.resolve(world.ref("one"))
        assert isinstance(key, RemoteKey)
        other = CacheKey(key.location, key.version if what == "the same" else "another")
        download, control = begun(world.cache, other), FetchControl()
        download.file(WEIGHTS_FILE, 900_000)
        waiting = asyncio.create_task(world.source.open(key, control))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        control.cancel()
        await fails(waiting, FetchError, "no caller waits")
        download.discard()


@pytest.mark.parametrize("refused", [False, True], ids=["to open it", "to compare an entry"])
async def test_a_question_to_the_source_ends_with_the_demand(
    world: RemoteWorld, refused: bool
) -> None:
    """Also where the source does not answer: no caller waits for it any more."""
    world.stock()
    world.locator.promises = False  # so it is asked, and nothing is hashed
    key, control = await world.source.resolve(world.ref("one")), FetchControl()
    if refused:
        (await fetch_file(world)).reader.close()
        file = await opened(world, control=control)
    world.later = 10_000.0  # the answer is too old: signed URLs expire
    world.locator.silent = True
    error = AdapterFormatError("it does not fit")
    asking: Coroutine[Any, Any, Any] = (
        file.refused(error) if refused else world.source.open(key, control)
    )
    waiting = asyncio.create_task(asking)
    await until(lambda: world.locator.unanswered)
    assert not waiting.done()
    control.cancel()
    await asyncio.wait([waiting], timeout=5)
    if refused:
        assert not waiting.result()
    else:
        assert "no caller waits" in str(waiting.exception())
    assert not world.locator.unanswered
    assert not any(in_use(world))


async def test_an_answer_that_cannot_be_noted(
    world: RemoteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: object) -> None:
        raise FetchError("this cache can only be read")

    world.stock()
    monkeypatch.setattr(world.cache, "note_version", fail)
    (await fetch_file(world)).reader.close()


def test_what_was_gone_once_stays_gone() -> None:
    opened = 0

    def open() -> EntryReader:
        nonlocal opened
        opened += 1
        raise entry_gone()

    reader = ReopenedReader(open)
    for _ in range(2):
        with pytest.raises(EvictedError):
            reader.read_into([memoryview(bytearray(1))], 0)
    assert opened == 1
    reader.close()


def test_closing_a_reader_waits_for_no_thread_that_opens_it() -> None:
    """It is done on the loop, and the disk may be slow."""
    begun, slow, closed = Event(), Event(), []

    class Opened:
        nbytes = 1

        def close(self) -> None:
            closed.append(self)

    def open() -> EntryReader:
        begun.set()
        slow.wait(20)
        return Opened()  # type: ignore[return-value]

    reader, workers = ReopenedReader(open), WorkerThreads(2)
    reading = workers.submit(lambda: reader.nbytes)
    assert begun.wait(20)
    closing = workers.submit(reader.close)
    assert closing.result(10) is None
    slow.set()
    assert reading.result(20) == 1
    assert len(closed) == 1
    workers.shutdown()
