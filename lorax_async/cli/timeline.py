"""`lorax-async timeline`: draw a trace, as an image by matplotlib or as a page with `timeline.js`.

The server's page draws with the same script. A trace file may come from a stranger: texts are never
markup or formulas, and malformed events are refused. Also the option `--trace` of commands that
record one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_async.cli.command_line import ABOUTS, OK, AddParser, Terminal, add_command
from lorax_async.errors import ConfigError, UsageError, install_command

if TYPE_CHECKING:
    from lorax_async.loader import AdapterLoader

IMAGES = (".png", ".svg")


def add_to(add: AddParser) -> None:
    about = ABOUTS["timeline"]
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


# -- drawing ---------------------------------------------------------------------------------------

MAX_BYTES = 256 << 20
MAX_BOXES = 200_000
MAX_LANES = 400
"""Of an image: 10,000 pixels. matplotlib takes minutes for more, and stops at 65,535."""

SCRIPT = Path(__file__).parents[1] / "server" / "page" / "timeline.js"
LEGEND = "One colour per layer, blue (first) to orange (last); pale red: a wait; grey: no layer."

_MAX_NAME_LENGTH = 120
_MAX_NUMBER = 1e18
"""Microseconds, or a sort index: sums of such numbers are still finite."""

_NOT_TEXT = re.compile("[^\t -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Event = Mapping[str, Any]


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Box:
    """One span, in milliseconds, inside of `depth` others of its lane.

    `layer` chooses the colour; None if the span belongs to no layer.
    """

    start: float
    stop: float
    name: str
    depth: int
    layer: int | None

    @property
    def waits(self) -> bool:
        return self.name.startswith("wait")


@dataclass(frozen=True, slots=True)
class Lane:
    """Boxes that are disjoint, or one inside the other."""

    row: str
    title: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Lanes from top to bottom, and the part of the trace they show.

    `events` are those drawn, and the metadata that names their lanes. `dropped` spans were lost
    to the recording's limit.
    """

    lanes: tuple[Lane, ...]
    start: float
    stop: float
    events: tuple[Event, ...]
    dropped: int = 0

    def overlap(self) -> tuple[float, float]:
        """Return milliseconds of computing, and how many of these precede the last copy's end.

        What two threads compute at once counts once.
        """
        boxes = [(lane.row, box) for lane in self.lanes for box in lane.boxes]
        last = max((box.stop for row, box in boxes if row == "copies"), default=self.start)
        computed = overlapped = 0.0
        done = self.start
        for box in sorted((box for row, box in boxes if row == "compute"), key=lambda b: b.start):
            start, stop = max(box.start, done), min(box.stop, self.stop)
            if box.layer is not None and not box.waits and start < stop:
                computed += stop - start
                overlapped += max(0.0, min(stop, last) - start)
                done = stop
        return computed, overlapped

    def summary(self) -> str:
        """Say how much computing overlaps with copies, and whether spans are missing."""
        computed, overlapped = self.overlap()
        length = f"{self.stop - self.start:,.1f} ms"
        gone = f"; the oldest {self.dropped:,} spans are gone" if self.dropped else ""
        if not computed:
            return f"{length}; no layer was computed{gone}"
        return (
            f"{length}; layers were computed for {computed:,.1f} ms, of which {overlapped:,.1f} ms"
            f" ({100 * overlapped / computed:.0f} %) before the last copy had ended{gone}"
        )


