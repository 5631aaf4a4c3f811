"""Fetching, holding and letting go: what is over before it is told, and one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from common import until
from lorax_async.adapter import AdapterKey
from lorax_async.errors import FetchError
from lorax_async.io.ports import AdapterFile, Hold
from lorax_async.runtime.files import Files
from lorax_async.runtime.journal import Journal
from lorax_async.verification import Verification

pytestmark = pytest.mark.each_loop

KNOWN = Verification("sha256", "a" * 64)
KEYS = [AdapterKey(f"place {n}", ()) for n in range(3)]


class Bytes:
    """A reader, or a hold, that may be slow to close."""

    nbytes, locked, closed = 64, False, False

    def __init__(self, before_close: Callable[[], object] = lambda: None) -> None:
        self._before_close = before_close

    def close(self) -> None:
        self._before_close()
        self.closed = True


class Origin:
    """A source whose steps take a few turns of the loop, also where they are cancelled."""

    def __init__(self) -> None:
        self.inside = self.undone = 0
        self.arrives = False
        self.bringing = asyncio.Event()
        self.may_bring = asyncio.Event()
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.holds: list[Bytes] = []

    async def open(self, key: AdapterKey, demand: object) -> AdapterFile:
        await self.may_open.wait()
        return AdapterFile(b"", b"", Bytes())  # type: ignore[arg-type]

    async def bring(
        self, file: object, groups: object, arrived: Callable[[int], None], demand: Any
    ) -> Verification:
        if self.arrives:
            arrived(0)
        self.bringing.set()
        try:
            while not self.may_bring.is_set():
                if demand.ended:
                    raise FetchError("nobody waits")
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            self.undone += 1
            raise
        return KNOWN

    async def populate(self, key: AdapterKey) -> Hold:
        self.inside += 1
        await asyncio.sleep(0.002)
        self.inside -= 1
        self.holds.append(Bytes())
        return self.holds[-1]


class Told:
    """The outcomes; `look` is called with each, at the moment it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.look: Callable[[str, AdapterKey], None] = lambda name, key: None

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(key: AdapterKey, attempt: int, *details: object, **more: object) -> None:
            self.names.append(name)
            self.look(name, key)

        return tell


class Place:
    """Files of that source; `turns` are the loop's turns in which something was planned."""

    def __init__(self, threads: ThreadPoolExecutor, *, before_use: bool = False) -> None:
        self.source, self.told = Origin(), Told()
        self.turns: list[int] = []
        self._turn = 0
        planner = SimpleNamespace(is_long=lambda file: False, plan=self._plan)
        self.files = Files(
            self.source,  # type: ignore[arg-type]
            planner,  # type: ignore[arg-type]
            threads,
            self.told,
            Journal(),
            before_use=before_use,
        )
        self._tick()

    def _tick(self) -> None:
        self._turn += 1
        asyncio.get_running_loop().call_soon(self._tick)

    def _plan(self, file: object) -> object:
        self.turns.append(self._turn)
        return SimpleNamespace(groups=())


async def _body_of(work: Callable[[Place], Any]) -> None:
    with ThreadPoolExecutor(1) as threads:
        await work(Place(threads))


async def test_what_is_told_may_begin_the_next_fetch() -> None:
    async def body(place: Place) -> None:
        def again(name: str, key: AdapterKey) -> None:
            if name == "fetch_failed":
                place.source.may_bring.set()
                place.files.start_fetch(key, 2, urgent=True)
                place.told.look = lambda name, key: None

        place.told.look = again
        place.files.start_fetch(KEYS[0], 1, urgent=True)
        await place.source.bringing.wait()
        place.files.cancel_fetch(KEYS[0])
        await until(lambda: place.told.names[-1:] == ["published"])
        assert place.told.names == ["header_checked", "fetch_failed", "header_checked", "published"]
        await place.files.stop()

    await _body_of(body)


async def test_a_file_is_published_once_it_is_brought() -> None:
    async def body(place: Place) -> None:
        place.files.start_fetch(KEYS[0], 1, urgent=True)
        await place.source.bringing.wait()
        await asyncio.sleep(0.01)
        assert place.told.names == ["header_checked"]
        place.source.may_bring.set()
        await until(lambda: place.told.names == ["header_checked", "published"])
        await place.files.stop()

    await _body_of(body)


