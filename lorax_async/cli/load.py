"""`lorax-async load`: load adapters onto a device and time it."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorax_async.cli.arguments import (
    FAILED,
    ID_HELP,
    OK,
    SIZE_HELP,
    TOKENS,
    AddParser,
    add_base,
    add_caches,
    add_command,
    add_sources,
    as_place,
    as_size,
    is_local,
    loader_settings,
    read_layout,
)
from lorax_async.cli.terminal import ProgressBars, Terminal, format_ms, format_runs, format_size
from lorax_async.cli.timeline import add_trace, record_trace
from lorax_async.config import DTYPES, LoaderConfig
from lorax_async.errors import LoraxError, UsageError
from lorax_async.events import BytesMoved, Event, LayerReady, SlotGranted
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout
from lorax_async.sources.local import weight_files
from lorax_async.types import AdapterKey, AdapterRef

TICK = 1e-3
"""Seconds between two ticks of the stall measurement."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class LoadProgress:
    """The progress and result of one load. Times are seconds from the call of `load`."""

    ref: AdapterRef
    name: str
    state: str = "waiting"
    moved: int = 0
    nbytes: int | None = None
    """Bytes on the device; known once the slot is granted."""
    file_bytes: int | None = None
    """Size of local weight files."""
    layers: tuple[int, ...] = ()
    ready: int = 0
    """Number of layers on the device."""
    ready_times: list[float] = field(default_factory=list)
    """When each of these became ready."""
    resident: float | None = None
    error: LoraxError | None = None
    handle: AdapterHandle | None = None
    started: float = 0.0

    def hear(self, event: Event) -> None:
        """Update from an event of this adapter.

        Times are taken here: the events' own come from uvloop's clock, in whole milliseconds.
        """
        match event:
            case SlotGranted():
                self.state, self.moved, self.ready = "loading", 0, 0
                self.ready_times.clear()
                self.describe(event.key, event.nbytes, event.layers)
            case BytesMoved():
                self.moved += event.nbytes
            case LayerReady():
                self.ready = self.layers.index(event.layer) + 1
                now = time.perf_counter() - self.started
                self.ready_times += [now] * (self.ready - len(self.ready_times))

    @property
    def first_layer(self) -> float | None:
        return self.ready_times[0] if self.ready_times else None

    async def run(self, loader: AdapterLoader) -> None:
        """Load the adapter; store the handle, or a typed error instead of raising it."""
        self.started = time.perf_counter()
        try:
            handle = await loader.load(self.ref)
        except LoraxError as error:
            self.state, self.error = "failed", error
        else:
            self.resident = time.perf_counter() - self.started
            self.handle, self.state = handle, "resident"
            # An adapter that was already resident causes no events.
            self.describe(handle.key, handle.nbytes, handle.layers)

    def describe(self, key: AdapterKey, nbytes: int, layers: tuple[int, ...]) -> None:
        self.nbytes, self.layers = nbytes, layers
        if key.files:
            self.file_bytes = sum(file.size for file in weight_files(key))

    def release(self) -> None:
        if self.handle is not None:
            self.handle.release()


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def load_as_json(load: LoadProgress) -> dict[str, object]:
    """Return the load as plain values."""
    return {
        "path": load.ref.text,
        "name": load.name,
        "state": load.state,
        "layers": list(load.layers),
        "file_bytes": load.file_bytes,
        "device_bytes": load.nbytes,
        "first_layer_ms": in_ms(load.first_layer),
        "resident_ms": in_ms(load.resident),
        "error": error_as_json(load.error),
    }


def error_as_json(error: LoraxError | None) -> dict[str, object] | None:
    if error is None:
        return None
    return {
        "type": type(error).__name__,
        "text": str(error),
        "stage": error.stage,
        "retryable": error.retryable,
    }


Show = Callable[[int, LoadProgress], None]
"""A callback with the index of a load that progressed, and the load."""


def create_loads(places: Sequence[Path | AdapterRef]) -> list[LoadProgress]:
    """Return one load per place, named by its folder, or by the whole path if names clash.

    Raises `UsageError` for several revisions of one adapter: events do not distinguish them.
    """
    refs = [AdapterRef(place) if isinstance(place, Path) else place for place in places]
    if len({ref.id for ref in refs}) < len({(ref.id, ref.revision) for ref in refs}):
        raise UsageError("one adapter is named in several revisions; load one after the other")
    names = [ref.id.resolve().name if isinstance(ref.id, Path) else ref.text for ref in refs]
    return [
        LoadProgress(ref, name if names.count(name) == 1 else ref.text)
        for ref, name in zip(refs, names, strict=True)
    ]


