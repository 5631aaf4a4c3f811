"""What a subscriber of a loader hears, in order, on the loader's event loop."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.errors import LoraxError
from lorax_async.types import AdapterKey


@dataclass(frozen=True, slots=True)
class SlotId:
    """A slot (a column of the device's tables) and which of its tenants."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the adapter `key`.

    `slot` is None while it holds none; `attempt` counts its fetches; `time` is that of
    `time.monotonic()`, in seconds.
    """

    key: AdapterKey
    slot: SlotId | None
    attempt: int
    time: float


@dataclass(frozen=True, slots=True)
class SlotGranted(Event):
    """The adapter has its slot and device memory; its layers follow."""

    nbytes: int
    layers: tuple[int, ...]
    """Layer groups that have tensors: -1 before the layers, 0 … L-1, L after them."""


@dataclass(frozen=True, slots=True)
class BytesMoved(Event):
    """`nbytes` more of the adapter are on the device."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerReady(Event):
    """All groups up to and including `layer` are on the device."""

    layer: int


@dataclass(frozen=True, slots=True)
class Resident(Event):
    """Every layer is on the device and checked."""


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The load ended with `error`; what it held is being given back."""

    error: LoraxError


@dataclass(frozen=True, slots=True)
class Leaving(Event):
    """The slot takes no new lease and is given back once the last lease and kernel are done.

    A later `Resident` of the same slot says that it stays. Who is told while layers are on their
    way is told again when the last one is there.
    """
