"""`lorax-async fetch`: download adapters into the disk cache and verify them."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lorax_async.cli.arguments import (
    FAILED,
    ID_HELP,
    OK,
    TOKENS,
    AddParser,
    add_caches,
    add_command,
    add_sources,
    as_id,
    at_revision,
    loader_settings,
)
from lorax_async.cli.load import error_as_json, run_on_uvloop
from lorax_async.cli.terminal import ProgressBars, Terminal, format_size
from lorax_async.config import LoaderConfig
from lorax_async.errors import LoraxError
from lorax_async.files import Reader
from lorax_async.remote.readers import FetchReader
from lorax_async.remote.remote_source import RemoteSource, open_remote_source
from lorax_async.runtime.folders import Fetches
from lorax_async.types import AdapterRef, RemoteKey, Verification

AT_ONCE = 4
"""Concurrent fetches: they share the connections."""

REPORT_SECONDS = 0.1
"""Seconds between two reports of progress."""


def add_to(add: AddParser) -> None:
    more = (
        "Every ID is allowed as it stands. Loaders with the same caches use the fetched files. An"
        f" interrupted fetch is resumed by the next one. {TOKENS}"
    )
    about = "download adapters into the disk cache and verify them; no base model is needed"
    parser = add_command(add, "fetch", about, _fetch, more)
    parser.add_argument("ids", type=as_id, nargs="+", metavar="ID", help=ID_HELP)
    parser.add_argument(
        "--revision",
        metavar="R",
        help="every ID's version: on the hub a branch, tag or commit, else a versionId or an ETag",
    )
    add_sources(parser)
    add_caches(parser)


def _fetch(arguments: argparse.Namespace, terminal: Terminal) -> int:
    refs = [at_revision(ref, arguments.revision) for ref in dict.fromkeys(arguments.ids)]
    rows = [FetchRow(ref) for ref in refs]
    config = LoaderConfig(**loader_settings(arguments, refs))
    with open_remote_source(config) as source, terminal.bars() as bars:
        run_on_uvloop(fetch_all(source, rows, partial(_show_progress, bars)))
    if arguments.json:
        terminal.json({"adapters": [_row_as_json(row) for row in rows]})
    else:
        _show(rows, terminal)
    for row in rows:
        if row.error is not None:
            terminal.complain(f"{type(row.error).__name__}: {row.error}")
    return FAILED if any(row.error for row in rows) else OK


def _show_progress(bars: ProgressBars, number: int, row: FetchRow) -> None:
    done, total = row.downloaded
    if row.nbytes is not None:
        done = total = row.nbytes
    bars.update(number, row.ref.text, done, total, row.state)


def _show(rows: list[FetchRow], terminal: Terminal) -> None:
    for row in rows:
        style = "bold red" if row.error else "green"
        terminal.say(f"{row.ref.text}: {row.state}", style)
        if row.error is None:
            terminal.pairs(_facts(row))


def _facts(row: FetchRow) -> list[tuple[str, str]]:
    assert row.nbytes is not None
    assert row.verification is not None
    kind, digest = row.verification.kind, row.verification.digest
    return [
        ("from", f"{row.ref.source}, version {row.version}"),
        ("digest", f"{kind} {digest}"),
        ("size", f"{format_size(row.nbytes)} in {row.seconds:.2f} s"),
        ("folder", str(row.place)),
    ]


def _row_as_json(row: FetchRow) -> dict[str, object]:
    verification = row.verification
    return {
        "id": row.ref.text,
        "source": row.ref.source,
        "state": row.state,
        "version": row.version,
        "digest": (
            None
            if verification is None
            else {"kind": verification.kind, "value": verification.digest}
        ),
        "bytes": row.nbytes,
        "seconds": round(row.seconds, 3),
        "place": row.place,
        "error": error_as_json(row.error),
    }


# -- several at a time -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class FetchRow:
    """The progress and result of one fetch.

    `nbytes` counts all files. `seconds` excludes waiting for other fetches. `place` is the folder.
    """

    ref: AdapterRef
    state: str = "waiting"
    version: str | None = None
    verification: Verification | None = None
    nbytes: int | None = None
    place: str | None = None
    seconds: float = 0.0
    error: LoraxError | None = None
    _reader: Reader | None = None

    @property
    def downloaded(self) -> tuple[int, int | None]:
        """The bytes of weights on the disk, and their total, or None if it is unknown."""
        return self._reader.landed() if isinstance(self._reader, FetchReader) else (0, None)

    async def run(self, source: RemoteSource, fetches: Fetches) -> None:
        """Fetch the adapter; store a typed error in `error` instead of raising it."""
        began = time.perf_counter()
        try:
            self.state = "resolving"
            key = await source.resolve(self.ref)
            self.version = key.version if isinstance(key, RemoteKey) else None
            with await fetches.fetch(self.ref, key, self._set_reader) as folder:
                self.verification, self.nbytes = folder.verification, folder.nbytes
                self.place = str(folder.path)
                self.state = "fetched" if folder.downloaded else "here already"
        except LoraxError as error:
            self.state, self.error = "failed", error.located(id=self.ref.text)
        self.seconds = time.perf_counter() - began

    def _set_reader(self, reader: Reader) -> None:
        self._reader = reader
        self.state = "fetching" if isinstance(reader, FetchReader) else "checking"


async def fetch_all(
    source: RemoteSource, rows: Sequence[FetchRow], show: Callable[[int, FetchRow], None]
) -> None:
    """Fetch all rows, `AT_ONCE` at a time.

    Call `show` for each row every `REPORT_SECONDS`, and at the end.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    fetches = Fetches(source)

    async def run(row: FetchRow) -> None:
        async with slots:
            await row.run(source, fetches)

    async def report() -> None:
        while True:
            _show_all(rows, show)
            await asyncio.sleep(REPORT_SECONDS)

    try:
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(report(), name="report")
            async with asyncio.TaskGroup() as fetching:
                for row in rows:
                    fetching.create_task(run(row), name=f"fetch {row.ref.text}")
            reporting.cancel()
    finally:
        await fetches.close(0)
    _show_all(rows, show)


def _show_all(rows: Sequence[FetchRow], show: Callable[[int, FetchRow], None]) -> None:
    for number, row in enumerate(rows):
        show(number, row)