async def load_at_once(
    loader: AdapterLoader, loads: Sequence[LoadProgress], show: Show, *, hold: bool
) -> None:
    """Start every load in the same iteration of the loop and wait for all.

    With `hold`, the caller releases the loads; without, each is released once it is resident.
    """

    async def run(index: int, load: LoadProgress) -> None:
        show(index, load)
        await load.run(loader)
        show(index, load)
        if not hold:
            load.release()

    with _subscribe(loader, loads, show):
        try:
            async with asyncio.TaskGroup() as group:
                for index, load in enumerate(loads):
                    group.create_task(run(index, load), name=f"load {load.name}")
        except BaseException:
            for load in loads:
                load.release()
            raise


@contextmanager
def _subscribe(loader: AdapterLoader, loads: Sequence[LoadProgress], show: Show) -> Iterator[None]:
    places: dict[str, list[tuple[int, LoadProgress]]] = {}
    for index, load in enumerate(loads):
        location = os.path.realpath(load.ref.id) if is_local(load.ref) else load.ref.text
        places.setdefault(location, []).append((index, load))

    def hear(event: Event) -> None:
        for index, load in places.get(event.key.location, ()):
            load.hear(event)
            show(index, load)

    unsubscribe = loader.subscribe(hear)
    try:
        yield
    finally:
        unsubscribe()


@dataclass(frozen=True, slots=True)
class LoopStall:
    """The longest delay of a 1 ms timer on the loop, in `ticks` ticks over `seconds`."""

    longest: float
    ticks: int
    seconds: float


async def with_ticker(work: Awaitable[T]) -> tuple[T, LoopStall]:
    """Await `work` beside a 1 ms ticker on the same loop; the last tick follows its end."""
    stop = asyncio.Event()
    ticker = asyncio.create_task(_tick(stop), name="ticker")
    try:
        await asyncio.sleep(0)  # let the ticker start first
        result = await work
    finally:
        stop.set()
        stall = await ticker
    return result, stall


async def _tick(stop: asyncio.Event) -> LoopStall:
    begin = last = time.perf_counter()
    longest, ticks = 0.0, 0
    while not stop.is_set():
        await asyncio.sleep(TICK)
        now = time.perf_counter()
        longest = max(longest, now - last - TICK)
        last = now
        ticks += 1
    return LoopStall(longest, ticks, last - begin)


def run_on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new uvloop without installing a policy. Ctrl-C cancels it."""
    import uvloop  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def add_to(add: AddParser) -> None:
    more = (
        "Each adapter is released once it is resident, so that with a small --device-bytes one"
        f" makes room for the next. {TOKENS}"
    )
    about = "load adapters, all at once, and report times"
    parser = add_command(add, "load", about, _load, more)
    parser.add_argument(
        "paths",
        type=as_place,
        nargs="+",
        metavar="PATH",
        help=f"an adapter's folder, or else {ID_HELP}",
    )
    add_base(parser, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="on the device (default: the base's dtype)")
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        default="256MiB",
        metavar="N",
        help=f"device memory for adapters: {SIZE_HELP} (default: %(default)s)",
    )
    add_sources(parser)
    add_caches(parser)
    add_trace(parser)


def _load(arguments: argparse.Namespace, terminal: Terminal) -> int:
    config = LoaderConfig(
        dtype=arguments.dtype,
        device_bytes=arguments.device_bytes,
        **loader_settings(arguments, arguments.paths),
    )
    layout = read_layout(arguments.base, terminal)
    loads = create_loads(arguments.paths)
    with terminal.bars() as bars:
        run_on_uvloop(_load_all(layout, config, loads, bars, arguments.trace))
    if arguments.json:
        terminal.json({"adapters": [load_as_json(load) for load in loads]})
    else:
        _show_loads(loads, terminal)
    for load in loads:
        if load.error is not None:
            terminal.complain(f"{type(load.error).__name__}: {load.error}")
    return FAILED if any(load.error for load in loads) else OK


async def _load_all(
    layout: ModelLayout,
    config: LoaderConfig,
    loads: Sequence[LoadProgress],
    bars: ProgressBars,
    trace: Path | None,
) -> None:
    async with AdapterLoader(layout, config) as loader:
        with record_trace(loader, trace):
            await load_at_once(loader, loads, bars.show, hold=False)


def _show_loads(loads: Sequence[LoadProgress], terminal: Terminal) -> None:
    columns = ("adapter", "state", "layers", " file", " device", " first layer", " resident")
    terminal.table(columns, [_load_row(load) for load in loads])


def _load_row(load: LoadProgress) -> tuple[str, ...]:
    return (
        load.name,
        load.state,
        format_runs(load.layers),
        "" if load.file_bytes is None else format_size(load.file_bytes),
        "" if load.nbytes is None else format_size(load.nbytes),
        format_ms(load.first_layer),
        format_ms(load.resident),
    )
