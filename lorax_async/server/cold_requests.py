"""Traces of cold requests, whose adapters must be loaded first; the last ones are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from lorax_async.errors import LoaderClosedError
from lorax_async.events import Resident
from lorax_async.loader import AdapterLoader
from lorax_async.server.model_names import ModelNames
from lorax_async.tracing.recorder import name_of
from lorax_async.tracing.trace import Trace
from lorax_async.types import AdapterId, Ref, as_ref

MAX_RECORDINGS = 2
"""Concurrent recordings; further requests are not recorded. The last is for named adapters."""

SPAN_LIMIT = 8_192
"""Spans of one trace, and as many of the computing: 10 MB at most."""


@dataclass(frozen=True, slots=True)
class ColdRequest:
    """A cold request that has its first token, or ended without one.

    Attributes
    ----------
    number
        Counts cold requests.
    names
        The trace's names for the adapter: as requested, and as resolved.
    outcome
        "first token", or what ended it: an error's class, "cancelled", "no token".
    seconds
        Time until then.
    ended
        When it ended, by `time.time`.
    """

    number: int
    adapter: AdapterId
    names: tuple[str, ...]
    outcome: str
    seconds: float
    ended: float
    trace: Trace


class ColdRequests:
    """Record cold requests while they wait for their first token.

    Keep the last one that ended, and the last one whose adapter had a name of the operator's.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader = loader
        self._names = names
        self._recorded: set[Ref] = set()
        self._numbers = count(1)
        self._last: ColdRequest | None = None
        self._last_named: ColdRequest | None = None

    def record(self, adapter: AdapterId | None) -> ColdRecording | None:
        """Begin to record a request for an adapter that is not on the device."""
        if adapter is None or not self._should_record(adapter):
            return None
        recording = ColdRecording(self, self._loader, adapter)
        self._recorded.add(as_ref(adapter))
        return recording

    def last(self, *, named: bool) -> ColdRequest | None:
        """Return the last one that ended; `named`: the last one for an adapter with a name."""
        last = self._last_named if named else self._last
        return None if last is None or (named and not self._is_named(last.adapter)) else last

    def finish(self, recording: ColdRecording, outcome: str, seconds: float) -> None:
        """Keep a recording that has ended; discard it if its request was refused."""
        adapter = recording.adapter
        self._recorded.discard(as_ref(adapter))
        if outcome == "refused":
            return
        names = (recording.name, *self._resolved_name(adapter))
        self._last = ColdRequest(
            next(self._numbers), adapter, names, outcome, seconds, time.time(), recording.trace
        )
        if self._is_named(adapter):
            self._last_named = self._last

    def _should_record(self, adapter: AdapterId) -> bool:
        if len(self._recorded) >= MAX_RECORDINGS or as_ref(adapter) in self._recorded:
            return False
        if len(self._recorded) == MAX_RECORDINGS - 1 and not self._is_named(adapter):
            return False
        story = self._loader.placement().story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def _is_named(self, adapter: AdapterId) -> bool:
        return self._names.name_of(adapter) is not None

    def _resolved_name(self, adapter: AdapterId) -> Iterator[str]:
        """Yield the name that links and revisions lead to."""
        with suppress(LoaderClosedError):
            for event in self._loader.placement().story(adapter)[-1:]:
                yield name_of(event.key)


class ColdRecording:
    """Record one request until its first token, as an observer of its tokens."""

    def __init__(self, requests: ColdRequests, loader: AdapterLoader, adapter: AdapterId) -> None:
        self.adapter = adapter
        self.name = name_of(as_ref(adapter))
        self.trace = loader.trace(limit=SPAN_LIMIT).start()
        self._requests = requests
        self._ended = False
        self._began = time.monotonic()
        recorder = loader.tracer.on
        assert recorder is not None  # it records this trace
        self._recorder = recorder
        self._span = recorder.begin("requests", None, f"request {self.name}", adapter=self.name)

    def on_token(self) -> None:
        self.on_end("first token")

    def on_end(self, outcome: str) -> None:
        """End the recording. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._recorder.end(self._span, outcome=outcome)
            self.trace.stop()
            self._requests.finish(self, outcome, time.monotonic() - self._began)
