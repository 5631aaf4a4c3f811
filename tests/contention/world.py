"""A loader on a watched device and a source that does as told, and those who want adapters of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from contention.adapters import IDS, LARGEST, LARGEST_FILE, LAYOUT, Made, made
from contention.observer import Kernel, ObservedDevice
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, SlotId, errors
from lorax_async.adapter import AdapterKey
from lorax_async.io.ports import Hold
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.testing import FakeSource, SimulatedDevice, SimulatedStream

DEVICE_BYTES = LARGEST * 16 // 9
"""Room for the largest and one of rank 16, not for two of the largest."""
HOST_BYTES = LARGEST_FILE * 4 // 3
TOLD = "told to fail"
"""In the errors that are ordered."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Settings that one example plays in; `rude` closes while everything is under way."""

    loop: str
    rude: bool
    slots: int
    images: bool
    staging_bytes: int
    starvation_age: float
    min_residency: float
    eviction: str

    @property
    def pinned_bytes(self) -> int:
        return LARGEST * 10 // 9 if self.images else 0

    @property
    def config(self) -> LoaderConfig:
        return LoaderConfig(
            device_bytes=DEVICE_BYTES,
            host_bytes=HOST_BYTES,
            pinned_bytes=self.pinned_bytes,
            staging_bytes=self.staging_bytes,
            max_slots=self.slots,
            io_threads=2,
            timeout=60,
            starvation_age=self.starvation_age,
            min_residency=self.min_residency,
            eviction=self.eviction,  # type: ignore[arg-type]
        )


class Stock(FakeSource):
    """Adapters in versions; counts the bytes that are held."""

    def __init__(self) -> None:
        super().__init__(holdable=True)
        self.versions: dict[AdapterKey, Made] = {}
        self.latest = dict.fromkeys(IDS, -1)
        self.held_bytes = 0
        for id in IDS:
            self.replace(id)

    def replace(self, id: str) -> None:
        self.latest[id] += 1
        files = made(id, self.latest[id])
        self.versions[self.put(id, files.config, files.content)] = files

    async def populate(self, key: AdapterKey) -> Hold:
        hold = await super().populate(key)
        self.held_bytes += hold.nbytes
        return CountedHold(hold, self)


class CountedHold:
    """A hold whose bytes are counted until it is closed."""

    def __init__(self, hold: Hold, stock: Stock) -> None:
        self.nbytes, self.locked = hold.nbytes, hold.locked
        self._hold, self._stock, self._counted = hold, stock, hold.nbytes

    def close(self) -> None:
        self._hold.close()
        self._stock.held_bytes -= self._counted
        self._counted = 0


