"""`lorax-async load`: load adapters onto a device and time it; with `--trace`, record it."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lorax_async.cli.command_line import (
    ABOUTS,
    ID_HELP,
    TOKENS,
    AddParser,
    ProgressBars,
    Terminal,
    add_base,
    add_caches,
    add_command,
    add_device_bytes,
    add_sources,
    as_folder_or_id,
    error_as_json,
    format_ms,
    format_runs,
    format_size,
    in_ms,
    loader_settings,
    read_layout,
    run_on_uvloop,
)
from lorax_async.config import DTYPES, LoaderConfig
from lorax_async.errors import LoraxError, UsageError
from lorax_async.events import BytesMoved, Event, LayerReady, SlotGranted
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout
from lorax_async.types import AdapterKey, AdapterRef

TICK = 1e-3
"""Seconds between two ticks of the stall measurement."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class LoadProgress:
    """The progress and result of one load. Times are seconds from the call of `load`."""

    ref: AdapterRef
    name: str
    location: str
    """As in the adapter's key."""
    state: str = "waiting"
    moved: int = 0
    nbytes: int | None = None
    """Bytes on the device; known once the slot is granted."""
    file_bytes: int | None = None
    """Size of local weight files."""
    layers: tuple[int, ...] = ()
    ready_times: list[float] = field(default_factory=list)
    """When each layer on the device became ready."""
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
                self.state, self.moved = "loading", 0
                self.ready_times.clear()
                self._describe(event.key, event.nbytes, event.layers)
            case BytesMoved():
                self.moved += event.nbytes
            case LayerReady():
                new = self.layers.index(event.layer) + 1 - len(self.ready_times)
                self.ready_times += [time.perf_counter() - self.started] * new

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
            self._describe(handle.key, handle.nbytes, handle.layers)

    def _describe(self, key: AdapterKey, nbytes: int, layers: tuple[int, ...]) -> None:
        self.nbytes, self.layers = nbytes, layers
        if key.files:
            self.file_bytes = key.files[1].size

    def show(self, bars: ProgressBars, row: int) -> None:
        layers = f"{len(self.ready_times)}/{len(self.layers)} layers" if self.layers else ""
        bars.update(row, self.name, self.moved, self.nbytes, self.state, layers)

    def release(self) -> None:
        if self.handle is not None:
            self.handle.release()

    @property
    def first_layer(self) -> float | None:
        return self.ready_times[0] if self.ready_times else None

    def as_json(self) -> dict[str, object]:
        return {
            "path": self.ref.text,
            "name": self.name,
            "state": self.state,
            "layers": list(self.layers),
            "file_bytes": self.file_bytes,
            "device_bytes": self.nbytes,
            "first_layer_ms": in_ms(self.first_layer),
            "resident_ms": in_ms(self.resident),
            "error": error_as_json(self.error),
        }

    def cells(self) -> dict[str, str]:
        """Return the cells of a table's row, by their columns."""
        return {
            "adapter": self.name,
            "state": self.state,
            "layers": format_runs(self.layers),
            " file": "" if self.file_bytes is None else format_size(self.file_bytes),
            " on device": "" if self.nbytes is None else format_size(self.nbytes),
            " first layer": format_ms(self.first_layer),
            " resident": format_ms(self.resident),
        }


def create_loads(places: Sequence[Path | AdapterRef]) -> list[LoadProgress]:
    """Return one load per place, named by its folder, or by the whole path if names clash.

    Raises `UsageError` for several revisions of one adapter: events do not distinguish them.
    """
    refs = [AdapterRef(place) if isinstance(place, Path) else place for place in places]
    if len({ref.id for ref in refs}) < len({(ref.id, ref.revision) for ref in refs}):
        raise UsageError("one adapter is named in several revisions; load one after the other")
    names = [ref.id.resolve().name if isinstance(ref.id, Path) else ref.text for ref in refs]
    loads = []
    for ref, name in zip(refs, names, strict=True):
        location = os.path.realpath(ref.id) if isinstance(ref.id, Path) else ref.text
        loads.append(LoadProgress(ref, name if names.count(name) == 1 else ref.text, location))
    return loads


