"""Whoever has the page open, and is told what changes on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorax_async.errors import CapacityError
from lorax_async.server.calls.page.board import Board, Rows
from lorax_async.server.clients import EventStream

MOST = 64
"""Pages that are told at a time, and as many of the operator's: nobody keeps him out."""

LAST_SECONDS = 1.0
"""For the end of a stream to be taken."""

TICK = 0.25
"""Seconds between two looks."""

SILENCE = 15.0
"""Seconds after which something is said in any case: proxies end what is silent."""


class Watching:
    """Streams of what changes on the board. On one event loop."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._open: dict[EventStream, bool] = {}
        """And whether it is the operator's."""
        self._over = False

    def end(self) -> None:
        """End all streams, after their next look. Who does not take his end is cut off."""
        if not self._over:
            self._over = True
            asyncio.get_running_loop().call_later(LAST_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        for stream in self._open:
            stream.cut()

    @contextmanager
    def one(self, stream: EventStream, *, operator: bool) -> Iterator[None]:
        """One more page. Raises `CapacityError`."""
        if sum(each == operator for each in self._open.values()) >= MOST:
            raise CapacityError(f"{MOST} pages are open already; close one")
        self._open[stream] = operator
        try:
            yield
        finally:
            del self._open[stream]

    async def tell(self, stream: EventStream, *, operator: bool) -> None:
        """Until the client goes, or all ends: first all rows, then those that have changed."""
        await stream.begin()
        shown = _Shown(self._board, operator=operator)
        silent = 0.0
        while not self._over:
            news = shown.news()
            if news or silent >= SILENCE:
                await stream.tell(news)
                silent = 0.0
            await asyncio.sleep(TICK)
            silent += TICK
        await stream.end()


class _Shown:
    """What one page shows."""

    def __init__(self, board: Board, *, operator: bool) -> None:
        self._board = board
        self._operator = operator
        self._rows: Rows | None = None
        self._cold: dict[str, Any] | None = None
        self._more = 0

    def news(self) -> dict[str, Any]:
        """What has changed since the last time."""
        board, news = self._board, dict[str, Any]()
        before, self._rows = self._rows, board.rows(operator=self._operator)
        if before is None:
            news = {"base": board.base, "operator": self._operator, "more": 0, "cold": None}
        if before is not self._rows:
            known = before or {}
            changed = {id: row for id, row in self._rows.items() if known.get(id) != row}
            gone = [id for id in known if id not in self._rows]
            news |= {"rows": changed} if changed or before is None else {}
            news |= {"gone": gone} if gone else {}
        if board.more() != self._more:
            self._more = news["more"] = board.more()
        cold = board.cold(operator=self._operator)
        if cold != self._cold:
            self._cold, news["cold"] = cold, cold
        return news
