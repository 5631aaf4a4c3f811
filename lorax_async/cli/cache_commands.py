"""`lorax-async fetch` and `lorax-async cache`: fill, list, verify and clean the adapter cache."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_async.cache.base import EntryRecord
from lorax_async.cache.disk_cache import DiskCache, Listed, Verified, gc, ls, rm, verify
from lorax_async.cli.command_line import (
    ABOUTS,
    FAILED,
    ID_HELP,
    OK,
    SIZE_HELP,
    TOKENS,
    AddParser,
    Command,
    Terminal,
    add_cache_folder,
    add_caches,
    add_command,
    add_sources,
    as_id,
    as_size,
    error_as_json,
    format_age,
    format_size,
    loader_settings,
    run_on_uvloop,
)
from lorax_async.config import StoreConfig
from lorax_async.errors import InvalidAdapterIdError, LoraxError, UsageError, shorten
from lorax_async.ids import parse_ref
from lorax_async.lifecycle.policies import policy
from lorax_async.types import MAX_SECONDS, AdapterRef, RemoteKey

if TYPE_CHECKING:
    from lorax_async.runtime.folders import AdapterFolder
    from lorax_async.store import AdapterStore

AT_ONCE = 4
"""Concurrent fetches: they share the connections."""

REPORT_SECONDS = 0.1
"""Seconds between two reports of progress."""

SHOWN_DIGITS = 12
"""Digits of an entry's name, and of a version, in tables."""

_NAME = re.compile(r"[0-9a-f]{4,64}|[0-9a-f]{64}\.[0-9a-z.-]*")


def add_to(add: AddParser) -> None:
    more = (
        "Every ID is allowed as it stands. Loaders with the same caches use the fetched files. An"
        f" interrupted fetch is resumed by the next one. {TOKENS}"
    )
    about = ABOUTS["fetch"]
    parser = add_command(add, "fetch", about, _fetch, more)
    parser.add_argument("ids", type=as_id, nargs="+", metavar="ID", help=ID_HELP)
    parser.add_argument(
        "--revision",
        metavar="R",
        help="every ID's version: on the hub a branch, tag or commit, else a versionId or an ETag",
    )
    add_sources(parser)
    add_caches(parser)

    about = ABOUTS["cache"]
    more = (
        "These commands never create the folder: a missing one is an empty cache. Loaders may use"
        " it at the same time. For the standard hub cache, use huggingface_hub's `hf cache`."
    )
    parser = add("cache", help=about, description=f"{about.capitalize()}. {more}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND").add_parser

    def command(name: str, about: str, run: Command) -> argparse.ArgumentParser:
        parser = add_command(commands, name, about, run)
        add_cache_folder(parser, "--dir")
        return parser

    command("ls", "list entries and partial downloads, last used first", _ls)
    command("verify", "hash every entry again and remove damaged ones", _verify)
    removing = command("rm", "remove entries and partial downloads that are not in use", _rm)
    removing.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="an entry's name, a unique prefix of four or more digits, or an adapter's id: all its"
        " versions, or with @COMMIT that one",
    )
    cleaning = command("gc", "remove interrupted downloads, leftovers and damaged entries", _gc)
    cleaning.add_argument(
        "--bytes",
        type=as_size,
        metavar="N",
        help=f"also remove entries over this budget, least recently used first: {SIZE_HELP}",
    )


# -- fetch ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class FetchRow:
    """The progress and result of one fetch. `seconds` excludes waiting for other fetches."""

    ref: AdapterRef
    state: str = "waiting"
    version: str | None = None
    folder: AdapterFolder | None = None
    seconds: float = 0.0
    error: LoraxError | None = None
    arrived: tuple[int, int | None] = 0, None
    """Bytes on disk and their total, when `progress` last looked."""

    async def run(self, store: AdapterStore) -> None:
        """Fetch the adapter; store a typed error in `error` instead of raising it."""
        began = time.perf_counter()
        self.state = "resolving"
        try:
            async with store.checkout(self.ref) as self.folder:
                self.version = self.folder.version
                self.state = "fetched" if self.folder.downloaded else "here already"
        except LoraxError as error:
            self.state, self.error = "failed", error.located(id=self.ref.text)
            self.version = error.key.version if isinstance(error.key, RemoteKey) else None
        self.seconds = time.perf_counter() - began

    def progress(self, store: AdapterStore) -> tuple[int, int | None, str]:
        """Return the bytes of weights on disk, their total or None if unknown, and the state."""
        if self.folder is not None:
            return self.folder.nbytes, self.folder.nbytes, self.state
        found = store.placement().get(self.ref.text) if self.state == "resolving" else None
        if found is None:
            return *self.arrived, self.state
        self.arrived = found.nbytes, found.total
        return *self.arrived, found.state

    def as_json(self) -> dict[str, object]:
        folder = self.folder
        checked = None if folder is None else folder.verification
        return {
            "id": self.ref.text,
            "source": self.ref.source,
            "state": self.state,
            "version": self.version,
            "digest": checked and {"kind": checked.kind, "value": checked.digest},
            "bytes": folder and folder.nbytes,
            "seconds": round(self.seconds, 3),
            "place": None if folder is None else str(folder.path),
            "error": error_as_json(self.error),
        }


