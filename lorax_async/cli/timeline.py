"""`lorax-async timeline`: write a page that draws a trace with the script of the server's page.

A trace may come from a stranger: its texts are never markup.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from math import inf, isfinite
from pathlib import Path
from typing import Any

from lorax_async.cli.command_line import ABOUTS, OK, AddParser, Terminal, add_command
from lorax_async.errors import ConfigError, UsageError

MAX_BYTES = 256 << 20
SCRIPT = Path(__file__).parents[1] / "server" / "page" / "timeline.js"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.4 system-ui,sans-serif;margin:12px}}
h1{{font-size:1.1rem;margin:0 0 4px}}p{{margin:4px 0}}button{{font:inherit;min-width:44px}}</style>
</head><body><h1>{title}</h1><p id="summary"></p><div id="timeline"></div>
<script type="application/json" id="trace">{trace}</script>
<script type="module">
{script}
const at = (id) => document.getElementById(id);
at("summary").textContent = show(at("timeline"), JSON.parse(at("trace").textContent), {part});
</script></body></html>
"""


def add_to(add: AddParser) -> None:
    more = "Record one with loader.trace(), or with --trace of other commands."
    parser = add_command(add, "timeline", ABOUTS["timeline"], _timeline, more)
    parser.add_argument("file", type=Path, metavar="FILE", help="a trace, in Chrome's format")
    help = "an .html file, which needs nothing else"
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=help)
    for option, which in (("--from", "first"), ("--until", "last")):
        help = f"the {which} millisecond to draw (default: the trace's)"
        parser.add_argument(option, dest=which, type=float, metavar="MS", help=help)


def _timeline(arguments: argparse.Namespace, terminal: Terminal) -> int:
    out, first, last = arguments.out, arguments.first, arguments.last
    if out.suffix.lower() != ".html":
        raise ConfigError(
            f"{out.name} does not end in .html, and images are no longer drawn: write an .html"
            " file, open it in a browser and save a picture there"
        )
    if not 0 <= (first or 0) < (inf if last is None else last) or last == inf:
        raise UsageError("--from and --until must be milliseconds, the first before the last")
    with arguments.file.open("rb") as file:  # may be endless, as a device
        trace = read_trace(file.read(MAX_BYTES + 1))
    out.write_text(as_html(trace, arguments.file.stem, first, last), encoding="utf-8")
    count = sum(event.get("ph") in {"X", "b"} for event in trace["traceEvents"])
    if arguments.json:
        terminal.json({"picture": str(out), "spans": count})
    else:
        terminal.say(f"{out}: {count:,} span{'s'[: count != 1]}; open it in a browser")
    return OK


def read_trace(data: bytes) -> dict[str, Any]:
    """Return a trace in Chrome's format as an object. Raises `UsageError` if it is not one."""
    if len(data) > MAX_BYTES:
        raise UsageError(f"the trace is larger than {MAX_BYTES >> 20} MiB; record less")

    def finite(text: str) -> float | None:  # a page reads neither NaN nor what 1e999 becomes
        return number if isfinite(number := float(text)) else None

    try:
        trace = json.loads(data, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the file is not a trace: {error}") from None
    trace = {"traceEvents": trace} if isinstance(trace, list) else trace
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list) or not all(isinstance(each, dict) for each in events):
        raise UsageError("the file is not a trace: it has no traceEvents")
    return trace


def as_html(trace: dict[str, Any], title: str, first: float | None, last: float | None) -> str:
    """Return a page that draws the trace and needs nothing else."""
    return _PAGE.format(
        title=escape(title.encode("utf-8", "replace").decode()),
        trace=json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c"),
        script=SCRIPT.read_text(encoding="utf-8"),
        part=json.dumps({"from": first, "until": last}),
    )
