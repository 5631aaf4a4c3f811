"""`lorax-async timeline`: draw a trace; and the option `--trace` of commands that record one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorax_async.cli.command_line import OK, AddParser, Terminal, add_command
from lorax_async.errors import ConfigError
from lorax_async.loader import AdapterLoader
from lorax_async.tracing.drawing import MAX_BYTES, as_html, drawing_of, read_trace, write_image

IMAGES = (".png", ".svg")


def add_to(add: AddParser) -> None:
    about = "draw a trace: when each layer was copied and computed, and how much these overlap"
    more = "Record one with loader.trace(), or with --trace of other commands."
    parser = add_command(add, "timeline", about, _timeline, more)
    parser.add_argument("file", type=Path, metavar="FILE", help="a trace, in Chrome's format")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="an .html file, or a .png or .svg file (which need matplotlib)",
    )
    for option, which in (("--from", "first"), ("--until", "last")):
        parser.add_argument(
            option,
            dest=which,
            type=float,
            metavar="MS",
            help=f"the {which} millisecond to draw (default: the trace's)",
        )


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace to FILE; draw it with `lorax-async timeline FILE`",
    )


@contextmanager
def record_trace(loader: AdapterLoader, path: Path | None) -> Iterator[None]:
    """Trace the block, however it ends, and write the trace to `path` unless that is None.

    Raises `OSError`, before the block if possible, and never in place of the block's own error.
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


def _timeline(arguments: argparse.Namespace, terminal: Terminal) -> int:
    out, title = arguments.out, arguments.file.stem
    suffix = out.suffix.lower()
    if suffix not in {".html", *IMAGES}:
        raise ConfigError(f"{out.name} ends in none of .html, .png and .svg")
    with arguments.file.open("rb") as file:  # may be endless, as a device
        events, dropped = read_trace(file.read(MAX_BYTES + 1))
    drawing = drawing_of(events, arguments.first, arguments.last, dropped=dropped)
    if suffix in IMAGES:
        write_image(drawing, out, title)
    else:
        out.write_text(as_html(drawing, title), encoding="utf-8")
    if arguments.json:
        computed, overlapped = drawing.overlap()
        terminal.json({
            "picture": str(out),
            "lanes": [{"row": lane.row, "lane": lane.title} for lane in drawing.lanes],
            "computed_ms": round(computed, 3),
            "before_last_copy_ms": round(overlapped, 3),
            "dropped": dropped,
        })  # fmt: skip
    else:
        count = len(drawing.lanes)
        plural = "" if count == 1 else "s"
        terminal.say(f"{out}: {count} lane{plural}; {drawing.summary()}")
    return OK