Show = Callable[[int, str, int, int | None, str], None]
"""Takes a row's number and id, the bytes on disk, their total or None, and the state."""


async def fetch_all(config: StoreConfig, rows: Sequence[FetchRow], show: Show) -> None:
    """Fetch all rows, `AT_ONCE` at a time.

    Call `show` for each row every `REPORT_SECONDS`, and at the end.
    """
    from lorax_async.store import AdapterStore  # noqa: PLC0415 (slow: it imports torch)

    store, slots = AdapterStore(config), asyncio.Semaphore(AT_ONCE)

    async def run(row: FetchRow) -> None:
        async with slots:
            await row.run(store)

    def show_all() -> None:
        for number, row in enumerate(rows):
            show(number, row.ref.text, *row.progress(store))

    async def report() -> None:
        while True:
            show_all()
            await asyncio.sleep(REPORT_SECONDS)

    async with store, asyncio.TaskGroup() as group:
        reporting = group.create_task(report(), name="report")
        async with asyncio.TaskGroup() as fetching:
            for row in rows:
                fetching.create_task(run(row), name=f"fetch {row.ref.text}")
        reporting.cancel()
        show_all()


def _fetch(arguments: argparse.Namespace, terminal: Terminal) -> int:
    refs = [_at_revision(ref, arguments.revision) for ref in dict.fromkeys(arguments.ids)]
    rows = [FetchRow(ref) for ref in refs]
    config = StoreConfig(**loader_settings(arguments, refs), timeout=MAX_SECONDS)
    with terminal.bars() as bars:
        run_on_uvloop(fetch_all(config, rows, bars.update))
    if arguments.json:
        terminal.json({"adapters": [row.as_json() for row in rows]})
    else:
        for row in rows:
            terminal.say(f"{row.ref.text}: {row.state}", "bold red" if row.error else "green")
            if row.folder is not None:
                nbytes, checked = row.folder.nbytes, row.folder.verification
                facts = [("from", f"{row.ref.source}, version {row.version}")]
                facts += [("digest", f"{checked.kind} {checked.digest}")]
                facts += [("size", f"{format_size(nbytes)} in {row.seconds:.2f} s")]
                terminal.pairs([*facts, ("folder", str(row.folder.path))])
    return terminal.report_errors(row.error for row in rows)


def _at_revision(ref: AdapterRef, revision: str | None) -> AdapterRef:
    """Return `ref` at `revision`, or unchanged if that is None.

    Raises `InvalidAdapterIdError` if the id has another revision.
    """
    if revision is None:
        return ref
    if ref.revision not in {None, revision}:
        raise InvalidAdapterIdError(
            "the id and --revision name different revisions; use one of them", id=ref.text
        )
    return parse_ref(replace(ref, revision=revision)).plain


# -- cache ls -------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace, terminal: Terminal) -> int:
    folder, cache = _find_cache(arguments)
    listed = [] if cache is None else ls(cache)
    total = sum(entry.nbytes for entry in listed)
    if arguments.json:
        entries = [_as_json(entry) for entry in listed]
        terminal.json({"folder": str(folder), "entries": entries, "bytes": total})
        return OK
    if listed:
        terminal.table([_row(entry) for entry in listed])
        terminal.say(f"{format_size(total)} in {folder}")
    else:
        _say_empty(folder, cache, terminal)
    return OK


def _say_empty(folder: Path, cache: DiskCache | None, terminal: Terminal) -> None:
    what = "there is no cache" if cache is None else "the cache is empty"
    terminal.say(f"{what} in {folder}")


def _row(listed: Listed) -> dict[str, str]:
    record = listed.record
    return {
        "entry": listed.name[:SHOWN_DIGITS],
        "adapter": "" if record is None else record.source,
        "version": "" if record is None else shorten(record.version, SHOWN_DIGITS),
        "state": _state(listed),
        " size": format_size(listed.nbytes),
        " last used": f"{format_age(listed.age)} ago",
    }


def _state(listed: Listed) -> str:
    if listed.is_partial:
        return "being fetched" if listed.in_use else "partial"
    if listed.record is None:
        return "damaged"
    return "in use" if listed.in_use else "whole"


def _as_json(listed: Listed) -> dict[str, object]:
    files = () if listed.record is None else listed.record.files
    return {
        **_identify(listed.name, listed.record),
        "state": _state(listed),
        "partial": listed.is_partial,
        "in_use": listed.in_use,
        "bytes": listed.nbytes,
        "age_s": round(listed.age, 3),
        "files": [
            {
                "file": file.name,
                "bytes": file.nbytes,
                "digest": {"kind": file.digest.kind, "value": file.digest.value},
            }
            for file in files
        ],
    }


def _identify(name: str, record: EntryRecord | None) -> dict[str, object]:
    return {
        "name": name,
        "adapter": None if record is None else record.source,
        "version": None if record is None else record.version,
    }


