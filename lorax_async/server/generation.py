"""What is to be generated, and what comes of it: words that the engine and its callers share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lorax_async.adapter import AdapterId

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    temperature
        From 0, which takes the likeliest token.
    top_p
        Above 0, at most 1: of the likeliest tokens, as many as have this probability together.
    seed
        The same seed gives the same tokens, whoever else is computed beside them. None: any.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to be generated.

    Attributes
    ----------
    adapter
        As for `AdapterLoader.load`; None is the base alone.
    prompt
        Token ids, at least one.
    max_new_tokens
        After so many it ends with "length".
    stop_tokens
        Any of these ends it with "stop"; it is not among what comes out.
    deadline
        Seconds from `submit` by which it must be computed for the first time; None takes the
        loader's timeout.
    client
        Whose it is, as `scheduling.requests.Request` has it.
    """

    adapter: AdapterId | None
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    deadline: float | None = None
    client: Hashable = field(default=None, repr=False)


class Tokens(Protocol):
    """The tokens of one generation, as they come. On the event loop of whoever submitted it."""

    @property
    def finish(self) -> Finish | None:
        """Why it ended, once it has; None before, and where it failed or was cancelled."""

    def __aiter__(self) -> AsyncIterator[int]:
        """Token ids. Raises the `LoraxError` that ended it, after the tokens before it."""

    def cancel(self) -> None:
        """Have no further token computed: its place is free for others. Idempotent."""


class Generating(Protocol):
    """Whoever turns generations into tokens, many at a time."""

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and what is generated, together, at most."""

    @property
    def waiting(self) -> int:
        """Generations that were submitted, and of which nothing has been computed yet."""

    @property
    def alive(self) -> bool:
        """Whether it takes generations: False once it is closing, or its model has failed it."""

    def submit(self, generation: Generation) -> Tokens:
        """Queue it; its adapter begins to come.

        Raises `UsageError` for what can never be computed, `LoaderClosedError` when closing.
        """


class InFront:
    """Of an engine: says of it what it says itself. What is submitted is the subclass's affair."""

    def __init__(self, engine: Generating) -> None:
        self._engine = engine

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    @property
    def alive(self) -> bool:
        return self._engine.alive


class TokensInFront:
    """Of the tokens of a generation: whoever stands in front of them looks at each one."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._coming = aiter(tokens)

    @property
    def finish(self) -> Finish | None:
        return self._tokens.finish

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        return await anext(self._coming)
