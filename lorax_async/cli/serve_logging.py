"""The log of `lorax-async serve`: where its lines go, and in which form."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from lorax_async.cli.command_line import repeated

LEVELS = ("debug", "info", "warning", "error")
PULSE_SECONDS = 4.0
"""A step of the start that takes longer is logged again, and again."""

_logger = logging.getLogger("lorax_async.server")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event or message, and the record's values."""

    def format(self, record: logging.LogRecord) -> str:
        values = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if "event" not in values:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | values, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Local time, level and message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")


def add_logging(parser: argparse.ArgumentParser) -> None:
    """Add --log-level and --log-format."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="least level of lines on stderr: debug has probes, too (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="a line is text, or a JSON object (default: %(default)s)",
    )


@contextmanager
def logging_to(stream: TextIO, level: str, form: str) -> Iterator[None]:
    """Write the process's log to `stream`: our lines from `level` on, warnings of all others."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root, ours = logging.getLogger(), logging.getLogger("lorax_async")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(level.upper())
    try:
        yield
    finally:
        ours.setLevel(before)
        root.removeHandler(handler)


@contextmanager
def log_step(step: str) -> Iterator[None]:
    """Log a step of the start: that it begins, that it goes on, and how long it took."""
    began = time.monotonic()

    def log(what: str) -> None:
        seconds = round(time.monotonic() - began, 1)
        extra = {"event": "starting", "step": step, "state": what, "seconds": seconds}
        message = f"starting: {step}" + ("" if what == "began" else f", {what}, {seconds} s")
        _logger.info("%s", message, extra=extra)

    log("began")
    with repeated(lambda: log("goes on"), PULSE_SECONDS):
        yield
    log("done")
