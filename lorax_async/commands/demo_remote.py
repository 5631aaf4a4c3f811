"""`lorax-async demo-remote`: adapters come over a slow link, and their first layers long before."""

from __future__ import annotations

import argparse
import asyncio
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorax_async import layouts
from lorax_async.commands.arguments import OK, AddParser, add_base, add_command
from lorax_async.commands.measure import Load, load_as_json, load_at_once, loads_of, run_on_uvloop
from lorax_async.commands.slow_server import SlowServer
from lorax_async.commands.terminal import Bars, Screen, milliseconds, size, spans
from lorax_async.commands.timeline import add_trace, traced
from lorax_async.config import Allow, LoaderConfig
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.errors import ConfigError
from lorax_async.identity import AdapterRef
from lorax_async.io.sources.local_folder import CONFIG, WEIGHTS
from lorax_async.loader import AdapterLoader
from lorax_async.verification import Verification

ADAPTERS = ("pirate", "shout", "json")

RATE = 1_400_000.0
"""Bytes per second of the whole link: the three adapters take two to three seconds."""

COLUMNS = 50
_HEIGHTS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class RemoteDemo:
    """What came out: the loads, over a link of `rate` bytes per second, of `nbytes` in all."""

    loads: tuple[Load, ...]
    verifications: tuple[Verification, ...]
    rate: float
    nbytes: int


def add_to(add: AddParser) -> None:
    about = "load the demo's adapters over a slow link, and show when each layer came"
    more = (
        "They are served on loopback by this process, at 1.4 MB/s, into a cache that is empty at"
        " first and gone afterwards. No base model is needed, only its shapes; with --base, prompts"
        " go through that model, whose layers compute as soon as their adapters' layers are here."
    )
    parser = add_command(add, "demo-remote", about, _demo_remote, more)
    add_adapters(parser)
    add_base(parser, required=False)
    add_trace(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        metavar="DIR",
        help="the folder with pirate, shout and json (default: %(default)s, as in a checkout)",
    )


def adapters_in(folder: Path) -> list[Path]:
    """The three folders. Raises `ConfigError` where one is missing."""
    paths = [folder / name for name in ADAPTERS]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise ConfigError(
            f"the demo's adapters are not here: {', '.join(missing)}; run it in a checkout of the"
            " project, or give their folder with --adapters"
        )
    return paths


def _demo_remote(arguments: argparse.Namespace, screen: Screen) -> int:
    demo = run_remote_demo(arguments.adapters, screen, base=arguments.base, trace=arguments.trace)
    if arguments.json:
        screen.json(_as_json(demo))
    else:
        _show(demo, screen)
    return OK


def run_remote_demo(
    folder: Path,
    screen: Screen,
    rate: float = RATE,
    *,
    base: str | None = None,
    trace: Path | None = None,
) -> RemoteDemo:
    """Serve the adapters in `folder` at `rate` bytes per second, and load all three at once.

    With a `base`, a prompt for each goes through that model meanwhile; a `trace` is a file for what
    happens when.

    Raises `ConfigError` where they are not there, and whatever a load raises.
    """
    files = {
        f"/{path.name}/{name}": (path / name).read_bytes()
        for path in adapters_in(folder)
        for name in (CONFIG, WEIGHTS)
    }
    model = None if base is None else _model(base, screen)
    with SlowServer(files, rate) as server, TemporaryDirectory(prefix="lorax-async-") as cache:
        config = LoaderConfig(
            dtype=None if model is None else "float32",
            device_bytes=32 << 20,
            max_slots=len(ADAPTERS),
            connections=1,  # more would gain nothing on one line, and hide the layers' order
            allow=(Allow("http", "127.0.0.1", server.server_port),),
            cache_dir=cache,
        )
        loads = loads_of([AdapterRef(server.url(name)) for name in ADAPTERS])
        for load, name in zip(loads, ADAPTERS, strict=True):
            load.name = name
        verifications = run_on_uvloop(_load(config, loads, screen, model, trace))
    return RemoteDemo(tuple(loads), verifications, rate, sum(map(len, files.values())))