async def test_one_plan_in_each_turn_of_the_loop() -> None:
    async def body(place: Place) -> None:
        place.source.may_bring.set()
        for key in KEYS:
            place.files.start_fetch(key, 1, urgent=True)
        await until(lambda: place.told.names.count("published") == 3)
        assert len(place.turns) == len(set(place.turns)) == 3
        await place.files.stop()

    await _body_of(body)


async def test_who_is_populated_when_it_closes_is_lost() -> None:
    async def body(place: Place) -> None:
        place.files.start_populate(KEYS[0], 1)
        await until(lambda: place.source.inside)
        place.files.begin_close()
        await until(lambda: place.told.names)
        assert place.told.names == ["lost"]
        await place.files.stop()
        assert not place.files.holds

    await _body_of(body)


async def test_a_hold_is_there_when_it_is_told_and_closed_when_that_is_told() -> None:
    seen: list[tuple[str, bool, bool]] = []

    async def body(place: Place) -> None:
        def look(name: str, key: AdapterKey) -> None:
            (hold,) = place.source.holds
            seen.append((name, key in place.files.holds, hold.closed))

        place.told.look = look
        place.files.start_populate(KEYS[0], 1)
        await until(lambda: len(seen) == 1)
        place.files.start_release(KEYS[0], 1)
        await until(lambda: len(seen) == 2)
        await place.files.stop()

    await _body_of(body)
    assert seen == [("populated", True, False), ("released", False, True)]


@pytest.mark.parametrize("by", ["stop", "release"])
async def test_closing_a_hold_is_waited_for(by: str) -> None:
    """It is unmapped in a thread, which takes a while."""

    async def body(place: Place) -> None:
        may_close = Event()
        place.files.holds[KEYS[0]] = hold = Bytes(lambda: may_close.wait(10))
        if by == "release":
            place.files.start_release(KEYS[0], 1)
        stopping = asyncio.create_task(place.files.stop()) if by == "stop" else None
        await asyncio.sleep(0.02)
        assert not place.told.names
        assert stopping is None or not stopping.done()
        may_close.set()
        await until(lambda: hold.closed)
        await (stopping or place.files.stop())

    await _body_of(body)


async def test_stop_waits_for_what_its_tasks_undo() -> None:
    async def body(place: Place) -> None:
        place.files.start_fetch(KEYS[0], 1, urgent=True)
        await place.source.bringing.wait()
        await place.files.stop()
        assert place.source.undone == 1

    await _body_of(body)


async def test_who_waits_until_it_is_opened_does_not_wait_for_its_bytes() -> None:
    async def body(place: Place) -> None:
        await place.files.opened(KEYS[0])  # nobody opens it
        place.source.may_open.clear()
        place.files.start_fetch(KEYS[0], 1, urgent=True)
        opened = asyncio.create_task(place.files.opened(KEYS[0]))
        await asyncio.sleep(0.01)
        assert not opened.done()
        place.source.may_open.set()
        await opened
        assert place.turns
        assert "published" not in place.told.names
        await place.files.stop()

    await _body_of(body)


@pytest.mark.parametrize("before_use", [False, True])
async def test_groups_are_told_of_unless_all_has_to_be_checked(before_use: bool) -> None:
    """And what was known of an earlier fetch is not known of a new one."""

    async def body(place: Place) -> None:
        files, source = place.files, place.source
        source.arrives = True
        for attempt in (1, 2):
            place.told.names.clear()
            files.start_fetch(KEYS[0], attempt, urgent=True)
            assert not files.verifications
            await source.bringing.wait()
            told = ["header_checked", *([] if before_use else ["span_fetched"])]
            assert place.told.names == told
            source.may_bring.set()
            await until(lambda: "published" in place.told.names)
            assert files.verifications == {KEYS[0]: KNOWN}
            source.bringing.clear()
            source.may_bring.clear()
        await files.stop()

    with ThreadPoolExecutor(1) as threads:
        await body(Place(threads, before_use=before_use))