# -- verify ---------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace, terminal: Terminal) -> int:
    folder, cache = _find_cache(arguments)
    results = [] if cache is None else _hash_entries(cache, terminal)
    damaged = [entry for entry in results if entry.problem is not None]
    if arguments.json:
        entries = [
            {**_identify(entry.name, entry.record), "problem": entry.problem} for entry in results
        ]
        terminal.json({"folder": str(folder), "entries": entries})
    elif results:
        terminal.say(f"entries: {len(results)} hashed, {len(damaged)} damaged, in {folder}")
    else:
        _say_empty(folder, cache, terminal)
    for entry in damaged:
        of = "" if entry.record is None else f" ({entry.record.source})"
        terminal.complain(f"entry {entry.name[:SHOWN_DIGITS]}{of} was removed: {entry.problem}")
    return FAILED if damaged else OK


def _hash_entries(cache: DiskCache, terminal: Terminal) -> list[Verified]:
    sizes = {entry.name: entry.nbytes for entry in ls(cache) if not entry.is_partial}
    results: list[Verified] = []
    with terminal.bars() as bars:

        def show() -> None:
            done = sum(sizes.get(entry.name, 0) for entry in results)
            state = f"{len(results)} of {len(sizes)} entries"
            bars.update(0, "hashing", done, sum(sizes.values()), state)

        show()
        for verified in verify(cache):
            results.append(verified)
            show()
    return results


# -- rm and gc ------------------------------------------------------------------------------------


def _rm(arguments: argparse.Namespace, terminal: Terminal) -> int:
    removed: list[Listed] = []
    problems: list[str] = []
    folder, cache = _find_cache(arguments)
    for name in dict.fromkeys(arguments.names):
        try:
            matches = _find(name, () if cache is None else ls(cache))
        except UsageError as error:
            problems.append(error.problem)
            continue
        for entry in matches:
            if cache is not None and rm(cache, entry.name):
                removed.append(entry)
            else:
                problems.append(f"{entry.name[:SHOWN_DIGITS]} is in use and was kept")
    nbytes = sum(entry.nbytes for entry in removed)
    if arguments.json:
        entries = [_identify(entry.name, entry.record) for entry in removed]
        terminal.json({"folder": str(folder), "removed": entries, "bytes": nbytes})
    else:
        for entry in removed:
            of = "partial" if entry.record is None else entry.record.source
            terminal.say(f"removed {entry.name[:SHOWN_DIGITS]} ({of})")
        terminal.say(f"removed: {format_size(nbytes)} from {folder}")
    for problem in problems:
        terminal.complain(problem)
    return FAILED if problems else OK


def _find(text: str, listed: Sequence[Listed]) -> list[Listed]:
    """Return the entries with this name prefix, or of this adapter. Raises `UsageError` if none."""
    if _NAME.fullmatch(text):
        matches = [entry for entry in listed if entry.name.startswith(text)]
        if len({entry.name[:64] for entry in matches}) > 1:
            raise UsageError(f"{text!r} is a prefix of several names; add digits")
    else:
        ref = AdapterRef(text)  # its error does not repeat the text, which may hold a secret
        try:
            ref = parse_ref(ref)
        except InvalidAdapterIdError as error:
            raise error.prefixed(
                f"{shorten(text, 200)!r} is neither an entry's name nor an id: "
            ) from None
        matches = [
            entry
            for entry in listed
            if entry.record is not None
            and entry.record.source == shorten(ref.text)
            and ref.revision in {None, entry.record.version}
        ]
    if not matches:
        raise UsageError(f"no entry in the cache matches {shorten(text, 200)!r}")
    return matches


def _gc(arguments: argparse.Namespace, terminal: Terminal) -> int:
    budget = sys.maxsize if arguments.bytes is None else arguments.bytes
    folder, cache = _find_cache(arguments, budget)
    gone = [] if cache is None else gc(cache)
    partials, nbytes = sum(each.is_partial for each in gone), sum(each.nbytes for each in gone)
    entries = len(gone) - partials
    left = 0 if cache is None else cache.budget.used()
    if arguments.json:
        removed = {"entries": entries, "partials": partials, "bytes": nbytes}
        terminal.json({"folder": str(folder), "removed": removed, "bytes": left})
    elif cache is None:
        _say_empty(folder, cache, terminal)
    else:
        terminal.say(
            f"removed: {format_size(nbytes)} (entries: {entries}, partial downloads: {partials});"
            f" left: {format_size(left)} in {folder}"
        )
    if left > budget:
        terminal.complain(
            f"{format_size(left)} are in use, over the budget of {format_size(budget)}"
        )
    return FAILED if left > budget else OK


def _find_cache(
    arguments: argparse.Namespace, nbytes: int = sys.maxsize
) -> tuple[Path, DiskCache | None]:
    """Return the cache folder, and the cache in it or None if there is none yet.

    A use of the cache would create folders, also in a folder that is not a cache.
    """
    folder = StoreConfig(cache_dir=arguments.cache_dir).cache_folder
    try:
        has_cache = "entries" in os.listdir(folder)
    except FileNotFoundError:
        has_cache = False
    return folder, DiskCache(folder, nbytes, policy("lru")) if has_cache else None
