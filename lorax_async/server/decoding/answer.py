"""One generation under way: what the engine knows of it, and the tokens that come out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from lorax_async.errors import LoraxError
from lorax_async.scheduling.requests import Ticket
from lorax_async.server.decoding.sampling import Sampler
from lorax_async.server.generation import Finish, Generation


class Answer:
    """The `Tokens` of one generation, for one reader. On the event loop.

    Attributes
    ----------
    number
        Names its sequence to the decoder.
    known
        Token ids: the prompt's, and those that were generated.
    finish
        Why it ended, by itself.
    """

    def __init__(
        self, number: int, generation: Generation, sampler: Sampler, ticket: Ticket
    ) -> None:
        self.number = number
        self.generation = generation
        self.sampler = sampler
        self.ticket = ticket
        self.known = list(generation.prompt)
        self.finish: Finish | None = None
        self._coming = deque[int]()
        self._ended = False
        self._error: LoraxError | None = None
        self._wake: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self._coming:
            if self._error is not None:
                raise self._error.located() from self._error.__cause__
            if self._ended:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._coming.popleft()

    def cancel(self) -> None:
        """Have no further token computed. Idempotent."""
        self.ticket.cancel()
        self.end()

    # -- for the engine ----------------------------------------------------------------------------

    def add(self, token: int) -> None:
        """It was generated; it comes out unless it stops the answer."""
        self.known.append(token)
        if token in self.generation.stop_tokens:
            self.finish = "stop"
            return
        if len(self.known) == len(self.generation.prompt) + self.generation.max_new_tokens:
            self.finish = "length"
        self._coming.append(token)
        self._tell()

    def end(self, error: LoraxError | None = None) -> None:
        """Nothing more comes. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._tell()

    def _tell(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)
