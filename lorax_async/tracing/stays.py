"""An adapter's stay in a slot, as a trace has it: filling layer by layer, resident, leaving."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_async.adapter import AdapterKey
from lorax_async.tracing.names import name_of
from lorax_async.tracing.recorder import Recorder, Stay, Tracer, now


class Stays:
    """Told of slots by their numbers, on the loop; a stay that began before is left out."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def granted(self, slot: int, key: AdapterKey, nbytes: int) -> None:
        recorder = self._tracer.on
        if recorder is None:
            return
        stay = recorder.moved_in(slot, name_of(key))
        stay.span = recorder.begin(
            "layers", slot, stay.name, stay=stay.number, adapter=stay.name, bytes=nbytes
        )
        stay.at = stay.span.start

    def ready(self, slot: int, layers: Sequence[int], watermark: int, *, last: bool) -> None:
        """The first `watermark` layers are on the device. One told of behind another is empty."""
        recorder = self._tracer.on
        if recorder is None or (stay := recorder.stays.get(slot)) is None or stay.span is None:
            return
        stop = now()
        for layer in layers[stay.told : watermark]:
            args = {"stay": stay.number, "layer": layer}
            recorder.add("layers", slot, f"layer {layer}", stay.at, stop, args)
            stay.at = stop
        stay.told = watermark
        if last:
            _next(recorder, stay, "resident", outcome="resident")

    def failed(self, slot: int, error: BaseException) -> None:
        recorder = self._tracer.on
        if recorder is not None and (stay := recorder.stays.get(slot)) is not None:
            _next(recorder, stay, "leaving", outcome=type(error).__name__)

    def leaving(self, slot: int) -> None:
        recorder = self._tracer.on
        if recorder is not None and (stay := recorder.stays.get(slot)) is not None:
            _next(recorder, stay, "leaving", outcome="leaving")

    def left(self, slot: int) -> None:
        """The slot is nobody's."""
        recorder = self._tracer.on
        if recorder is None:
            return
        stay = recorder.stays.pop(slot, None)
        if stay is not None and stay.span is not None:
            recorder.end(stay.span, outcome="left")


def _next(recorder: Recorder, stay: Stay, what: str, outcome: str) -> None:
    before = stay.span
    if before is None or before.name == what:
        return
    recorder.end(before, outcome=outcome)
    stay.span = recorder.begin("layers", before.lane, what, stay=stay.number)
