"""Fetches of several adapters for the command line, and how far each is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorax_async.adapter import AdapterRef, RemoteKey
from lorax_async.errors import LoraxError
from lorax_async.io.ports import Reader
from lorax_async.io.remote.cached import FetchReader
from lorax_async.io.remote.elsewhere import Elsewhere
from lorax_async.runtime.fetches import Fetches
from lorax_async.verification import Verification

AT_ONCE = 4
"""Adapters on their way at the same time: they share the connections anyway."""

LOOK_SECONDS = 0.1
"""Between two reports of progress."""


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

    async def run(self, elsewhere: Elsewhere, fetches: Fetches) -> None:
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
    elsewhere: Elsewhere, rows: Sequence[FetchRow], show: Callable[[int, FetchRow], None]
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
