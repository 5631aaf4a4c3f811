"""The sequences of one request, as text, in whichever order it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from lorax_async.errors import InternalError
from lorax_async.server.calls.forms import Choice
from lorax_async.server.calls.text import Detokenizer, StopStrings
from lorax_async.server.generation import Finish, Tokens


class Piece(NamedTuple):
    """What is new of the sequence `choice`: text, or why it ended."""

    choice: int
    text: str
    finish: Finish | None


class Writing:
    """One sequence, from tokens to text."""

    def __init__(
        self, index: int, tokens: Tokens, detokenizer: Detokenizer, stops: StopStrings
    ) -> None:
        self.count = 0
        """Tokens that came out."""
        self.finish: Finish | None = None
        self._index = index
        self._tokens = tokens
        self._coming = aiter(tokens)
        self._detokenizer = detokenizer
        self._stops = stops
        self._ended: Finish | None = None

    def cancel(self) -> None:
        self._tokens.cancel()

    async def next(self) -> Piece | None:
        """The next text, then the end, then None. Raises the `LoraxError` that ended it."""
        while self._ended is None:
            text = await self._read()
            if text:
                return Piece(self._index, text, None)
        if self.finish is None:
            self.finish = self._ended
            return Piece(self._index, "", self.finish)
        return None

    async def _read(self) -> str:
        try:
            token = await anext(self._coming)
        except StopAsyncIteration:
            self._ended = self._tokens.finish
            if self._ended is None:
                raise InternalError("a generation ended, and said no reason") from None
            return self._stops.end()
        self.count += 1
        text = self._stops.feed(self._detokenizer.feed(token))
        if self._stops.hit:
            self._tokens.cancel()
            self._ended = "stop"
        return text


class Choices:
    """All sequences of one request. Close it, and none has any further token computed."""

    def __init__(self, writings: Sequence[Writing]) -> None:
        self._writings = writings
        self._reading: dict[asyncio.Task[Piece | None], Writing] = {}
        self._begun = False

    def __len__(self) -> int:
        return len(self._writings)

    @property
    def count(self) -> int:
        """Tokens that came out of all of them."""
        return sum(writing.count for writing in self._writings)

    async def next(self) -> Piece | None:
        """Whatever comes next, of any of them; None once all have ended."""
        if len(self._writings) == 1:  # the usual case needs no tasks
            return await self._writings[0].next()
        if not self._begun:
            self._begun = True
            for writing in self._writings:
                self._read(writing)
        while self._reading:
            await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
            task = next(task for task in self._reading if task.done())
            writing = self._reading.pop(task)  # and to the end with it: all take turns
            piece = task.result()
            if piece is not None:
                self._read(writing)
                return piece
        return None

    async def collect(self) -> list[Choice]:
        """All of their texts."""
        texts: list[list[str]] = [[] for _ in self._writings]
        while (piece := await self.next()) is not None:
            texts[piece.choice].append(piece.text)
        return [
            Choice("".join(text), writing.finish)
            for text, writing in zip(texts, self._writings, strict=True)
        ]

    def close(self) -> None:
        for writing in self._writings:
            writing.cancel()
        for task in self._reading:
            task.cancel()
        self._reading.clear()

    def _read(self, writing: Writing) -> None:
        task = asyncio.create_task(writing.next(), name="lorax choice")
        self._reading[task] = writing
