"""Loaders on tiny adapters, for tests."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest
import tiny
from gated_device import GatedDevice

from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.types import AdapterKey

ONE = 4 * 2 * 1536
"""Device bytes of one tiny F32 adapter of rank 4: 4 layers of A [4, 32] and B [64, 4], twice."""


def loader(**settings: object) -> AdapterLoader:
    plain: dict[str, object] = {"device_bytes": 1 << 20, "max_slots": 4, "io_threads": 2}
    return AdapterLoader(tiny.layout(), LoaderConfig(**(plain | settings)))  # type: ignore[arg-type]


def gated(
    device_bytes: int = 1 << 20, slots: int = 4, **settings: float
) -> tuple[AdapterLoader, GatedDevice]:
    layout = tiny.layout()
    device = GatedDevice(layout, dtype="F32", nbytes=device_bytes, slots=slots)
    sizes = {"device_bytes": device_bytes, "max_slots": slots, "io_threads": 2}
    config = LoaderConfig(**(sizes | settings))  # type: ignore[arg-type]
    return AdapterLoader(layout, config, device=device), device


async def begin_copies(loader: AdapterLoader, device: GatedDevice, tries: set[AdapterKey]) -> None:
    """Let copies go on until another attempt fills its slot; hold its copies, and add it.

    Files that changed are another version, which has a key of its own.
    """
    async with asyncio.timeout(20):
        while True:
            adapters = loader.placement().adapters
            filling = {key for key, where in adapters.items() if where.state == "filling"}
            if not filling <= tries:
                break
            device.let_through()
            await asyncio.sleep(0.001)
    tries |= filling


def on_device(loader: AdapterLoader) -> list[AdapterResidency]:
    """Return the adapters that hold a slot."""
    return [where for where in loader.placement().adapters.values() if where.tier == "device"]


E = TypeVar("E", bound=BaseException)


async def fails(call: Awaitable[object], kind: type[E], match: str | None = None) -> E:
    """Return the error of this kind that a call raises."""
    with pytest.raises(kind, match=match) as caught:
        await call
    return caught.value
