"""Calls of a loader as spans of OpenTelemetry. Needs `opentelemetry-api`, as its user has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from lorax_async.errors import LoraxError, Stage
from lorax_async.events import Event, LayerReady, Resident, SlotGranted
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.waiters import Hit
from lorax_async.types import AdapterKey, Ref, text_of

_ORDER: tuple[Stage, ...] = ("resolve", "fetch", "queue", "copy", "ready")


class LoadSpans:
    """A span of `tracer` for each call of `load`, `stream` and `pin`, with its stages as children.

    A call's span is a child of whatever span is current where the call is made, and ends as the
    call does: `stream` ends when it is entered, and its "copy" with it. Stages are those of
    docs/errors.md, as a caller waits for them: "resolve", "fetch" (until the header is checked),
    "queue", "copy" (with "stage"). An adapter that was resident has a "resolve" alone. Errors are
    recorded on the call's span, and on that of the stage.

    Parameters
    ----------
    loader
        Open. Nobody else watches its calls; this is made and closed on its event loop.
    tracer
        The program's own. Nothing is taken from OpenTelemetry's globals but the current span.

    Raises `UsageError` if the loader is not open, or watched already.
    """

    def __init__(self, loader: AdapterLoader, tracer: Tracer) -> None:
        self._tracer = tracer
        self._calls: dict[Span, _Call] = {}
        self._by_key: dict[AdapterKey, list[_Call]] = {}
        self._leave_calls = loader.watch_calls(self)
        self._leave_events = loader.subscribe(self._hear)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Begin no more spans; those of calls under way end with them. Idempotent."""
        self._leave_calls()
        self._leave_events()

    # -- what the loader tells ---------------------------------------------------------------------

    @contextmanager
    def call(self, name: str, ref: Ref) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            f"lorax {name}", kind=SpanKind.INTERNAL, attributes={"lorax.adapter": text_of(ref)}
        ) as span:
            if not span.is_recording():
                yield
                return
            call = self._calls[span] = _Call(self._tracer, span)
            try:
                yield
            except BaseException as error:
                call.fail(error)
                raise
            finally:
                del self._calls[span]
                self._want(call, None)
                call.end()

    def wanted(self, key: AdapterKey, hit: Hit, stage: Stage) -> None:
        call = self._calls.get(trace.get_current_span())
        if call is not None:
            self._want(call, key)
            call.wanted(hit, stage)

    def checked(self, key: AdapterKey) -> None:
        self._reach(key, "queue")

    def _hear(self, event: Event) -> None:
        if isinstance(event, SlotGranted):
            self._reach(event.key, "copy")
        elif isinstance(event, Resident):
            self._reach(event.key, "ready")
        elif isinstance(event, LayerReady):
            for call in self._by_key.get(event.key, ()):
                call.layer_ready(event.layer)

    def _reach(self, key: AdapterKey, stage: Stage) -> None:
        for call in self._by_key.get(key, ()):
            call.reach(stage)

    def _want(self, call: _Call, key: AdapterKey | None) -> None:
        """Which adapter the call waits for from here on; None: for none."""
        before, call.key = call.key, key
        if before is not None:
            its = self._by_key[before]
            its.remove(call)
            if not its:
                del self._by_key[before]
        if key is not None:
            self._by_key.setdefault(key, []).append(call)


class _Call:
    """One call under way: its span, and that of the stage it is in, if it waits in one."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.key: AdapterKey | None = None
        self._tracer = tracer
        self._span = span
        self._stage: Stage = "resolve"
        self._child: Span | None = None
        self._has_layer = False
        self._enter("resolve")

    def wanted(self, found: Hit, stage: Stage) -> None:
        """Where the adapter is now that is wanted. Again, if it has to be fetched again."""
        self._span.set_attribute("lorax.found", found)
        self._enter(stage)

    def reach(self, stage: Stage) -> None:
        """The adapter has come so far; others may have brought it further before."""
        if _ORDER.index(stage) > _ORDER.index(self._stage):
            self._enter(stage)

    def layer_ready(self, layer: int) -> None:
        if not self._has_layer:
            self._has_layer = True
            self._span.add_event("first layer ready", {"lorax.layer": layer})

    def fail(self, error: BaseException) -> None:
        """The call's own span is told by whoever began it, but of a cancellation."""
        if not isinstance(error, Exception):
            self._span.add_event("cancelled")
            return
        if isinstance(error, LoraxError) and error.stage is not None:
            self._span.set_attribute("lorax.stage", error.stage)
        if self._child is not None:
            self._child.record_exception(error)
            self._child.set_status(Status(StatusCode.ERROR, type(error).__name__))

    def end(self) -> None:
        """No more stages."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _enter(self, stage: Stage) -> None:
        self.end()
        self._stage = stage
        if stage != "ready":
            around = trace.set_span_in_context(self._span)
            self._child = self._tracer.start_span(f"lorax {stage}", context=around)
