"""The events of a loader; subscribers get them in order, on the loader's event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorax_async.errors import LoraxError, Stage
from lorax_async.types import AdapterKey, Ref

Hit = Literal["device", "host", "disk", "source"]
"""The nearest tier that has all of an adapter when a call wants it: resident, in host memory,
opened before and still on disk, or none, so that its source has to deliver it."""


@dataclass(frozen=True, slots=True)
class SlotId:
    """A slot, which is a column of the device's tables, and its generation."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the adapter `key`.

    `slot` is None if the adapter has none; `attempt` counts its fetches; `time` is in seconds of
    `time.monotonic()`.
    """

    key: AdapterKey
    slot: SlotId | None
    attempt: int
    time: float


@dataclass(frozen=True, slots=True)
class HeaderChecked(Event):
    """The adapter's config and header are checked: it waits for a slot from now on."""


@dataclass(frozen=True, slots=True)
class SlotGranted(Event):
    """The adapter has a slot and device memory; its layers follow."""

    nbytes: int
    layers: tuple[int, ...]
    """Layer groups that have tensors: -1 before the layers, 0 … L-1, L after them."""


@dataclass(frozen=True, slots=True)
class BytesMoved(Event):
    """`nbytes` more of the adapter are on the device."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerReady(Event):
    """All layer groups up to and including `layer` are on the device."""

    layer: int


@dataclass(frozen=True, slots=True)
class Resident(Event):
    """Every layer is on the device and checked."""


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The load ended with `error`; its slot and memory are being released."""

    error: LoraxError


@dataclass(frozen=True, slots=True)
class Leaving(Event):
    """The slot takes no new lease and is released once the last lease and kernel have ended.

    A later `Resident` of the same slot cancels this. If layers are still being copied, the event is
    repeated after the last one.
    """


@dataclass(frozen=True, slots=True)
class SlotFreed(Event):
    """The adapter has left its slot, which the next one may have."""


@dataclass(frozen=True, slots=True)
class CallEvent:
    """A step of one call of `load`, `stream` or `pin`, published in its caller's task.

    `call` is the call's number in this process; `time` is as an `Event`'s.
    """

    call: int
    time: float


@dataclass(frozen=True, slots=True)
class CallBegan(CallEvent):
    """The method was called for `ref`, which is resolved first."""

    method: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class CallWaits(CallEvent):
    """The call waits for the adapter `key`, found at the tier `hit`; repeated for a re-fetch.

    `stage` is where the adapter is now: "fetch", "queue", "copy" (it fills its slot) or "ready".
    """

    key: AdapterKey
    hit: Hit
    stage: Stage


@dataclass(frozen=True, slots=True)
class CallEnded(CallEvent):
    """The call returned, or raised `error`; `stream` ends its call when it is entered."""

    error: BaseException | None
