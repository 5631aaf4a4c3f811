"""`lorax-async`: look at adapters, load them, see it all work."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lorax_async import layouts
from lorax_async.commands.inspection import Inspection, Target, inspect_adapter
from lorax_async.commands.measure import Load, load_as_json, load_at_once, loads_of, run_on_uvloop
from lorax_async.commands.terminal import Bars, Screen, milliseconds, require_rich, size, spans
from lorax_async.config import DTYPES, LoaderConfig
from lorax_async.core.layout import ModelLayout
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.errors import LoraxError
from lorax_async.loader import AdapterLoader

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
exit status:
  0    done; for inspect: the adapter can be loaded
  1    an error, whose text is on stderr; for load: at least one adapter failed
  2    inspect: the adapter would be refused; otherwise: wrong arguments
  130  interrupted (Ctrl-C)

Results go to stdout, progress to stderr and only to a terminal.
"""

AddParser = Callable[..., argparse.ArgumentParser]

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Raises SystemExit for --help and wrong usage."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace, Screen], int] = arguments.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know every sign
    screen = Screen(sys.stdout, sys.stderr)
    try:
        if not arguments.json or sys.stderr.isatty():
            require_rich()
        return command(arguments, screen)
    except LoraxError as error:
        screen.complain(f"{type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        screen.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has had enough; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        screen.complain(str(error))
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorax-async",
        description="Loads LoRA adapters (PEFT's format) into a running LLM server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("lorax-async")
    parser.add_argument("--version", action="version", version=f"lorax-async {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands.add_parser)
    _add_load(commands.add_parser)
    _add_demo(commands.add_parser)
    return parser


def _add_inspect(add: AddParser) -> None:
    about = "show what an adapter is, and everything it would be refused for"
    parser = add("inspect", help=about, description=f"{about.capitalize()}.")
    parser.set_defaults(command=_inspect)
    parser.add_argument("path", type=Path, metavar="PATH", help="the adapter's folder")
    _add_base(parser, required=False)
    _add_json(parser)


def _add_load(add: AddParser) -> None:
    about = "load adapters, all at once, and say how long it took"
    parser = add(
        "load",
        help=about,
        description=f"{about.capitalize()}. Each is let go as soon as it has been resident, so that"
        " a small --device-bytes makes them take turns.",
    )
    parser.set_defaults(command=_load)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="an adapter's folder")
    _add_base(parser, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="stored as (default: the base's dtype)")
    parser.add_argument(
        "--device-bytes",
        type=_size,
        default="256MiB",
        metavar="N",
        help="the room for adapters: a number, or one with KiB, MiB or GiB (default: %(default)s)",
    )
    _add_json(parser)


def _add_demo(add: AddParser) -> None:
    about = "load three adapters into a small model and let them answer in one batch"
    parser = add("demo", help=about, description=f"{about.capitalize()}.")
    parser.set_defaults(command=_demo)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask (default: what all three know)"
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        metavar="DIR",
        help="the folder with pirate, shout and json (default: %(default)s, as in a checkout)",
    )
    _add_json(parser)


def _add_base(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--base",
        required=required,
        metavar="DIR",
        help="the base model's folder (its config.json suffices), or smollm2 for the demo's",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _size(text: str) -> int:
    digits = text.rstrip("KMGiB")
    unit = text[len(digits) :]
    if not digits.isascii() or not digits.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1000000, 64MiB or 1GiB")
    return int(digits) * UNITS[unit]


def _print_json(value: object) -> None:
    print(json.dumps(value))


def _layout(base: str, screen: Screen) -> ModelLayout:
    with screen.steps() as report:
        report("reading the base's config")
        folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
        return layouts.from_pretrained(folder)


# -- inspect --------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace, screen: Screen) -> int:
    base: str | None = arguments.base
    layout = _layout(base, screen) if base is not None else None
    found = inspect_adapter(arguments.path, layout, base)
    if arguments.json:
        _print_json({"loadable": found.loadable} | asdict(found))
    else:
        _show_inspection(found, screen)
    return OK if found.loadable else REFUSED


def _show_inspection(found: Inspection, screen: Screen) -> None:
    verdict, style = ("can be loaded", "green") if found.loadable else ("refused", "bold red")
    screen.say(f"{found.path}: {verdict}", style)
    for problem in found.problems:
        screen.say(f"  {problem.error}: {problem.text}")
    if found.problems_left_out:
        screen.say(f"  … and {found.problems_left_out} more")
    screen.say()
    screen.pairs(list(_facts(found)))
    if found.targets:
        columns = ("target", " modules", "layers", "rank", "scale", "in → out", "dtype", " bytes")
        screen.table(columns, [_target_row(target) for target in found.targets])


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    for name, value in found.config.items():
        if value not in (None, [], {}):
            yield name, json.dumps(value, ensure_ascii=False)
    yield "checked against", found.base or "itself only; --base checks that it fits one"
    if found.file_bytes is not None:
        yield "file", f"{found.file_bytes:,} bytes"
    if found.device_bytes is not None:
        yield "on a device", f"{found.device_bytes:,} bytes as {found.device_dtype}"


def _target_row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        str(target.modules),
        spans(target.layers),
        ", ".join(map(str, target.ranks)),
        ", ".join(f"{scale:g}" for scale in target.scales),
        ", ".join(f"{into} → {out}" for into, out in target.shapes),
        ", ".join(target.dtypes),
        f"{target.nbytes:,}",
    )


# -- load -----------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace, screen: Screen) -> int:
    config = LoaderConfig(dtype=arguments.dtype, device_bytes=arguments.device_bytes)
    layout = _layout(arguments.base, screen)
    loads = loads_of(arguments.paths)
    with screen.bars() as bars:
        run_on_uvloop(_load_all(layout, config, loads, bars))
    if arguments.json:
        _print_json({"adapters": [load_as_json(load) for load in loads]})
    else:
        _show_loads(loads, screen)
    for load in loads:
        if load.error is not None:
            screen.complain(f"{type(load.error).__name__}: {load.error}")
    return FAILED if any(load.error for load in loads) else OK


async def _load_all(
    layout: ModelLayout, config: LoaderConfig, loads: Sequence[Load], bars: Bars
) -> None:
    async with AdapterLoader(layout, config) as loader:
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


# -- demo -----------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace, screen: Screen) -> int:
    from lorax_async.commands import demo  # noqa: PLC0415 (kernels and threads that nothing else needs)

    result = demo.run_demo(arguments.adapters, arguments.prompt or demo.PROMPT, screen)
    if arguments.json:
        _print_json(demo.demo_as_json(result))
    else:
        demo.show_demo(result, screen)
    return OK
