"""`lorax-async load`: adapters onto a device, with the times it took."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorax_async.commands.arguments import (
    FAILED,
    OK,
    SIZE_HELP,
    AddParser,
    add_base,
    add_command,
    as_size,
)
from lorax_async.commands.bases import layout_of
from lorax_async.commands.measure import Load, load_as_json, load_at_once, loads_of, run_on_uvloop
from lorax_async.commands.places import (
    ID_HELP,
    TOKENS,
    add_caches,
    add_sources,
    as_place,
    settings_of,
)
from lorax_async.commands.terminal import Bars, Screen, milliseconds, size, spans
from lorax_async.commands.timeline import add_trace, traced
from lorax_async.config import DTYPES, LoaderConfig
from lorax_async.core.layout import ModelLayout
from lorax_async.loader import AdapterLoader


def add_to(add: AddParser) -> None:
    more = (
        "Each is let go as soon as it has been resident, so that a small --device-bytes makes them"
        f" take turns. {TOKENS}"
    )
    about = "load adapters, all at once, and say how long it took"
    parser = add_command(add, "load", about, _load, more)
    parser.add_argument(
        "paths",
        type=as_place,
        nargs="+",
        metavar="PATH",
        help=f"an adapter's folder, or else {ID_HELP}",
    )
    add_base(parser, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="stored as (default: the base's dtype)")
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        default="256MiB",
        metavar="N",
        help=f"the room for adapters: {SIZE_HELP} (default: %(default)s)",
    )
    add_sources(parser)
    add_caches(parser)
    add_trace(parser)


def _load(arguments: argparse.Namespace, screen: Screen) -> int:
    config = LoaderConfig(
        dtype=arguments.dtype,
        device_bytes=arguments.device_bytes,
        **settings_of(arguments, arguments.paths),
    )
    layout = layout_of(arguments.base, screen)
    loads = loads_of(arguments.paths)
    with screen.bars() as bars:
        run_on_uvloop(_load_all(layout, config, loads, bars, arguments.trace))
    if arguments.json:
        screen.json({"adapters": [load_as_json(load) for load in loads]})
    else:
        _show_loads(loads, screen)
    for load in loads:
        if load.error is not None:
            screen.complain(f"{type(load.error).__name__}: {load.error}")
    return FAILED if any(load.error for load in loads) else OK


async def _load_all(
    layout: ModelLayout,
    config: LoaderConfig,
    loads: Sequence[Load],
    bars: Bars,
    trace: Path | None,
) -> None:
    async with AdapterLoader(layout, config) as loader:
        with traced(loader, trace):
            await load_at_once(loader, loads, bars.show, hold=False)


def _show_loads(loads: Sequence[Load], screen: Screen) -> None:
    columns = ("adapter", "state", "layers", " file", " device", " first layer", " resident")
    screen.table(columns, [_load_row(load) for load in loads])


def _load_row(load: Load) -> tuple[str, ...]:
    return (
        load.name,
        load.state,
        spans(load.layers),
        "" if load.file_bytes is None else size(load.file_bytes),
        "" if load.nbytes is None else size(load.nbytes),
        milliseconds(load.first_layer),
        milliseconds(load.resident),
    )
