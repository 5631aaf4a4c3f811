"""OpenTelemetry spans of a loader's calls. Needs `opentelemetry-api`."""

from __future__ import annotations

from typing import Self

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from lorax_async.errors import LoraxError, Stage
from lorax_async.events import (
    CallBegan,
    CallEnded,
    CallEvent,
    CallWaits,
    Event,
    HeaderChecked,
    Hit,
    LayerReady,
    Resident,
    SlotGranted,
)
from lorax_async.loader import AdapterLoader
from lorax_async.types import AdapterKey, text_of

__all__ = ["LoadSpans"]

_ORDER: tuple[Stage, ...] = ("resolve", "fetch", "queue", "copy", "ready")


class LoadSpans:
    """Record a span of `tracer` for each call of `load`, `stream` and `pin`, with child spans.

    A call's span is a child of the caller's current span and ends with the call: that of `stream`
    ends, with its "copy", when it is entered. Children are the stages of docs/errors.md in which
    the caller waits: "resolve", "fetch" (until the header is checked), "queue" and "copy" (which
    includes "stage"). A call for a resident adapter has only "resolve". Errors are recorded on the
    call's span and on the stage's.

    Parameters
    ----------
    loader
        Open. Create and close this on its event loop.
    tracer
        The program's own. Of OpenTelemetry's globals, only the current span is used.
    """

    def __init__(self, loader: AdapterLoader, tracer: Tracer) -> None:
        self._tracer = tracer
        self._calls: dict[int, _Call] = {}
        self._by_key: dict[AdapterKey, list[_Call]] = {}
        self._closed = False
        self._unsubscribe_calls = loader.subscribe(self._on_call, CallEvent)
        self._unsubscribe = loader.subscribe(self._on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Begin no more spans; spans of calls in progress end with the calls. Idempotent."""
        self._closed = True
        self._unsubscribe()
        if not self._calls:
            self._unsubscribe_calls()

    # -- events of the loader ----------------------------------------------------------------------

    def _on_call(self, event: CallEvent) -> None:
        match event:
            case CallBegan() if not self._closed:
                # Below the current span of the caller's task.
                span = self._tracer.start_span(
                    f"lorax {event.method}",
                    kind=SpanKind.INTERNAL,
                    attributes={"lorax.adapter": text_of(event.ref)},
                )
                if span.is_recording():
                    self._calls[event.call] = call = _Call(self._tracer, span)
                    call.enter("resolve")
            case CallWaits() if event.call in self._calls and not self._closed:
                call = self._calls[event.call]
                self._set_key(call, event.key)
                call.locate(event.hit, event.stage)
            case CallEnded() if event.call in self._calls:
                call = self._calls.pop(event.call)
                self._set_key(call, None)
                if self._closed and not self._calls:
                    self._unsubscribe_calls()
                call.end(event.error)

    def _on_event(self, event: Event) -> None:
        reached: dict[type, Stage] = {
            HeaderChecked: "queue",
            SlotGranted: "copy",
            Resident: "ready",
        }
        for call in self._by_key.get(event.key, ()):
            if isinstance(event, LayerReady):
                call.layer_ready(event.layer)
            elif (stage := reached.get(type(event))) is not None:
                call.reach(stage)

    def _set_key(self, call: _Call, key: AdapterKey | None) -> None:
        """Set the adapter that the call waits for; None for none."""
        before, call.key = call.key, key
        if before is not None:
            calls = self._by_key[before]
            calls.remove(call)
            if not calls:
                del self._by_key[before]
        if key is not None:
            self._by_key.setdefault(key, []).append(call)


class _Call:
    """A call in progress: its span, and the child span of its current stage, if any."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.key: AdapterKey | None = None
        self._tracer = tracer
        self._span = span
        self._stage: Stage = "resolve"
        self._child: Span | None = None
        self._has_layer = False

    def locate(self, found: Hit, stage: Stage) -> None:
        """Record the tier at which the adapter was found. Called again for a re-fetch."""
        self._span.set_attribute("lorax.found", found)
        self.enter(stage)

    def reach(self, stage: Stage) -> None:
        """Enter `stage`, unless the call is in a later one because of other calls."""
        if _ORDER.index(stage) > _ORDER.index(self._stage):
            self.enter(stage)

    def layer_ready(self, layer: int) -> None:
        if not self._has_layer:
            self._has_layer = True
            self._span.add_event("first layer ready", {"lorax.layer": layer})

    def end(self, error: BaseException | None) -> None:
        """End the call's spans, with the error that it raised on both."""
        try:
            if isinstance(error, Exception):
                _record(self._span, error)
                if isinstance(error, LoraxError) and error.stage is not None:
                    self._span.set_attribute("lorax.stage", error.stage)
                if self._child is not None:
                    _record(self._child, error)
            elif error is not None:
                self._span.add_event("cancelled")
            if self._child is not None:
                self._child.end()
        finally:
            self._span.end()

    def enter(self, stage: Stage) -> None:
        """End the current stage's span, and begin that of `stage`."""
        child, self._child, self._stage = self._child, None, stage
        if child is not None:
            child.end()
        if stage != "ready":
            context = trace.set_span_in_context(self._span)
            self._child = self._tracer.start_span(f"lorax {stage}", context=context)


def _record(span: Span, error: Exception) -> None:
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
