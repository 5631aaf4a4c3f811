"""Loading several adapters at once on one event loop, with a clock beside it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorax_async.adapter import AdapterKey
from lorax_async.errors import LoraxError
from lorax_async.events import BytesMoved, Event, LayerReady, SlotGranted
from lorax_async.handle import AdapterHandle
from lorax_async.io.sources.local_weights import weight_files
from lorax_async.loader import AdapterLoader

TICK = 1e-3
"""Seconds between two looks at the loop's clock."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Load:
    """One adapter's way onto the device, as it goes. Times are seconds from the call of `load`."""

    path: Path
    name: str
    state: str = "waiting"
    moved: int = 0
    nbytes: int | None = None
    """Bytes it takes on the device, known with its slot."""
    file_bytes: int | None = None
    layers: tuple[int, ...] = ()
    ready: int = 0
    """How many of the layers are on the device."""
    first_layer: float | None = None
    resident: float | None = None
    error: LoraxError | None = None
    handle: AdapterHandle | None = None
    started: float = 0.0

    def hear(self, event: Event) -> None:
        """Take note of an event of this adapter.

        The events' own time is the loop's, which uvloop counts in whole milliseconds: too coarse.
        """
        match event:
            case SlotGranted():
                self.state, self.moved, self.ready = "loading", 0, 0
                self.describe(event.key, event.nbytes, event.layers)
            case BytesMoved():
                self.moved += event.nbytes
            case LayerReady():
                self.ready = self.layers.index(event.layer) + 1
                self.first_layer = self.first_layer or time.perf_counter() - self.started

    async def run(self, loader: AdapterLoader) -> None:
        """Load it and keep the handle, or the typed error."""
        self.started = time.perf_counter()
        try:
            handle = await loader.load(self.path)
        except LoraxError as error:
            self.state, self.error = "failed", error
        else:
            self.resident = time.perf_counter() - self.started
            self.handle, self.state = handle, "resident"
            # Where it was resident already, no event has told these.
            self.describe(handle.key, handle.nbytes, handle.layers)

    def describe(self, key: AdapterKey, nbytes: int, layers: tuple[int, ...]) -> None:
        self.nbytes, self.layers = nbytes, layers
        self.file_bytes = sum(file.size for file in weight_files(key))

    def release(self) -> None:
        if self.handle is not None:
            self.handle.release()


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def load_as_json(load: Load) -> dict[str, object]:
    """What is known of a load, for machines."""
    return {
        "path": str(load.path),
        "name": load.name,
        "state": load.state,
        "layers": list(load.layers),
        "file_bytes": load.file_bytes,
        "device_bytes": load.nbytes,
        "first_layer_ms": in_ms(load.first_layer),
        "resident_ms": in_ms(load.resident),
        "error": None
        if load.error is None
        else {
            "type": type(load.error).__name__,
            "text": str(load.error),
            "stage": load.error.stage,
            "retryable": load.error.retryable,
        },
    }


Show = Callable[[int, Load], None]
"""Called with the number and the state of a load that went on."""


def loads_of(paths: Sequence[Path]) -> list[Load]:
    """One load per path, named by its folder, or by the whole path where two folders share one."""
    names = [path.resolve().name for path in paths]
    return [
        Load(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


async def load_at_once(
    loader: AdapterLoader, loads: Sequence[Load], show: Show, *, hold: bool
) -> None:
    """Start every load in the same turn of the loop and wait for all.

    With `hold`, the leases stay with the loads, to be released by the caller; without, an adapter
    may make room for the next as soon as it has been resident.
    """

    async def one(number: int, load: Load) -> None:
        show(number, load)
        await load.run(loader)
        show(number, load)
        if not hold:
            load.release()

    with _heard(loader, loads, show):
        try:
            async with asyncio.TaskGroup() as group:
                for number, load in enumerate(loads):
                    group.create_task(one(number, load), name=f"load {load.name}")
        except BaseException:
            for load in loads:
                load.release()
            raise


@contextmanager
def _heard(loader: AdapterLoader, loads: Sequence[Load], show: Show) -> Iterator[None]:
    places: dict[str, list[tuple[int, Load]]] = {}
    for number, load in enumerate(loads):
        places.setdefault(os.path.realpath(load.path), []).append((number, load))

    def hear(event: Event) -> None:
        for number, load in places.get(event.key.location, ()):
            load.hear(event)
            show(number, load)

    unsubscribe = loader.subscribe(hear)
    try:
        yield
    finally:
        unsubscribe()


@dataclass(frozen=True, slots=True)
class Stall:
    """How late a timer of 1 ms woke on the loop, at worst, in so many ticks over so long."""

    longest: float
    ticks: int
    seconds: float


async def with_ticker(work: Awaitable[T]) -> tuple[T, Stall]:
    """Await `work` while a 1 ms ticker runs on the same loop; the last tick comes after it."""
    stop = asyncio.Event()
    ticker = asyncio.create_task(_tick(stop), name="ticker")
    try:
        await asyncio.sleep(0)  # the clock runs before the work begins
        result = await work
    finally:
        stop.set()
        stall = await ticker
    return result, stall


async def _tick(stop: asyncio.Event) -> Stall:
    begin = last = time.perf_counter()
    longest, ticks = 0.0, 0
    while not stop.is_set():
        await asyncio.sleep(TICK)
        now = time.perf_counter()
        longest = max(longest, now - last - TICK)
        last = now
        ticks += 1
    return Stall(longest, ticks, last - begin)


def run_on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a uvloop of its own; no policy is installed. Ctrl-C cancels it."""
    import uvloop  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
