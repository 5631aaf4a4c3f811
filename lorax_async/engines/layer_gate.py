"""Let a forward pass enter each layer when the adapters of its batch have that layer.

gate = LayerGate(rows, loop, budget=0.02)
...                  # in a thread, before the adapters of layer k are applied:
gate.enter(k)        # waits; do not apply the slots in `gate.slots_out` from then on
...
gate.out             # the rows computed without their adapter, with their errors
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock, get_ident
from time import monotonic
from types import MappingProxyType

from lorax_async.concurrency import running_loop
from lorax_async.errors import AdapterTimeoutError, HandleClosedError, LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.telemetry import NO_SPAN, PASSES, Span, Tracer, now

_POLL_SECONDS = 0.02
"""The interval at which `others_wait` is read."""


class PassSpans:
    """The spans of one pass, and of its layers in the threads that compute them.

    A layer ends with the last call of `leave` in it, or else when the thread reaches the next one.
    """

    def __init__(self, tracer: Tracer, name: str, slots: Sequence[int]) -> None:
        self._tracer = tracer
        self._stays = tracer.occupancies_in(slots)
        self._pass = tracer.span("compute", PASSES, name, adapters=len(slots))
        self._layers: dict[int, tuple[int, Span]] = {}  # by thread, as is `_left`
        self._left: dict[int, int] = {}

    def enter(self, layer: int, wait: Callable[[int], None]) -> None:
        """Call `wait(layer)`, which returns when this thread may compute the layer."""
        thread = get_ident()
        before, span = self._layers.get(thread, (None, NO_SPAN))
        if before == layer:
            wait(layer)
            return
        span.end(self._left.pop(thread, 0))
        self._layers.pop(thread, None)
        with self._begin(thread, f"wait for layer {layer}", layer):
            wait(layer)
        self._layers[thread] = layer, self._begin(thread, f"layer {layer}", layer)

    def leave(self) -> None:
        """Note that this thread has computed a module of its layer."""
        self._left[get_ident()] = now()

    def end(self) -> None:
        for thread, (_, span) in tuple(self._layers.items()):
            span.end(self._left.get(thread, 0))
        self._pass.end()

    def _begin(self, thread: int, name: str, layer: int) -> Span:
        return self._tracer.span("compute", thread, name, layer=layer, stays=self._stays)


class LayerGate:
    """Lets a pass into layer k when the adapters of its batch have layer k.

    A pass waits without limit for an adapter whose bytes are on this machine, or that is alone in
    the batch. For other adapters it waits `budget` seconds in all. When these are spent, or when an
    adapter fails, the adapter is out: its rows are computed without it from there on; discard them.
    The other rows have the same bits as without it.

    `rows` are per row a handle, resident or streaming, or None for the base; keep them usable (see
    `AdapterHandle.use`). `loop` is the loader's event loop: on its thread the gate raises
    `UsageError` instead of waiting, because the layer could not arrive. `budget` is in seconds per
    pass; None: no adapter is ever out; the pass waits for all of them, up to the loader's timeout,
    and raises their errors. `others_wait` returns whether other requests could be computed instead,
    as `Batch.others_wait`: then the pass no longer waits for an adapter that is alone in the batch.
    `beside` says that rows outside this batch wait for the pass, so that no adapter is alone.
    """

    def __init__(
        self,
        rows: Sequence[AdapterHandle | None],
        loop: asyncio.AbstractEventLoop,
        budget: float | None = None,
        others_wait: Callable[[], bool] = lambda: False,
        *,
        beside: bool = False,
    ) -> None:
        if budget is not None and not 0 <= budget < float("inf"):
            raise UsageError(f"budget is None or a number of seconds from 0, not {budget!r}")
        handles = tuple(dict.fromkeys(row for row in rows if row is not None))
        self._rows = tuple(rows)
        self._handles = handles
        self._alone = not beside and len({None if row is None else row.slot for row in rows}) == 1
        self._loop = loop
        self._budget = budget
        self.left = budget or 0.0
        """Seconds left of the pass's budget."""
        self._streaming = tuple(handle for handle in handles if not handle.resident)
        self._unverified = tuple(handle for handle in handles if not handle.is_verified)
        self._others_wait = others_wait
        self._layer = -1
        self._errors: dict[AdapterHandle, LoraxError] = {}
        self._lock = Lock()
        self.spans: PassSpans | None = None
        """The spans of the pass while a trace is recorded."""
        self.slots_out: frozenset[int] = frozenset()
        """Slots all of whose handles are out."""

    @property
    def out(self) -> Mapping[int, LoraxError]:
        """The rows whose results to discard, with their errors. Retry them after a timeout."""
        errors = self._errors
        return MappingProxyType(
            {number: errors[row] for number, row in enumerate(self._rows) if row in errors}
        )

    @property
    def may_take_out(self) -> bool:
        """Whether a row may be out: with a budget, unless all are resident and verified."""
        return self._budget is not None and bool(self._streaming or self._unverified)

    def enter(self, layer: int) -> None:
        """Wait until `layer` (-1 … L) may be computed. Any thread but the loop's.

        A lower layer than the last one starts a new pass with a full budget; adapters that are out
        stay out. Raises `UsageError` on the loop's thread and, without a budget, adapters' errors.
        """
        if layer < self._layer:
            self.left = self._budget or 0.0
        self._layer = layer
        if self.spans is None:
            self._wait_for(layer)
        else:
            self.spans.enter(layer, self._wait_for)

    def _wait_for(self, layer: int) -> None:
        for handle in self._unverified:
            self._run_step(handle, handle.require_sound)
        for handle in self._streaming:
            if not handle.is_ready(layer):
                self._run_step(handle, partial(self._await, handle, layer))

    def _run_step(self, handle: AdapterHandle, step: Callable[[], None]) -> None:
        """Run `step` unless the adapter is out; leave the adapter out if it fails."""
        if handle in self._errors:
            return
        try:
            step()
        except LoraxError as error:
            # A released handle fails its own rows; any other misuse fails the pass.
            if isinstance(error, UsageError) and not isinstance(error, HandleClosedError):
                raise
            self.leave_out(handle, error)

    def leave_out(self, handle: AdapterHandle, error: LoraxError) -> None:
        """Compute the handle's rows without it from here on; without a budget, raise `error`.

        Other handles of the same adapter are not affected.
        """
        if self._budget is None:
            raise error
        with self._lock:  # layers may be computed in several threads
            self._errors[handle] = error
            kept = {other.slot.index for other in self._handles if other not in self._errors}
            self.slots_out = frozenset(failed.slot.index for failed in self._errors) - kept

    def _await(self, handle: AdapterHandle, layer: int) -> None:
        if running_loop() is self._loop:
            raise UsageError(
                f"layer {layer} of adapter {handle.id!r} is not loaded yet, and its bytes cannot "
                "arrive while the event loop's thread waits; run the model in asyncio.to_thread"
            )
        if self._budget is None or handle.arrived:
            handle.wait_layer(layer)
        elif self._alone:
            self._await_alone(handle, layer)
        else:
            began = monotonic()
            try:
                handle.wait_layer(layer, timeout=max(0.0, self.left))
            except AdapterTimeoutError:
                waited = f"the pass had waited {self._budget:g} s for it"
                raise _late(handle, f"layer {layer} had not arrived when {waited}") from None
            finally:
                self.left -= monotonic() - began

    def _await_alone(self, handle: AdapterHandle, layer: int) -> None:
        """Wait for the layer until other requests could be computed instead."""
        until = monotonic() + handle.timeout
        while not handle.is_ready(layer):
            seconds = until - monotonic()
            with suppress(AdapterTimeoutError):
                handle.wait_layer(layer, timeout=max(0.0, min(seconds, _POLL_SECONDS)))
                return
            handle.require_sound()  # the load itself may have failed with a timeout
            if self._others_wait():
                raise _late(handle, f"layer {layer} had not arrived when others could be computed")
            if seconds <= 0:
                raise _late(handle, f"layer {layer} did not arrive within {handle.timeout:g} s")


def _late(handle: AdapterHandle, problem: str) -> AdapterTimeoutError:
    return AdapterTimeoutError(
        f"{problem}; queue the request again", id=handle.id, key=handle.key, stage="copy"
    )
