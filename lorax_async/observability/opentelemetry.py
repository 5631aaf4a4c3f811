"""OpenTelemetry spans of a loader's calls. Needs `opentelemetry-api`."""

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
    """Record a span of `tracer` for each call of `load`, `stream` and `pin`, with child spans.

    A call's span is a child of the caller's current span and ends with the call: that of `stream`
    ends, with its "copy", when it is entered. Children are the stages of docs/errors.md in which
    the caller waits: "resolve", "fetch" (until the header is checked), "queue" and "copy" (which
    includes "stage"). A call for a resident adapter has only "resolve". Errors are recorded on the
    call's span and on the stage's.

    Parameters
    ----------
    loader
        Open, with no other watcher of its calls. Create and close this on its event loop.
    tracer
        The program's own. Of OpenTelemetry's globals, only the current span is used.

    Raises `UsageError` if the loader is not open, or has a watcher already.
    """

    def __init__(self, loader: AdapterLoader, tracer: Tracer) -> None:
        self._tracer = tracer
        self._calls: dict[Span, _Call] = {}
        self._by_key: dict[AdapterKey, list[_Call]] = {}
        self._unwatch = loader.watch_calls(self)
        self._unsubscribe = loader.subscribe(self._on_event)

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
        """Begin no more spans; spans of calls in progress end with the calls. Idempotent."""
        self._unwatch()
        self._unsubscribe()

    # -- callbacks of the loader -------------------------------------------------------------------

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
                self._set_key(call, None)
                call.end()

    def wanted(self, key: AdapterKey, hit: Hit, stage: Stage) -> None:
        call = self._calls.get(trace.get_current_span())
        if call is not None:
            self._set_key(call, key)
            call.locate(hit, stage)

    def checked(self, key: AdapterKey) -> None:
        self._reach(key, "queue")

    def _on_event(self, event: Event) -> None:
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
        self._enter("resolve")

    def locate(self, found: Hit, stage: Stage) -> None:
        """Record the tier at which the adapter was found. Called again for a re-fetch."""
        self._span.set_attribute("lorax.found", found)
        self._enter(stage)

    def reach(self, stage: Stage) -> None:
        """Enter `stage`, unless the call is in a later one because of other calls."""
        if _ORDER.index(stage) > _ORDER.index(self._stage):
            self._enter(stage)

    def layer_ready(self, layer: int) -> None:
        if not self._has_layer:
            self._has_layer = True
            self._span.add_event("first layer ready", {"lorax.layer": layer})

    def fail(self, error: BaseException) -> None:
        """Record an error on the stage's span, and a cancellation on the call's.

        `start_as_current_span` records other errors on the call's span.
        """
        if not isinstance(error, Exception):
            self._span.add_event("cancelled")
            return
        if isinstance(error, LoraxError) and error.stage is not None:
            self._span.set_attribute("lorax.stage", error.stage)
        if self._child is not None:
            self._child.record_exception(error)
            self._child.set_status(Status(StatusCode.ERROR, type(error).__name__))

    def end(self) -> None:
        """End the current stage's span. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _enter(self, stage: Stage) -> None:
        self.end()
        self._stage = stage
        if stage != "ready":
            context = trace.set_span_in_context(self._span)
            self._child = self._tracer.start_span(f"lorax {stage}", context=context)
