"""Bringing adapters onto this machine's disk, for whoever may load them later."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_async.adapter import AdapterKey, AdapterRef, RemoteKey
from lorax_async.config import LoaderConfig
from lorax_async.core.hub_names import repo_folder
from lorax_async.errors import LoraxError
from lorax_async.io.cache.ports import CacheEntry
from lorax_async.io.ports import AdapterFile, Demand, Source
from lorax_async.io.remote.cached import EntryReader, FetchReader
from lorax_async.io.remote.hub_cache import HubEntry, standard_folder
from lorax_async.io.remote.hub_layout import snapshot_of
from lorax_async.verification import Verification

AT_ONCE = 4
"""Adapters on their way at the same time: they share the connections anyway."""

LOOK_SECONDS = 0.1
"""Between two looks at how far they are."""


@dataclass(slots=True, eq=False)
class Fetched:
    """One adapter's way onto the disk, as it goes.

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
    reader: FetchReader | None = None

    @property
    def landed(self) -> tuple[int, int | None]:
        """Bytes of weights that are here, and how many there are, if that is known yet."""
        return (0, None) if self.reader is None else self.reader.landed()

    async def run(self, source: Source, place_of: Callable[[CacheEntry], str]) -> None:
        """Bring it, or keep the typed error."""
        began = time.perf_counter()
        try:
            await self._bring(source, place_of)
        except LoraxError as error:
            self.state, self.error = "failed", error.located(id=self.ref.text)
        self.seconds = time.perf_counter() - began

    async def _bring(self, source: Source, place_of: Callable[[CacheEntry], str]) -> None:
        self.state = "asking"
        key, demand = await source.resolve(self.ref), Demand()
        self.version = _version(key)
        file = await source.open(key, demand)
        try:
            here = isinstance(file.reader, EntryReader)
            self.state = "checking" if here else "fetching"
            if isinstance(file.reader, FetchReader):
                self.reader = file.reader
            # Without groups: all of it, in whatever order is quickest.
            self.verification = await source.bring(file, (), _nobody, demand)
            entry = _entry(file)
            self.nbytes, self.place = entry.record.nbytes, place_of(entry)
            self.state = "here already" if here else "fetched"
        finally:
            file.reader.close()


async def fetch_all(
    source: Source,
    rows: Sequence[Fetched],
    place_of: Callable[[CacheEntry], str],
    show: Callable[[int, Fetched], None],
) -> None:
    """Bring all of them, a few at a time; `show` is called now and then, and at last."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(row: Fetched) -> None:
        async with turns:
            await row.run(source, place_of)

    async def look() -> None:
        while True:
            _show_all(rows, show)
            await asyncio.sleep(LOOK_SECONDS)

    async with asyncio.TaskGroup() as group:
        looking = group.create_task(look(), name="look")
        async with asyncio.TaskGroup() as fetching:
            for row in rows:
                fetching.create_task(one(row), name=f"fetch {row.ref.text}")
        looking.cancel()
    _show_all(rows, show)


def _show_all(rows: Sequence[Fetched], show: Callable[[int, Fetched], None]) -> None:
    for number, row in enumerate(rows):
        show(number, row)


def place_by(config: LoaderConfig) -> Callable[[CacheEntry], str]:
    """In which folder the files of an entry lie, where `config` says what the caches are."""

    def place_of(entry: CacheEntry) -> str:
        record = entry.record
        repo = repo_folder(record.source) if isinstance(entry, HubEntry) else None
        if repo is None:
            return str(config.cache_folder / "entries" / record.name)
        folder = Path(config.hub_cache_dir or standard_folder())
        return os.fspath(folder.joinpath(*snapshot_of(repo, record.version)))

    return place_of


def _entry(file: AdapterFile) -> CacheEntry:
    reader = file.reader
    assert isinstance(reader, EntryReader | FetchReader)
    assert reader.entry is not None
    return reader.entry


def _version(key: AdapterKey) -> str | None:
    return key.version if isinstance(key, RemoteKey) else None


def _nobody(_: int) -> None:
    """Uses the bytes before all are here."""
