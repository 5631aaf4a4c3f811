"""Fake sources full of tiny adapters, and loaders over them."""

import asyncio
from pathlib import Path
from typing import Any

import tiny

from lorax_async.config import LoaderConfig
from lorax_async.devices.simulated import SimulatedDevice
from lorax_async.events import Event, SlotGranted
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.testing import FakeSource
from lorax_async.types import AdapterId

WEIGHTS = "adapter_model.safetensors"


def make_source(base: Path, *names: str, rank: int = 4, holdable: bool = False) -> FakeSource:
    """Return a source with a different adapter per name; `base / name` has the same files."""
    source = FakeSource(holdable=holdable)
    for seed, name in enumerate(names):
        source.put(name, *tiny.files(tiny.write(base / name, seed, rank)))
    return source


def over(source: FakeSource, **settings: object) -> AdapterLoader:
    plain = {"device_bytes": 1 << 20, "max_slots": 4, "io_threads": 2, "timeout": 20}
    config = LoaderConfig(**(plain | settings))  # type: ignore[arg-type]
    return AdapterLoader(tiny.layout(), config, source=source)


def simulated(loader: AdapterLoader) -> SimulatedDevice:
    device = loader.device
    assert isinstance(device, SimulatedDevice)
    return device


def where(loader: AdapterLoader, id: AdapterId) -> AdapterResidency:
    """Return where the adapter's last version is; it must be on this machine."""
    found = loader.placement().find(id)
    assert found is not None
    return found


def state(loader: AdapterLoader, id: AdapterId) -> str:
    """Return the adapter's `AdapterResidency.state`, or "nowhere"."""
    found = loader.placement().find(id)
    return found.state if found else "nowhere"


def is_at(loader: AdapterLoader, id: AdapterId, tier: str) -> bool:
    """Return whether it is at `tier`; "device" includes loading and leaving adapters."""
    found = loader.placement().find(id)
    return found is not None and found.tier == tier


def is_resident(loader: AdapterLoader, id: AdapterId) -> bool:
    return state(loader, id) == "resident"


def granted(events: list[Event]) -> list[str]:
    """Return the ids of a fake source in the order in which they got slots."""
    grants = [event for event in events if isinstance(event, SlotGranted)]
    return [event.key.location.removeprefix("memory:") for event in grants]


class Slowed:
    """Delays a step of its owner, such as a source, until `may_go_on`; counts calls, and cancelled ones at their end."""

    def __init__(self, owner: object, step: str) -> None:
        self.asked, self.cancelled, self.may_go_on = 0, 0, asyncio.Event()
        self._step = getattr(owner, step)
        setattr(owner, step, self)

    async def __call__(self, *args: object, **options: object) -> Any:
        self.asked += 1
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            self.cancelled += 1
            raise
        return await self._step(*args, **options)