@dataclass(slots=True, eq=False)
class Holder:
    """Somebody with a lease; `gone` is set when it is given back."""

    handle: AdapterHandle
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class World:
    """Everything of one example. Methods are called on its loop."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.source = Stock()
        simulated = SimulatedDevice(LAYOUT, dtype="BF16", nbytes=DEVICE_BYTES, slots=scene.slots)
        self.device = ObservedDevice(
            simulated,
            nbytes=DEVICE_BYTES,
            budgets=[size for size in (scene.staging_bytes, scene.pinned_bytes) if size],
            expected=lambda key: self.source.versions[key].weights,
            leased=self._is_leased,
        )
        self.streams: list[SimulatedStream | None] = [None, simulated.stream("more")]
        self.loader = AdapterLoader(LAYOUT, scene.config, source=self.source, device=self.device)
        self.holders: list[Holder] = []
        self.wants: list[asyncio.Task[None]] = []
        self.prefetches: list[Prefetch] = []
        self.kernels: list[Kernel] = []
        self.pinned = self.hurried = self.closing = False
        """Whether anybody ever pinned, had a short timeout, closed."""

    def blame(self, holds: object, fault: str) -> None:
        self.device.blame(holds, fault)

    def require_no_faults(self) -> None:
        assert not self.device.faults, self.device.faults[:5]

    def _is_leased(self, slot: SlotId) -> bool:
        return not self.closing and any(each.handle.slot == slot for each in self.holders)

    # -- wanting -----------------------------------------------------------------------------------

    def want(self, wish: Coroutine[Any, Any, None]) -> None:
        self.wants.append(asyncio.create_task(self._wanting(wish)))

    async def _wanting(self, wish: Coroutine[Any, Any, None]) -> None:
        """What comes of it is what was provoked."""
        try:
            await wish
        except errors.LoraxError as error:
            self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")

    def is_provoked(self, error: Exception) -> bool:
        """Whether this play may have led to it. `CancelledError` is no `Exception`."""
        match error:
            case errors.LoaderClosedError():
                return self.closing
            case errors.CapacityError():
                return self.pinned
            case errors.IntegrityError():
                return max(self.source.latest.values()) > 0
            case errors.TransferError() | errors.FetchError():
                return TOLD in str(error)
            case errors.AdapterTimeoutError() | errors.AdapterInUseError():
                return self.hurried
        return False

    async def load(self, id: str, priority: int, timeout: float | None) -> None:
        self.hurried = self.hurried or timeout is not None
        self.hold(await self.loader.load(id, priority=priority, timeout=timeout))

    async def stream(self, id: str, priority: int) -> None:
        async with self.loader.stream(id, priority=priority) as handle:
            holder = self.hold(handle)
            try:
                for layer in handle.layers:
                    await handle.layer_ready(layer)
                await holder.gone.wait()
            except errors.HandleClosedError:
                self.blame(holder.gone.is_set() or self.closing, "a handle was closed by nobody")
            finally:
                if holder in self.holders:
                    self.holders.remove(holder)

    def hold(self, handle: AdapterHandle) -> Holder:
        self.holders.append(Holder(handle))
        return self.holders[-1]

    def release(self, holder: Holder) -> None:
        self.holders.remove(holder)
        holder.gone.set()
        holder.handle.release()

    def start_kernel(
        self, handle: AdapterHandle, stream: SimulatedStream | None, layer: int
    ) -> Kernel | None:
        """It reads the layers up to this one; None if not all their copies were asked for."""
        try:
            with handle.use(stream):
                if not handle.queue_behind(layer, stream):
                    return None
                kernel = self.device.kernel(handle.slot, layer)
                self.kernels.append(kernel)
                (stream or self.device.simulated.compute).run(kernel)
                return kernel
        except errors.LoraxError as error:  # the load failed meanwhile
            self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")
            return None

    # -- what is always true -----------------------------------------------------------------------

    def check(self) -> None:
        """Between two turns of the loop."""
        for stay in tuple(self.device.stays.values()):
            if stay.resident and not stay.over:
                self.device.check_weights(stay)
        for holder in self.holders:
            self._check_handle(holder.handle)
        self._check_budgets()

    def _check_handle(self, handle: AdapterHandle) -> None:
        """Who holds it can read the layers that are ready, also of one that is leaving."""
        try:
            modules = handle.modules
        except errors.HandleClosedError:
            return
        except errors.LoraxError as error:  # the load failed meanwhile
            self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")
            return
        weights = self.source.versions[handle.key].weights
        for number, module in enumerate(LAYOUT.modules):
            if handle.is_ready(module.layer):
                found, (a, b, scale) = modules[module.name], weights[number]
                same = found.a.equal(a[: found.rank]) and found.b.equal(b[:, : found.rank])
                self.blame(same and found.scale == scale, f"a handle of {handle.id} is wrong")

    def _check_budgets(self) -> None:
        held = self.source.held_bytes
        self.blame(held <= HOST_BYTES, f"{held} bytes of files are held")
        where = self.loader.residency().values()
        on_device = [each for each in where if each.slot is not None]
        self.blame(len(on_device) <= self.scene.slots, "more adapters than slots")
        self.blame(sum(each.device_bytes for each in where) <= DEVICE_BYTES, "device_bytes")
        self.blame(sum(each.host_bytes for each in where) <= HOST_BYTES, "host_bytes")
        pinned = sum(each.pinned_bytes for each in where)
        self.blame(pinned <= self.scene.pinned_bytes, "pinned_bytes")
        told = {each.slot for each in on_device}
        self.blame(told == {stay.slot for stay in self.device.stays.values()}, "residency differs")