async def _load(
    config: LoaderConfig, loads: Sequence[Load], screen: Screen, model: Any, trace: Path | None
) -> tuple[Verification, ...]:
    layout = smollm2_layout() if model is None else layouts.from_module(model)
    async with AdapterLoader(layout, config) as loader:
        try:
            with screen.bars() as bars, traced(loader, trace):
                await _load_and_compute(loader, loads, bars, model)
            return tuple([await _verified(load) for load in loads])
        finally:
            for load in loads:
                load.release()


async def _load_and_compute(
    loader: AdapterLoader, loads: Sequence[Load], bars: Bars, model: Any
) -> None:
    if model is None:
        await load_at_once(loader, loads, bars.show, hold=True)
        return
    from lorax_async.commands.demo_pass import stream_through  # noqa: PLC0415

    async with asyncio.TaskGroup() as group:
        group.create_task(load_at_once(loader, loads, bars.show, hold=True), name="loads")
        refs = [load.ref for load in loads]
        group.create_task(stream_through(model, loader, refs), name="passes")


def _model(base: str, screen: Screen) -> Any:
    from lorax_async.commands.demo_pass import base_model  # noqa: PLC0415

    with screen.steps() as report:
        return base_model(base, report)


async def _verified(load: Load) -> Verification:
    if load.error is not None:
        raise load.error
    assert load.handle is not None
    return await load.handle.verified()


def smollm2_layout() -> ModelLayout:
    """The linear modules of the demo's base, which has 30 layers of hidden size 576."""
    hidden, middle, heads = 576, 1536, 192
    shapes = (
        ("self_attn.q_proj", hidden, hidden, Parallel.COLUMN),
        ("self_attn.k_proj", hidden, heads, Parallel.COLUMN),
        ("self_attn.v_proj", hidden, heads, Parallel.COLUMN),
        ("self_attn.o_proj", hidden, hidden, Parallel.ROW),
        ("mlp.gate_proj", hidden, middle, Parallel.COLUMN),
        ("mlp.up_proj", hidden, middle, Parallel.COLUMN),
        ("mlp.down_proj", middle, hidden, Parallel.ROW),
    )
    modules = [
        Module(f"model.layers.{layer}.{name}", into, out, layer, parallel)
        for layer in range(30)
        for name, into, out, parallel in shapes
    ]
    return ModelLayout(tuple(modules), 30, "BF16", "model.")


def picture(came: Sequence[float], seconds: float) -> str:
    """How many of the layers were there, column by column, from the call of `load` on."""
    marks = ""
    for column in range(1, COLUMNS + 1):
        there = bisect_right(came, seconds * column / COLUMNS)
        height = math.ceil(there * len(_HEIGHTS) / len(came))
        marks += _HEIGHTS[height - 1] if there else "·"
    return marks


def _show(demo: RemoteDemo, screen: Screen) -> None:
    columns = ("adapter", "layers", " on device", " first layer", " resident", "checked by")
    rows = zip(demo.loads, demo.verifications, strict=True)
    screen.table(columns, [(*_row(load), found.kind) for load, found in rows])
    seconds = max(load.resident or 0.0 for load in demo.loads)
    pictures = [(load.name, picture(load.came, seconds)) for load in demo.loads]
    column = milliseconds(seconds / COLUMNS)
    screen.say(f"layers on the device; each column is {column}", "bold")
    screen.pairs(pictures)
    screen.say()
    link = f"{demo.rate / 1e6:g} MB/s for all three, on loopback; {size(demo.nbytes)} to bring"
    screen.pairs([("link", link), ("times", "from load(), called for all three in one turn")])


def _row(load: Load) -> tuple[str, ...]:
    assert load.nbytes is not None
    return (
        load.name,
        spans(load.layers),
        size(load.nbytes),
        milliseconds(load.first_layer),
        milliseconds(load.resident),
    )


def _as_json(demo: RemoteDemo) -> dict[str, object]:
    adapters = [
        load_as_json(load)
        | {"layers_ms": [round(each * 1e3, 3) for each in load.came], "checked": asdict(found)}
        for load, found in zip(demo.loads, demo.verifications, strict=True)
    ]
    return {"adapters": adapters, "rate": demo.rate, "bytes": demo.nbytes}
