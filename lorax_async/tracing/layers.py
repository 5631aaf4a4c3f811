"""The layers of a forward pass, as a trace has them: when each was waited for and computed."""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident

from lorax_async.tracing.recorder import Recorder, now


class _Layer:
    """In one thread: asked for, begun (0: not yet), and last seen computed."""

    __slots__ = ("asked", "begun", "last", "layer")

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.asked = now()
        self.begun = self.last = 0


class LayerTimes:
    """Of one batch, in as many threads as compute it; `slots` are those of its adapters.

    A layer lasts until its last module was `left`; of which nobody tells, until the next one.
    """

    def __init__(self, recorder: Recorder, slots: Iterable[int]) -> None:
        self._recorder = recorder
        self._stays = [recorder.stay_in(slot).number for slot in slots]
        self._now: dict[int, _Layer] = {}

    def reached(self, layer: int) -> None:
        """A pass is at the gate of `layer`: that before it is computed."""
        thread = get_ident()
        known = self._now.get(thread)
        if known is not None and known.layer == layer and known.begun:
            return
        if known is not None:
            self._tell(thread, known)
        self._now[thread] = _Layer(layer)

    def entered(self) -> None:
        """The gate has opened."""
        thread = get_ident()
        known = self._now.get(thread)
        if known is None or known.begun:
            return
        known.begun = now()
        self._add(thread, f"wait for layer {known.layer}", known.layer, known.asked, known.begun)

    def left(self) -> None:
        """A module of the layer is computed."""
        known = self._now.get(get_ident())
        if known is not None and known.begun:
            known.last = now()

    def end(self) -> None:
        """No layer is computed any more."""
        for thread, known in tuple(self._now.items()):
            self._tell(thread, known)
        self._now.clear()

    def _tell(self, thread: int, known: _Layer) -> None:
        stop = known.last or now()
        if known.begun:
            self._add(thread, f"layer {known.layer}", known.layer, known.begun, stop)
        else:
            self._add(thread, f"wait for layer {known.layer}", known.layer, known.asked, stop)

    def _add(self, thread: int, name: str, layer: int, start: int, stop: int) -> None:
        args = {"layer": layer, "stays": self._stays}
        self._recorder.add("compute", thread, name, start, stop, args)