async def load_at_once(
    loader: AdapterLoader, loads: Sequence[LoadProgress], bars: ProgressBars, *, hold: bool
) -> None:
    """Start every load in the same iteration of the loop and wait for all.

    With `hold`, the caller releases the loads; without, each is released once it is resident.
    """
    places: dict[str, list[tuple[int, LoadProgress]]] = {}
    for row, load in enumerate(loads):
        places.setdefault(load.location, []).append((row, load))

    def hear(event: Event) -> None:
        for row, load in places.get(event.key.location, ()):
            load.hear(event)
            load.show(bars, row)

    async def run(row: int, load: LoadProgress) -> None:
        load.show(bars, row)
        await load.run(loader)
        load.show(bars, row)
        if not hold:
            load.release()

    unsubscribe = loader.subscribe(hear)
    try:
        async with asyncio.TaskGroup() as group:
            for row, load in enumerate(loads):
                group.create_task(run(row, load), name=f"load {load.name}")
    except BaseException:
        for load in loads:
            load.release()
        raise
    finally:
        unsubscribe()


# -- stalls of the event loop ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoopStall:
    """The longest delay of a 1 ms timer on the loop, in `ticks` ticks over `seconds`."""

    longest: float
    ticks: int
    seconds: float


async def with_ticker(work: Awaitable[T]) -> tuple[T, LoopStall]:
    """Await `work` beside a 1 ms ticker on the same loop; the last tick follows its end."""
    stop = asyncio.Event()

    async def tick() -> LoopStall:
        begin = last = time.perf_counter()
        longest, ticks = 0.0, 0
        while not stop.is_set():
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            longest = max(longest, now - last - TICK)
            last = now
            ticks += 1
        return LoopStall(longest, ticks, last - begin)

    ticker = asyncio.create_task(tick(), name="ticker")
    try:
        await asyncio.sleep(0)  # let the ticker start first
        result = await work
    finally:
        stop.set()
        stall = await ticker
    return result, stall


@contextmanager
def record_trace(loader: AdapterLoader, path: Path | None) -> Iterator[None]:
    """Trace the block, however it ends, and write the trace to `path` unless that is None.

    Raises `OSError`, before the block if possible, but never hides the block's own error.
    """
    if path is None:
        yield
        return
    path.open("a").close()
    with loader.trace() as trace:
        try:
            yield
        except BaseException:
            with suppress(OSError):
                trace.write(path)
            raise
        trace.write(path)


# -- the command ----------------------------------------------------------------------------------


def add_to(add: AddParser) -> None:
    more = (
        "Each adapter is released once it is resident, so that with a small --device-bytes one"
        f" makes room for the next. {TOKENS}"
    )
    about = ABOUTS["load"]
    parser = add_command(add, "load", about, _load, more)
    parser.add_argument(
        "paths",
        type=as_folder_or_id,
        nargs="+",
        metavar="PATH",
        help=f"an adapter's folder, or else {ID_HELP}",
    )
    add_base(parser, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="on the device (default: the base's dtype)")
    add_device_bytes(parser)
    add_sources(parser)
    add_caches(parser)
    help = "write a trace to FILE; draw it with `lorax-async timeline FILE`"
    parser.add_argument("--trace", type=Path, metavar="FILE", help=help)


def _load(arguments: argparse.Namespace, terminal: Terminal) -> int:
    config = LoaderConfig(
        dtype=arguments.dtype,
        device_bytes=arguments.device_bytes,
        **loader_settings(arguments, arguments.paths),
    )
    layout = read_layout(arguments.base, terminal, arguments.hub_endpoint)
    loads = create_loads(arguments.paths)
    with terminal.bars() as bars:
        run_on_uvloop(_load_all(layout, config, loads, bars, arguments.trace))
    if arguments.json:
        terminal.json({"adapters": [load.as_json() for load in loads]})
    else:
        terminal.table([load.cells() for load in loads])
    return terminal.report_errors(load.error for load in loads)


async def _load_all(
    layout: ModelLayout,
    config: LoaderConfig,
    loads: Sequence[LoadProgress],
    bars: ProgressBars,
    trace: Path | None,
) -> None:
    async with AdapterLoader(layout, config) as loader:
        with record_trace(loader, trace):
            await load_at_once(loader, loads, bars, hold=False)
