"""`lorax-async load`: load adapters onto a device and time it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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
    loader_settings,
    read_layout,
)
from lorax_async.cli.measure import (
    LoadProgress,
    create_loads,
    load_as_json,
    load_at_once,
    run_on_uvloop,
)
from lorax_async.cli.terminal import ProgressBars, Terminal, format_ms, format_runs, format_size
from lorax_async.cli.timeline import add_trace, record_trace
from lorax_async.config import DTYPES, LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout


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
