"""`lorax-async fetch`: adapters onto this machine's disk."""

from __future__ import annotations

import argparse
from functools import partial

from lorax_async.commands.arguments import FAILED, OK, AddParser, add_command
from lorax_async.commands.fetching import FetchRow, fetch_all
from lorax_async.commands.measure import error_as_json, run_on_uvloop
from lorax_async.commands.places import (
    ID_HELP,
    TOKENS,
    add_caches,
    add_sources,
    as_id,
    at_revision,
    settings_of,
)
from lorax_async.commands.terminal import Bars, Screen, size
from lorax_async.config import LoaderConfig
from lorax_async.io.remote.elsewhere import elsewhere_of


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


def _fetch(arguments: argparse.Namespace, screen: Screen) -> int:
    refs = [at_revision(ref, arguments.revision) for ref in dict.fromkeys(arguments.ids)]
    rows = [FetchRow(ref) for ref in refs]
    config = LoaderConfig(**settings_of(arguments, refs))
    with elsewhere_of(config) as elsewhere, screen.bars() as bars:
        run_on_uvloop(fetch_all(elsewhere, rows, partial(_show_progress, bars)))
    if arguments.json:
        screen.json({"adapters": [_as_json(row) for row in rows]})
    else:
        _show(rows, screen)
    for row in rows:
        if row.error is not None:
            screen.complain(f"{type(row.error).__name__}: {row.error}")
    return FAILED if any(row.error for row in rows) else OK


def _show_progress(bars: Bars, number: int, row: FetchRow) -> None:
    done, wanted = row.landed
    if row.nbytes is not None:
        done = wanted = row.nbytes
    bars.update(number, row.ref.text, done, wanted, row.state)


def _show(rows: list[FetchRow], screen: Screen) -> None:
    for row in rows:
        style = "bold red" if row.error else "green"
        screen.say(f"{row.ref.text}: {row.state}", style)
        if row.error is None:
            screen.pairs(_facts(row))


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
