"""The layers of a forward pass, as a trace has them: when each was waited for and computed."""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident

from lorax_async.tracing.recorder import Recorder, now


class _Pass:
    """In one thread: layer `layer` began at `begun`, and was last seen computed at `last`."""

    __slots__ = ("begun", "last", "layer")

    def __init__(self, layer: int, begun: int) -> None:
        self.layer = layer
        self.begun = self.last = begun


class LayerTimes:
    """Of one batch, in as many threads as compute it; `slots` are those of its adapters.

    Until somebody says that a layer is computed (`left`), it lasts until the next one is entered.
    """

    def __init__(self, recorder: Recorder, slots: Iterable[int]) -> None:
        self._recorder = recorder
        self._stays = [recorder.stay_in(slot).number for slot in slots]
        self._passes: dict[int, _Pass] = {}

    def entered(self, layer: int, asked: int) -> None:
        """The gate of `layer`, reached at `asked`, has opened just now."""
        thread = get_ident()
        known = self._passes.get(thread)
        if known is not None and known.layer == layer:
            return
        opened = now()
        if known is not None:
            if known.last == known.begun:
                known.last = asked
            self._tell(thread, known)
        args = {"layer": layer, "stays": self._stays}
        self._recorder.add("compute", thread, f"wait for layer {layer}", asked, opened, args)
        self._passes[thread] = _Pass(layer, opened)

    def left(self) -> None:
        """A module of the layer that was entered last is computed."""
        known = self._passes.get(get_ident())
        if known is not None:
            known.last = now()

    def end(self) -> None:
        """No layer is computed any more."""
        for thread, known in tuple(self._passes.items()):
            self._tell(thread, known)
        self._passes.clear()

    def _tell(self, thread: int, known: _Pass) -> None:
        args = {"layer": known.layer, "stays": self._stays}
        name = f"layer {known.layer}"
        self._recorder.add("compute", thread, name, known.begun, known.last, args)
