"""`Trace`: what a caller holds of a recording, and how it becomes a file.

with loader.trace() as trace:
    ...
trace.write("load.json")  # for `lorax-async timeline`, Perfetto, or chrome://tracing
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import index
from os import PathLike
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import Protocol, Self

from lorax_async.errors import UsageError
from lorax_async.events import SlotId
from lorax_async.tracing.chrome import as_events
from lorax_async.tracing.hiding import hide_others
from lorax_async.tracing.recorder import Kept, Record, Recorder, Ring, Tracer, now

TRACE_LIMIT = 32_768
"""Spans, of which a load of 32 layers has some 150; and as many of the computing."""


class _Handle(Protocol):
    @property
    def slot(self) -> SlotId: ...


class Trace:
    """What happened while the block ran; `as_json` and `write` may be called in it, and after.

    Raises `UsageError` for a limit that is no whole number above 0.
    """

    def __init__(
        self, tracer: Tracer, limit: int, tenants: Callable[[], Mapping[int, str]]
    ) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise UsageError(f"limit is a whole number of spans above 0, not {limit!r}")
        self._tracer = tracer
        self._tenants = tenants
        self._ring = Ring(limit)
        self._recorder: Recorder | None = None
        self._began = now()
        self._kept: tuple[Kept, list[Record]] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def start(self) -> Self:
        """Record until `stop`. Raises `UsageError` the second time."""
        if self._recorder is not None or self._kept is not None:
            raise UsageError("a trace is recorded once; take another one from the loader")
        self._began = now()
        self._recorder = self._tracer.begin(self._ring, self._tenants())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Record no more; what has not ended by now is cut here. Idempotent."""
        if self._recorder is None:
            return
        self._kept = self._look()
        self._tracer.end(self._ring)
        self._recorder = None

    @property
    def dropped(self) -> int:
        """Spans that were recorded and are gone, for there were more than the limit."""
        return sum(gone for _, gone in self._look()[0].kinds)

    @contextmanager
    def compute(self, layer: int, *handles: _Handle, name: str | None = None) -> Iterator[None]:
        """For engines of one's own: the block computes `layer` with these adapters.

        In any thread, at any time; without effect when nothing is recorded. `attach` reports its
        layers by itself. Raises `UsageError`, before the block, for a layer that is no number.
        """
        try:
            number = index(layer)
        except TypeError:
            raise UsageError(f"a layer is a whole number, not {layer!r}") from None
        recorder = self._recorder
        if recorder is None:
            yield
            return
        # Who is in the slots now: the block may let them go.
        stays = [recorder.stay_in(handle.slot.index).number for handle in handles]
        args = {"layer": number, "stays": stays}
        text = f"layer {number}" if name is None else str(name)[:200]
        start = now()
        try:
            yield
        finally:
            recorder.add("compute", get_ident(), text, start, now(), args)

    def as_json(
        self,
        since: int | None = None,
        until: int | None = None,
        *,
        called: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """The trace as an object of Chrome's trace event format, which json can write.

        Of a part: from `since` to `until`, in nanoseconds of `time.perf_counter_ns`; what lies
        across these is cut there, and times count from `since`. From any thread, of which it takes
        some milliseconds, and more with what it finds. `called` has other names for adapters, by
        those that a trace gives them; adapters that are not in it have none, then.
        """
        began = self._began if since is None else max(since, self._began)
        kept, unfinished = self._look()
        records, dropped = kept.since(began)
        records += _not_among(records, unfinished)
        if called is not None:
            records = list(hide_others(records, called))
        return {
            "traceEvents": as_events(records, began, until),
            "displayTimeUnit": "ms",
            "otherData": {"producer": "lorax_async", "dropped": dropped},
        }

    def encoded(self, called: Mapping[str, str] | None = None) -> bytes:
        """`as_json` as the bytes of a file. Blocks, but never holds the GIL for long."""
        found = self.as_json(called=called)
        events = found.pop("traceEvents")
        assert isinstance(events, list)
        # One call of json for thousands of events would keep an event loop beside it waiting.
        each = ",".join(map(_as_text, events))
        return f'{{"traceEvents":[{each}],{_as_text(found)[1:]}'.encode()

    def write(self, path: str | PathLike[str]) -> None:
        """Write it as a file, in JSON. Blocks; raises `OSError`."""
        Path(path).write_bytes(self.encoded())

    def _look(self) -> tuple[Kept, list[Record]]:
        """What there is now, and what has begun before and ends later."""
        recorder, kept = self._recorder, self._kept
        if recorder is None and kept is not None:
            return kept
        unfinished = recorder.unfinished() if recorder is not None else []
        return self._ring.look(), unfinished


def _not_among(records: list[Record], unfinished: list[Record]) -> list[Record]:
    """Without what has ended between two looks, and is among the records by now."""
    starts = {each.start for each in unfinished}
    ended = {record[:4] for record in records if record.start in starts}
    return [each for each in unfinished if each[:4] not in ended]


def _as_text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
