"""`lorax-async timeline`: a trace as one picture; and how other commands record one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorax_async.commands.arguments import OK, AddParser, add_command
from lorax_async.commands.terminal import Screen
from lorax_async.errors import ConfigError
from lorax_async.loader import AdapterLoader
from lorax_async.tracing.picture import MOST_BYTES, Picture, picture_of, read_trace
from lorax_async.tracing.words import summary


def add_to(add: AddParser) -> None:
    about = "draw a trace: what came when, and whether copies and computing overlap"
    more = "Traces come from loader.trace(), and from commands with --trace."
    parser = add_command(add, "timeline", about, _timeline, more)
    parser.add_argument("file", type=Path, metavar="FILE", help="a trace, in Chrome's format")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="the picture: a file whose name ends in .html, .svg, or .png (which needs matplotlib)",
    )
    for option, which in (("--from", "first"), ("--until", "last")):
        parser.add_argument(
            option,
            dest=which,
            type=float,
            metavar="MS",
            help=f"the {which} millisecond that is drawn (default: the trace's)",
        )


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="record what happens when, for `lorax-async timeline FILE`",
    )


@contextmanager
def traced(loader: AdapterLoader, path: Path | None) -> Iterator[None]:
    """Record the block, however it ends, if there is a path to write the trace to.

    Raises `OSError`: before the block, where it can be known then, and never in place of its error.
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


def draw(picture: Picture, path: Path, title: str) -> None:
    """As what the path's suffix says. Raises `ConfigError` for others, and `OSError`."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        from lorax_async.tracing.png import write_png  # noqa: PLC0415

        write_png(picture, path, title)
        return
    from lorax_async.tracing.svg import as_html, as_svg  # noqa: PLC0415

    if suffix not in {".html", ".svg"}:
        raise ConfigError(f"{path.name} ends in none of .html, .svg, .png")
    text = as_svg(picture) if suffix == ".svg" else as_html(picture, title)
    path.write_text(text, encoding="utf-8")


def _timeline(arguments: argparse.Namespace, screen: Screen) -> int:
    with arguments.file.open("rb") as file:  # which may be anything, and endless
        events, dropped = read_trace(file.read(MOST_BYTES + 1))
    picture = picture_of(events, arguments.first, arguments.last, dropped=dropped)
    draw(picture, arguments.out, arguments.file.stem)
    if arguments.json:
        computed, overlapped = picture.overlap()
        lanes = [{"row": lane.row, "lane": lane.title} for lane in picture.lanes]
        found = {"computed_ms": round(computed, 3), "before_last_copy_ms": round(overlapped, 3)}
        screen.json({
            "picture": str(arguments.out), "lanes": lanes, **found, "dropped": dropped
        })  # fmt: skip
    else:
        many = len(picture.lanes)
        plural = "" if many == 1 else "s"
        screen.say(f"{arguments.out}: {many} lane{plural}; {summary(picture)}")
    return OK
