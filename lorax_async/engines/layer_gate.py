"""A forward pass's way through layers whose adapters may still be on their way.

gate = LayerGate(rows, loop, budget=0.02)
...                  # in a thread, before the adapters of layer k are applied:
gate.enter(k)        # waits; from then on the slots in `gate.slots_out` are not to be applied
...
gate.out             # which rows were computed without their adapter, and why
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock
from time import monotonic
from types import MappingProxyType

from lorax_async.concurrency import running_loop
from lorax_async.errors import AdapterTimeoutError, HandleClosedError, LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.tracing.recorder import LayerTimes

_LOOK_SECONDS = 0.02
"""Between two looks at whether others wait."""


class LayerGate:
    """Lets a pass into layer k when the adapters of its batch have layer k.

    It waits freely for an adapter whose bytes are on this machine, or whose rows are all there are.
    For others a pass waits for `budget` seconds in all. When these are spent, or when an adapter
    fails, that one is out: its rows are computed without it from there on, and are to be thrown
    away. The other rows come to the same bits as if nothing had happened.

    Parameters
    ----------
    rows
        A handle, resident or streaming, or None for the base, per row. They stay usable meanwhile
        (see `AdapterHandle.use`).
    loop
        That of their loader. On its thread the gate raises `UsageError` where it would wait, for
        the layer could not arrive.
    budget
        In seconds, for one pass. None: nobody is ever out; the pass waits for everybody, as long as
        the loader's timeout allows, and raises an adapter's error.
    others_wait
        Whether other requests could be computed in place of the pass, as `Batch.others_wait` of a
        scheduler says: then adapters whose rows are all there are wait no longer, either.
    beside
        Whether other rows wait for this pass, so that these are not all there are.
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
        """Seconds of the budget that the pass may still wait for."""
        self._streaming = tuple(handle for handle in handles if not handle.resident)
        self._unverified = tuple(handle for handle in handles if not handle.is_verified)
        self._others_wait = others_wait
        self._layer = -1
        self._errors: dict[AdapterHandle, LoraxError] = {}
        self._lock = Lock()
        self.times: LayerTimes | None = None
        """Told of the layers, if somebody records the pass."""
        self.slots_out: frozenset[int] = frozenset()
        """Slots whose adapters are out, for all rows that have them."""

    @property
    def out(self) -> Mapping[int, LoraxError]:
        """Rows whose results are to be thrown away, and why. After a timeout: try them again."""
        errors = self._errors
        return MappingProxyType(
            {number: errors[row] for number, row in enumerate(self._rows) if row in errors}
        )

    @property
    def may_take_out(self) -> bool:
        """Whether a row can ever be out: with a budget, if not all was here and checked before."""
        return self._budget is not None and bool(self._streaming or self._unverified)

    def enter(self, layer: int) -> None:
        """Wait until `layer` (-1 … L) may be computed. In any thread but the loop's.

        A layer before the last one begins another pass: its budget is whole, who is out stays out.
        Raises `UsageError` on the loop's thread; with a budget of None, an adapter's error.
        """
        if layer < self._layer:
            self.left = self._budget or 0.0
        self._layer = layer
        times = self.times
        if times is not None:
            times.reached(layer)
        for handle in self._unverified:
            self._go_on(handle, handle.require_sound)
        for handle in self._streaming:
            if not handle.is_ready(layer):
                self._go_on(handle, partial(self._await, handle, layer))
        if times is not None:
            times.entered()

    def _go_on(self, handle: AdapterHandle, step: Callable[[], None]) -> None:
        """With the adapter, or without it."""
        if handle in self._errors:
            return
        try:
            step()
        except LoraxError as error:
            # A handle that was released is its holder's business, all other misuse is the pass's.
            misused = isinstance(error, UsageError) and not isinstance(error, HandleClosedError)
            if misused:
                raise
            self.leave_out(handle, error)

    def leave_out(self, handle: AdapterHandle, error: LoraxError) -> None:
        """Compute its rows without it from here on; with a budget of None, raise the error.

        Other handles of the same adapter go on.
        """
        if self._budget is None:
            raise error
        with self._lock:  # passes of several threads
            self._errors[handle] = error
            going_on = {each.slot.index for each in self._handles if each not in self._errors}
            self.slots_out = frozenset(each.slot.index for each in self._errors) - going_on

    def _await(self, handle: AdapterHandle, layer: int) -> None:
        if running_loop() is self._loop:
            raise UsageError(
                f"layer {layer} of adapter {handle.id!r} is not here yet, and its bytes cannot "
                "arrive while the event loop's thread waits; run the model in asyncio.to_thread"
            )
        if self._budget is None or handle.arrived:
            handle.wait_layer(layer)
        elif self._alone:
            self._await_alone(handle, layer)
        else:
            self._await_beside(handle, layer)

    def _await_alone(self, handle: AdapterHandle, layer: int) -> None:
        """Until somebody else could be computed instead."""
        until = monotonic() + handle.timeout
        while not handle.is_ready(layer):
            seconds = until - monotonic()
            with suppress(AdapterTimeoutError):
                handle.wait_layer(layer, timeout=max(0.0, min(seconds, _LOOK_SECONDS)))
                return
            handle.require_sound()  # it may have ended with such an error itself
            if self._others_wait():
                raise _late(handle, f"layer {layer} had not arrived when others could be computed")
            if seconds <= 0:
                raise _late(handle, f"layer {layer} did not arrive within {handle.timeout:g} s")

    def _await_beside(self, handle: AdapterHandle, layer: int) -> None:
        began = monotonic()
        try:
            handle.wait_layer(layer, timeout=max(0.0, self.left))
        except AdapterTimeoutError:
            waited = f"the pass had waited {self._budget:g} s for it"
            raise _late(handle, f"layer {layer} had not arrived when {waited}") from None
        finally:
            self.left -= monotonic() - began


def _late(handle: AdapterHandle, problem: str) -> AdapterTimeoutError:
    return AdapterTimeoutError(
        f"{problem}; queue the request again", id=handle.id, key=handle.key, stage="copy"
    )
