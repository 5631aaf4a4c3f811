"""`lorax-async fetch`: adapters onto this machine's disk."""

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
    settings_of,
)
from lorax_async.cli.measure import error_as_json, run_on_uvloop
from lorax_async.cli.terminal import ProgressBars, Terminal, size
from lorax_async.config import LoaderConfig
from lorax_async.errors import LoraxError
from lorax_async.files import Reader
from lorax_async.remote.readers import FetchReader
from lorax_async.remote.remote_source import RemoteSource, open_remote_source
from lorax_async.runtime.folders import Fetches
from lorax_async.types import AdapterRef, RemoteKey, Verification

AT_ONCE = 4
"""Adapters on their way at the same time: they share the connections anyway."""

LOOK_SECONDS = 0.1
"""Between two reports of progress."""


def add_to(add: AddParser) -> None:
    more = (
        "What is named is allowed, exactly as it is named. A loader with the same caches finds it"
        " there. An interrupted fetch leaves what it has, and the next one goes on from that."
        f" {TOKENS}"
    )
    about = "bring adapters onto this machine's disk, and check them; no base model is needed"
    parser = add_command(add, "fetch", about, _fetch, more)
    parser.add_argument("ids", type=as_id, nargs="+", metavar="ID", help=ID_HELP)
    parser.add_argument(
        "--revision",
        metavar="R",
        help="of each ID: a branch, tag or commit of the hub; elsewhere a versionId or an ETag",
    )
    add_sources(parser)
    add_caches(parser)


def _fetch(arguments: argparse.Namespace, terminal: Terminal) -> int:
    refs = [at_revision(ref, arguments.revision) for ref in dict.fromkeys(arguments.ids)]
    rows = [FetchRow(ref) for ref in refs]
    config = LoaderConfig(**settings_of(arguments, refs))
    with open_remote_source(config) as elsewhere, terminal.bars() as bars:
        run_on_uvloop(fetch_all(elsewhere, rows, partial(_show_progress, bars)))
    if arguments.json:
        terminal.json({"adapters": [_as_json(row) for row in rows]})
    else:
        _show(rows, terminal)
    for row in rows:
        if row.error is not None:
            terminal.complain(f"{type(row.error).__name__}: {row.error}")
    return FAILED if any(row.error for row in rows) else OK


def _show_progress(bars: ProgressBars, number: int, row: FetchRow) -> None:
    done, wanted = row.landed
    if row.nbytes is not None:
        done = wanted = row.nbytes
    bars.update(number, row.ref.text, done, wanted, row.state)


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
        ("size", f"{size(row.nbytes)} in {row.seconds:.2f} s"),
        ("lies in", str(row.place)),
    ]


def _as_json(row: FetchRow) -> dict[str, object]:
    found = row.verification
    return {
        "id": row.ref.text,
        "source": row.ref.source,
        "state": row.state,
        "version": row.version,
        "digest": None if found is None else {"kind": found.kind, "value": found.digest},
        "bytes": row.nbytes,
        "seconds": round(row.seconds, 3),
        "place": row.place,
        "error": error_as_json(row.error),
    }


# -- several at a time -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class FetchRow:
    """One adapter's way onto the disk.

    `nbytes` are those of all its files; `seconds` is how long it took, from its own turn on.
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
    def landed(self) -> tuple[int, int | None]:
        """Bytes of weights that are here, and how many there are, if that is known yet."""
        return self._reader.landed() if isinstance(self._reader, FetchReader) else (0, None)

    async def run(self, elsewhere: RemoteSource, fetches: Fetches) -> None:
        """Fetch it, or keep the typed error."""
        began = time.perf_counter()
        try:
            self.state = "asking"
            key = await elsewhere.resolve(self.ref)
            self.version = key.version if isinstance(key, RemoteKey) else None
            with await fetches.fetch(self.ref, key, self._opened) as folder:
                self.verification, self.nbytes = folder.verification, folder.nbytes
                self.place = str(folder.path)
                self.state = "fetched" if folder.downloaded else "here already"
        except LoraxError as error:
            self.state, self.error = "failed", error.located(id=self.ref.text)
        self.seconds = time.perf_counter() - began

    def _opened(self, reader: Reader) -> None:
        self._reader = reader
        self.state = "fetching" if isinstance(reader, FetchReader) else "checking"


async def fetch_all(
    elsewhere: RemoteSource, rows: Sequence[FetchRow], show: Callable[[int, FetchRow], None]
) -> None:
    """Fetch all of them, a few at a time; call `show` now and then, and at the end."""
    turns = asyncio.Semaphore(AT_ONCE)

    fetches = Fetches(elsewhere)

    async def one(row: FetchRow) -> None:
        async with turns:
            await row.run(elsewhere, fetches)

    async def report() -> None:
        while True:
            _show_all(rows, show)
            await asyncio.sleep(LOOK_SECONDS)

    try:
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(report(), name="report")
            async with asyncio.TaskGroup() as fetching:
                for row in rows:
                    fetching.create_task(one(row), name=f"fetch {row.ref.text}")
            reporting.cancel()
    finally:
        await fetches.close(0)
    _show_all(rows, show)


def _show_all(rows: Sequence[FetchRow], show: Callable[[int, FetchRow], None]) -> None:
    for number, row in enumerate(rows):
        show(number, row)