def read_trace(data: bytes) -> tuple[list[Event], int]:
    """Return the events of a file in Chrome's format, and how many spans it says are gone.

    Raises `UsageError` for other files and beyond `MAX_BYTES`.
    """
    if len(data) > MAX_BYTES:
        raise UsageError(f"the trace is larger than {MAX_BYTES >> 20} MiB; record less")
    try:
        # A page could not read NaN, nor the Infinity that 1e999 becomes.
        found = json.loads(
            data,
            parse_constant=lambda _: None,
            parse_float=lambda text: number if isfinite(number := float(text)) else None,
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the file is no trace: {error}") from None
    events, about = found, None
    if isinstance(found, dict):
        events, about = found.get("traceEvents"), found.get("otherData")
    if not isinstance(events, list) or not all(isinstance(each, dict) for each in events):
        raise UsageError("the file is no trace: it has no traceEvents")
    dropped = about.get("dropped") if isinstance(about, dict) else 0
    return events, dropped if isinstance(dropped, int) and _is_number(dropped) else 0


def drawing_of(
    events: Sequence[Event],
    start: float | None = None,
    stop: float | None = None,
    *,
    dropped: int = 0,
) -> Drawing:
    """Lay out the complete events that touch the milliseconds from `start` to `stop`.

    Raises `UsageError` if there are none or over `MAX_BOXES`, or if one is malformed.
    """
    _require_part(start, stop)
    names = _metadata(events)
    lanes: dict[tuple[Any, Any], list[Event]] = {}
    for event in events:
        if event.get("ph") == "X":
            _require_complete(event)
            begin, end = _milliseconds(event)
            if (start is None or end >= start) and (stop is None or begin <= stop):
                lanes.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    shown = [event for lane in lanes.values() for event in lane]
    if not shown:
        raise UsageError("the trace has nothing to draw there")
    if len(shown) > MAX_BOXES:
        raise UsageError(
            f"{len(shown):,} spans are over the limit of {MAX_BOXES:,}; draw a part of the trace"
        )

    def order(place: tuple[Any, Any]) -> list[tuple[float, str]]:
        pid, tid = place
        process = names.get(("process_sort_index", pid, None))
        thread = names.get(("thread_sort_index", pid, tid))
        return [(_number(process), str(pid)), (_number(thread), str(tid))]

    return Drawing(
        tuple(
            Lane(
                _plain_text(names.get(("process_name", pid, None), f"process {pid}")),
                _plain_text(names.get(("thread_name", pid, tid), f"thread {tid}")),
                tuple(_boxes(lanes[pid, tid])),
            )
            for pid, tid in sorted(lanes, key=order)
        ),
        min(begin for begin, _ in map(_milliseconds, shown)) if start is None else start,
        max(end for _, end in map(_milliseconds, shown)) if stop is None else stop,
        tuple(each for each in events if _is_metadata(each)) + tuple(shown),
        dropped,
    )


def _require_part(start: float | None, stop: float | None) -> None:
    for bound in (start, stop):
        if bound is not None and not _is_number(bound):
            raise UsageError(f"a bound of the part must be a number of milliseconds, not {bound!r}")
    if start is not None and stop is not None and not start < stop:
        raise UsageError(
            f"the part must end after its beginning; it is from {start:g} to {stop:g} ms"
        )


def _require_complete(event: Event) -> None:
    for name in ("ts", "dur"):
        if not _is_number(event.get(name)):
            raise UsageError(f"an event of the trace has no {name}")
    if event["dur"] < 0:
        raise UsageError("an event of the trace ends before it begins")
    if not _has_place(event):
        raise UsageError("an event of the trace has no pid and tid")


def _milliseconds(event: Event) -> tuple[float, float]:
    return event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3


def _has_place(event: Event) -> bool:
    """Return whether pid and tid are numbers, names or missing."""
    return all(isinstance(event.get(name), int | float | str | None) for name in ("pid", "tid"))


def _is_metadata(event: Event) -> bool:
    args = event.get("args")
    return event.get("ph") == "M" and isinstance(args, dict) and _has_place(event)


def _metadata(events: Iterable[Event]) -> dict[tuple[str, Any, Any], Any]:
    """Return names and sort indices of processes (without tid) and threads."""
    found: dict[tuple[str, Any, Any], Any] = {}
    for event in events:
        if _is_metadata(event):
            what = str(event.get("name"))
            tid = None if what.startswith("process") else event.get("tid")
            found[what, event.get("pid"), tid] = next(iter(event["args"].values()), None)
    return found


def _boxes(events: Iterable[Event]) -> Iterator[Box]:
    """Yield boxes by start; an outer one comes before those in it."""
    ends: list[float] = []
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        start, stop = _milliseconds(event)
        while ends and ends[-1] <= start + 1e-9:
            ends.pop()
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        groups = args.get("groups")
        layer = args.get("layer", groups[0] if isinstance(groups, list) and groups else None)
        layer = layer if isinstance(layer, int) and _is_number(layer) else None
        yield Box(start, stop, _plain_text(event.get("name", "")), len(ends), layer)
        ends.append(stop)


def _plain_text(value: Any) -> str:
    return _NOT_TEXT.sub("�", str(value)[:_MAX_NAME_LENGTH])


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _MAX_NUMBER  # false for NaN


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0


# -- a page ----------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.4 system-ui,sans-serif;margin:12px}}
h1{{font-size:1.1rem;margin:0 0 4px}}p{{margin:4px 0}}button{{font:inherit;min-width:44px}}</style>
</head>
<body><h1>{title}</h1><p id="summary"></p><div id="timeline"></div>
<script type="application/json" id="trace">{trace}</script>
<script type="module">
{script}
const at = (id) => document.getElementById(id);
at("summary").textContent = show(at("timeline"), JSON.parse(at("trace").textContent), {part});
</script></body></html>
"""


def as_html(drawing: Drawing, title: str) -> str:
    """Return a page that needs nothing else and draws the events with `timeline.js`."""
    trace = {"traceEvents": drawing.events, "otherData": {"dropped": drawing.dropped}}
    return _PAGE.format(
        title=escape(_plain_text(title)),
        trace=json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c"),
        script=SCRIPT.read_text(encoding="utf-8"),
        part=json.dumps({"from": drawing.start, "until": drawing.stop}),
    )


# -- an image --------------------------------------------------------------------------------------

_NARROWEST = 0.001
_LETTER = 0.0055
"""Shares of the drawn time: the least width of a box, and about that of a letter."""


def write_image(drawing: Drawing, path: Path, title: str) -> None:
    """Write a PNG or an SVG, as the suffix says. Blocks.

    Raises `ConfigError` if matplotlib is missing, `UsageError` beyond `MAX_LANES`, and `OSError`.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - heavy, and only here
    except ImportError:
        raise ConfigError(
            f"an image needs matplotlib, HTML nothing; {install_command('plot')}"
        ) from None
    lanes = drawing.lanes
    if len(lanes) > MAX_LANES:
        raise UsageError(f"{len(lanes):,} lanes are too many for an image; draw a part or HTML")
    height = 0.21 * (len(lanes) + len({lane.row for lane in lanes}))
    figure = Figure(figsize=(12, 1.3 + height), layout="constrained")
    axes = figure.subplots()
    layers = [box.layer for lane in lanes for box in lane.boxes if box.layer is not None] or [0]
    y, row, ticks = 0.0, "", list[tuple[float, str]]()
    for lane in lanes:
        y += 1.0 if lane.row == row else 1.5
        row = lane.row
        name = lane.title[:20]
        ticks.append((y, name if name.startswith(row) else f"{row}: {name}"))
        _draw_lane(axes, lane, y, drawing.stop - drawing.start, (min(layers), max(layers)))
    axes.set_yticks(
        [tick for tick, _ in ticks], [name for _, name in ticks], fontsize=7, parse_math=False
    )
    axes.set_ylim(y + 0.8, 0.5)
    axes.set_xlim(drawing.start, max(drawing.stop, drawing.start + 1e-3))
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    heading = f"{_plain_text(title)}\n{drawing.summary()}. {LEGEND}"
    axes.set_title(heading, fontsize=8, loc="left", wrap=True, parse_math=False)
    figure.savefig(path, dpi=110)


def _draw_lane(axes: Any, lane: Lane, y: float, length: float, layers: tuple[int, int]) -> None:
    for depth in range(3):
        boxes = [box for box in lane.boxes if min(box.depth, 2) == depth]
        high = 0.84 - 0.22 * depth
        axes.broken_barh(
            [(box.start, max(box.stop - box.start, length * _NARROWEST)) for box in boxes],
            (y - high / 2, high),
            facecolors=[_colour(box, lane.row, layers) for box in boxes],
            edgecolors="white",
            linewidth=0.3,
        )
    style = {"fontsize": 6.5, "va": "center_baseline", "clip_on": True, "parse_math": False}
    for box in lane.boxes:
        if box.layer is None and box.stop - box.start > length * _LETTER * len(box.name):
            axes.text(box.start + length * _LETTER / 2, y, box.name, **style)


_GREYS = {
    "requests": "#6b7a90",
    "files": "#8d99ab",
    "connections": "#a3aab5",
    "layers": "#cfd6e0",
    "compute": "#b9c2cf",
}


def _colour(box: Box, row: str, layers: tuple[int, int]) -> tuple[float, float, float] | str:
    """Return a layer's colour: from blue to orange, and for the colour-blind from dark to light."""
    if box.waits:
        return "#f1c9c9"
    if box.layer is None:
        return "#c9b8e8" if box.name == "connect" else _GREYS.get(row, "#9aa5b4")
    place = (box.layer - layers[0]) / max(1, layers[1] - layers[0])
    return hls_to_rgb(0.62 - 0.57 * place, 0.42 + 0.16 * place, 0.62)
