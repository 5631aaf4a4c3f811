"""What a server asks the scheduler for, and what it holds until that is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from lorax_async.errors import LoraxError
from lorax_async.runtime.acquire import require_priority
from lorax_async.types import AdapterId, Ref, as_ref
from lorax_async.validation import require_count, require_seconds


class TimerHandle(Protocol):
    """What was put off, until it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds, and calls at a moment."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> TimerHandle: ...


class LoopClock:
    """The machine's time, and a loop's calls: a loop may count whole milliseconds only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return monotonic()

    def call_at(self, when: float, callback: Callable[[], object], /) -> TimerHandle:
        return self._loop.call_later(max(0.0, when - monotonic()), callback)


class SequenceProgress:
    """Tokens of one sequence.

    Attributes
    ----------
    position
        Tokens that were computed, and whose keys and values the engine has.
    generated
        Tokens that came out.
    """

    __slots__ = ("_limit", "_prompt", "generated", "position")

    def __init__(self, prompt_tokens: int, max_new_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._limit = max_new_tokens
        self.position = 0
        self.generated = 0

    @property
    def wants(self) -> int:
        """Tokens that could be computed next."""
        return self._prompt + self.generated - self.position

    def advance(self, tokens: int) -> bool:
        """So many were computed; whether the sequence is as long as it may be.

        The last of what it wanted brings the next token.
        """
        self.position += tokens
        if not self.wants:
            self.generated += 1
        return self.generated == self._limit

    def restart(self) -> None:
        """What was computed is lost: it begins again, with the tokens that came out."""
        self.position = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to be generated with one adapter.

    Parameters
    ----------
    adapter_id
        As for `AdapterLoader.load`; None is the base alone.
    prompt_tokens
        How many tokens the prompt has; at least 1.
    max_new_tokens
        After so many it is finished, if nothing else ends it; at least 1.
    priority
        Each level counts as `LoaderConfig.starvation_age` seconds of waiting, as for loads.
    deadline
        Seconds from `submit` by which it must be in a batch; None takes the config's `timeout`.
    client
        On whose behalf: while others wait, one client has at most a share of the engine's places,
        as one adapter has. None: of no client that is known.

    Raises
    ------
    UsageError
        A number is out of range, or the id is none.
    """

    adapter_id: AdapterId | None
    prompt_tokens: int
    max_new_tokens: int
    priority: int = 0
    deadline: float | None = None
    client: Hashable = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_priority(self.priority)
        for name in ("prompt_tokens", "max_new_tokens"):
            require_count(name, getattr(self, name), least=1)
        if self.deadline is not None:
            require_seconds("deadline", self.deadline)
        _ = self.ref

    @property
    def ref(self) -> Ref | None:
        """The id as it is kept."""
        return None if self.adapter_id is None else as_ref(self.adapter_id)


class Client:
    """On whose behalf requests are made, while there are some.

    Attributes
    ----------
    requests
        Those that are not done.
    begun
        Those of which the engine keeps something.
    tokens
        Tokens that were computed for it; a new client begins with the fewest of the others.
    """

    __slots__ = ("begun", "name", "requests", "tokens")

    def __init__(self, name: Hashable, tokens: int) -> None:
        self.name = name
        self.requests = 0
        self.begun = 0
        self.tokens = tokens


class Ticket:
    """One request under way. Awaiting it waits until it is finished, or raises why it is not.

    It gives the number of tokens that came out, and raises `CancelledError` after `cancel`. Whoever
    is cancelled while awaiting does not cancel it; `cancel` does. All on the scheduler's loop.
    """

    __slots__ = (
        "_cancel", "_future", "alarm", "begun", "client", "error", "flying", "order", "progress",
        "ref", "request",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        order: tuple[float, int],
        future: asyncio.Future[None],
        cancel: Callable[[Ticket], None],
    ) -> None:
        self.request = request
        self.ref = request.ref
        self.client: Client | None = None
        self.order = order
        """Sorts by urgency."""
        self.progress = SequenceProgress(request.prompt_tokens, request.max_new_tokens)
        self.begun = False
        """It was in a batch: the engine has keys and values of it."""
        self.flying = False
        """It is in a batch."""
        self.alarm: TimerHandle | None = None
        self.error: LoraxError | None = None
        """Why it was not finished."""
        self._future = future
        self._cancel = cancel

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        return self._future.cancelled()

    @property
    def generated(self) -> int:
        """Tokens that came out so far."""
        return self.progress.generated

    def add_done_callback(self, heard: Callable[[], None]) -> None:
        """Have it called once it is done, in the loop's next turn."""
        self._future.add_done_callback(lambda _: heard())

    def cancel(self) -> bool:
        """Have no further token computed; what a batch has begun is computed and thrown away.

        Whether it was not done before.
        """
        if self.done:
            return False
        self.disarm()
        self._future.cancel()
        self._cancel(self)
        return True

    def end(self, error: LoraxError | None = None) -> None:
        """For the scheduler: it is finished, or failed; it was not done before."""
        self.disarm()
        self.error = error
        self._future.set_result(None)

    def disarm(self) -> None:
        """For the scheduler: it waits for nothing that could come too late."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None

    def __await__(self) -> Generator[object, None, int]:
        return self._wait().__await__()

    async def _wait(self) -> int:
        """Returns the number of tokens that came out."""
        if not self._future.done():
            await asyncio.wait([self._future])
        if self.error is not None:
            raise self.error.located() from self.error.__cause__
        self._future.result()
        return self.generated

    def __repr__(self) -> str:
        state = (
            "cancelled" if self.cancelled
            else "failed" if self.error is not None
            else "finished" if self.done
            else "computing" if self.flying
            else "waiting"
        )  # fmt: skip
        return f"<Ticket of {self.request.adapter_id!r} {state} after {self.generated} tokens>"
