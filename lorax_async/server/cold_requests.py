"""Requests whose adapters have to come first: the last one is kept as a trace."""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count

from lorax_async.adapter import AdapterId, Ref, as_ref
from lorax_async.errors import LoaderClosedError
from lorax_async.events import Resident
from lorax_async.loader import AdapterLoader
from lorax_async.server.calls.names import Names
from lorax_async.server.generation import Generating, Generation, InFront, Tokens, TokensInFront
from lorax_async.tracing.names import name_of
from lorax_async.tracing.trace import Trace

MOST = 2
"""Recorded at a time; who begins meanwhile is not. The last place is for adapters with names."""

LIMIT = 8_192
"""Spans of one, and as many of the computing: 10 MB at most."""


@dataclass(frozen=True, slots=True)
class ColdRequest:
    """One that has its first token, or has ended without.

    Attributes
    ----------
    number
        Counts them.
    names
        What the trace calls the adapter: by what was asked for, and by what was found there.
    outcome
        "first token", or what came in its place: an error's class, "cancelled", "no token".
    seconds
        Until then.
    ended
        When that was; `time.time`.
    """

    number: int
    adapter: AdapterId
    names: tuple[str, ...]
    outcome: str
    seconds: float
    ended: float
    trace: Trace


class ColdRequests(InFront):
    """Passes generations on to `engine`, and records those that are cold.

    Nothing is recorded but while such a request waits for its first token. Kept are the last one
    that ended, and the last one whose adapter had a name of the operator's.
    """

    def __init__(self, engine: Generating, loader: AdapterLoader, names: Names) -> None:
        super().__init__(engine)
        self._loader = loader
        self._names = names
        self._recorded: set[Ref] = set()
        self._numbers = count(1)
        self._last: ColdRequest | None = None
        self._last_named: ColdRequest | None = None

    def submit(self, generation: Generation) -> Tokens:
        adapter = generation.adapter
        if adapter is None or not self._is_to_be_recorded(adapter):
            return self._engine.submit(generation)
        recording = _Recording(self._loader, adapter)
        try:
            tokens = self._engine.submit(generation)
        except BaseException:
            recording.stop("refused")
            raise
        self._recorded.add(as_ref(adapter))
        return _RecordedTokens(tokens, partial(self._ended, adapter, recording))

    def last(self, *, named: bool) -> ColdRequest | None:
        """The last one that ended; `named`: the last one for an adapter that has a name."""
        last = self._last_named if named else self._last
        return None if last is None or (named and not self._is_named(last.adapter)) else last

    def _is_to_be_recorded(self, adapter: AdapterId) -> bool:
        if len(self._recorded) >= MOST or as_ref(adapter) in self._recorded:
            return False
        if len(self._recorded) == MOST - 1 and not self._is_named(adapter):
            return False
        story = self._loader.story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def _is_named(self, adapter: AdapterId) -> bool:
        return self._names.name_of(adapter) is not None

    def _ended(self, adapter: AdapterId, recording: _Recording, outcome: str) -> None:
        self._recorded.discard(as_ref(adapter))
        seconds = recording.stop(outcome)
        names = (recording.name, *self._found(adapter))
        self._last = ColdRequest(
            next(self._numbers),
            adapter,
            names,
            outcome,
            seconds,
            time.time(),
            recording.trace,
        )
        if self._is_named(adapter):
            self._last_named = self._last

    def _found(self, adapter: AdapterId) -> Iterator[str]:
        """Behind a link, or with a revision, it is called otherwise."""
        with suppress(LoaderClosedError):
            for event in self._loader.story(adapter)[-1:]:
                yield name_of(event.key)


class _Recording:
    """Begins when it is made."""

    def __init__(self, loader: AdapterLoader, adapter: AdapterId) -> None:
        self.name = name_of(as_ref(adapter))
        self.trace = loader.trace(limit=LIMIT).start()
        self._began = time.monotonic()
        recorder = loader.tracer.on
        assert recorder is not None  # it records this trace
        self._recorder = recorder
        self._span = recorder.begin("requests", None, f"request {self.name}", adapter=self.name)

    def stop(self, outcome: str) -> float:
        """Ends it; how many seconds it took."""
        self._recorder.end(self._span, outcome=outcome)
        self.trace.stop()
        return time.monotonic() - self._began


class _RecordedTokens(TokensInFront):
    """Tokens of a generation; tells `ended` once how its wait for the first one ended."""

    def __init__(self, tokens: Tokens, ended: Callable[[str], None]) -> None:
        super().__init__(tokens)
        self._ended: Callable[[str], None] | None = ended

    def cancel(self) -> None:
        self._end("cancelled")
        self._tokens.cancel()

    async def __anext__(self) -> int:
        try:
            token = await super().__anext__()
        except StopAsyncIteration:
            self._end("no token")
            raise
        except BaseException as error:
            self._end("cancelled" if isinstance(error, CancelledError) else type(error).__name__)
            raise
        self._end("first token")
        return token

    def _end(self, outcome: str) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(outcome)
