"""OpenTelemetry spans of a loader's calls. Needs `opentelemetry-api`."""

from __future__ import annotations

from typing import Self

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer

from lorax_async.errors import LoraxError, Stage, class_name
from lorax_async.events import (
    CallBegan,
    CallEnded,
    CallEvent,
    CallWaits,
    Event,
    HeaderChecked,
    LayerReady,
    Resident,
    SlotGranted,
)
from lorax_async.loader import AdapterLoader
from lorax_async.types import AdapterKey, text_of

__all__ = ["LoadSpans"]

_ORDER: tuple[Stage, ...] = ("resolve", "fetch", "queue", "copy", "ready")
_REACHED: dict[type[Event], Stage] = {
    HeaderChecked: "queue",
    SlotGranted: "copy",
    Resident: "ready",
}


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
        self._calls: dict[int, _SpanCall] = {}
        self._by_key: dict[AdapterKey, list[_SpanCall]] = {}
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

    def _on_call(self, event: CallEvent) -> None:
        if isinstance(event, CallEnded):
            self._end(event)
        elif isinstance(event, CallBegan) and not self._closed:
            # Below the current span of the caller's task.
            name, attributes = f"lorax {event.method}", {"lorax.adapter": text_of(event.ref)}
            span = self._tracer.start_span(name, attributes=attributes)
            if span.is_recording():
                self._calls[event.call] = call = _SpanCall(self._tracer, span)
                call.enter("resolve")
        elif isinstance(event, CallWaits) and event.call in self._calls and not self._closed:
            call = self._calls[event.call]
            self._forget_key(call)
            call.key = event.key
            self._by_key.setdefault(event.key, []).append(call)
            call.span.set_attribute("lorax.found", event.hit)
            call.enter(event.stage)

    def _on_event(self, event: Event) -> None:
        for call in self._by_key.get(event.key, ()):
            if isinstance(event, LayerReady) and not call.has_layer:
                call.has_layer = True
                call.span.add_event("first layer ready", {"lorax.layer": event.layer})
            # A call may be in a later stage already, because of other calls.
            stage = _REACHED.get(type(event), call.stage)
            if _ORDER.index(stage) > _ORDER.index(call.stage):
                call.enter(stage)

    def _end(self, event: CallEnded) -> None:
        call = self._calls.pop(event.call, None)
        if call is None:
            return
        self._forget_key(call)
        if self._closed and not self._calls:
            self._unsubscribe_calls()
        call.end(event.error)

    def _forget_key(self, call: _SpanCall) -> None:
        if call.key is not None:
            self._by_key[call.key].remove(call)
            if not self._by_key[call.key]:
                del self._by_key[call.key]
            call.key = None


class _SpanCall:
    """A call in progress: its span, and the child span of its stage, if any."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.span, self._tracer = span, tracer
        self.key: AdapterKey | None = None
        """The adapter that the call waits for."""
        self.stage: Stage = "resolve"
        self.has_layer = False
        self._child: Span | None = None

    def enter(self, stage: Stage) -> None:
        """End the stage's span, and begin that of `stage`."""
        child, self._child, self.stage = self._child, None, stage
        if child is not None:
            child.end()
        if stage != "ready":
            context = trace.set_span_in_context(self.span)
            self._child = self._tracer.start_span(f"lorax {stage}", context=context)

    def end(self, error: BaseException | None) -> None:
        """End the call's spans, with the error that it raised on both."""
        spans = [self.span] if self._child is None else [self._child, self.span]
        try:
            if isinstance(error, Exception):
                for span in spans:
                    span.record_exception(error)
                    span.set_status(Status(StatusCode.ERROR, class_name(error)))
                if isinstance(error, LoraxError) and error.stage is not None:
                    self.span.set_attribute("lorax.stage", error.stage)
            elif error is not None:
                self.span.add_event("cancelled")
            if self._child is not None:
                self._child.end()
        finally:
            self.span.end()
