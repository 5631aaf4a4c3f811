"""`lorax-async cache`: list, verify and clean the adapter cache."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorax_async.cache import disk_cache
from lorax_async.cache.base import EntryRecord
from lorax_async.cache.disk_cache import DiskCache, Freed, Listed, Verified
from lorax_async.cli.arguments import (
    FAILED,
    OK,
    SIZE_HELP,
    AddParser,
    Command,
    add_cache_folder,
    add_command,
    as_size,
)
from lorax_async.cli.terminal import Terminal, format_age, format_size
from lorax_async.config import LoaderConfig
from lorax_async.errors import InvalidAdapterIdError, UsageError, shorten
from lorax_async.ids import parse_ref
from lorax_async.lifecycle.policies import policy
from lorax_async.types import AdapterRef

SHOWN_DIGITS = 12
"""Digits of an entry's name, and of a version, in tables."""

_NAME = re.compile(r"[0-9a-f]{4,64}|[0-9a-f]{64}\.[0-9a-z.-]*")


def add_to(add: AddParser) -> None:
    about = "list, verify and clean the adapter cache"
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


# -- ls -------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace, terminal: Terminal) -> int:
    with _open_cache(arguments) as (folder, cache):
        listed = [] if cache is None else disk_cache.ls(cache)
        total = sum(entry.nbytes for entry in listed)
        if arguments.json:
            entries = [_as_json(entry) for entry in listed]
            terminal.json({"folder": str(folder), "entries": entries, "bytes": total})
            return OK
        if listed:
            columns = ("entry", "adapter", "version", "state", " size", " last used")
            terminal.table(columns, [_row(entry) for entry in listed])
            terminal.say(f"{format_size(total)} in {folder}")
        else:
            _say_empty(folder, cache, terminal)
    return OK


def _say_empty(folder: Path, cache: DiskCache | None, terminal: Terminal) -> None:
    what = "there is no cache" if cache is None else "the cache is empty"
    terminal.say(f"{what} in {folder}")


def _row(listed: Listed) -> tuple[str, ...]:
    record = listed.record
    return (
        listed.name[:SHOWN_DIGITS],
        "" if record is None else record.source,
        "" if record is None else shorten(record.version, SHOWN_DIGITS),
        _state(listed),
        format_size(listed.nbytes),
        f"{format_age(listed.age)} ago",
    )


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
                "file": file.role.file_name,
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
    with _open_cache(arguments) as (folder, cache):
        results = [] if cache is None else _hash_entries(cache, terminal)
        damaged = [entry for entry in results if entry.problem is not None]
        if arguments.json:
            entries = [
                {**_identify(entry.name, entry.record), "problem": entry.problem}
                for entry in results
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
    sizes = {entry.name: entry.nbytes for entry in disk_cache.ls(cache) if not entry.is_partial}
    results: list[Verified] = []
    with terminal.bars() as bars:

        def show() -> None:
            done = sum(sizes.get(entry.name, 0) for entry in results)
            state = f"{len(results)} of {len(sizes)} entries"
            bars.update(0, "hashing", done, sum(sizes.values()), state)

        show()
        for verified in disk_cache.verify(cache):
            results.append(verified)
            show()
    return results


# -- rm and gc ------------------------------------------------------------------------------------


def _rm(arguments: argparse.Namespace, terminal: Terminal) -> int:
    removed: list[Listed] = []
    problems: list[str] = []
    with _open_cache(arguments) as (folder, cache):
        for name in dict.fromkeys(arguments.names):
            try:
                matches = _find(name, () if cache is None else disk_cache.ls(cache))
            except UsageError as error:
                problems.append(error.problem)
                continue
            for entry in matches:
                if cache is not None and disk_cache.rm(cache, entry.name):
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
        ref = _parse_ref(text)
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


def _parse_ref(text: str) -> AdapterRef:
    """Parse an id. Raises `UsageError` without any secret of it."""
    ref = AdapterRef(text)
    try:
        return parse_ref(ref)
    except InvalidAdapterIdError as error:
        raise error.prefixed(
            f"{shorten(text, 200)!r} is neither an entry's name nor an id: "
        ) from None


def _gc(arguments: argparse.Namespace, terminal: Terminal) -> int:
    budget = sys.maxsize if arguments.bytes is None else arguments.bytes
    with _open_cache(arguments, budget) as (folder, cache):
        freed = Freed(0, 0, 0) if cache is None else disk_cache.gc(cache)
        left = 0 if cache is None else cache.used()
    if arguments.json:
        removed = {"entries": freed.entries, "partials": freed.partials, "bytes": freed.nbytes}
        terminal.json({"folder": str(folder), "removed": removed, "bytes": left})
    elif cache is None:
        _say_empty(folder, cache, terminal)
    else:
        terminal.say(
            f"removed: {format_size(freed.nbytes)} (entries: {freed.entries}, partial downloads:"
            f" {freed.partials}); left: {format_size(left)} in {folder}"
        )
    if left > budget:
        terminal.complain(
            f"{format_size(left)} are in use, over the budget of {format_size(budget)}"
        )
    return FAILED if left > budget else OK


# -- the folder -----------------------------------------------------------------------------------


@contextmanager
def _open_cache(
    arguments: argparse.Namespace, nbytes: int = sys.maxsize
) -> Iterator[tuple[Path, DiskCache | None]]:
    """Yield the cache folder, and the cache in it or None if there is none yet."""
    folder = LoaderConfig(cache_dir=arguments.cache_dir).cache_folder
    if not _has_cache(folder):
        yield folder, None
        return
    cache = DiskCache(folder, nbytes, policy("lru"))
    try:
        yield folder, cache
    finally:
        cache.close()


def _has_cache(folder: Path) -> bool:
    """Return whether the folder holds a cache; opening one creates files in a foreign folder."""
    try:
        return "entries" in os.listdir(folder)
    except FileNotFoundError:
        return False
