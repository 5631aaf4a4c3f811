"""Construct, open and close the parts of one store, and of one loader, which has one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch

from lorax_async.concurrency import ThreadPool, call_in, end_in_thread
from lorax_async.config import LoaderConfig, StoreConfig
from lorax_async.devices.base import Device
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.staging import MOVE_BYTES, StagingRing
from lorax_async.devices.transfer import GroupTransfer
from lorax_async.errors import LoaderClosedError
from lorax_async.ids import parse_allowed_ref
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle
from lorax_async.lifecycle.policies import policy
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import COPIES_AHEAD, RUN_BYTES, LifecycleTimes
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.sharding import Sharding
from lorax_async.remote.remote_source import make_remote_source
from lorax_async.runtime.acquire import Acquirer, TensorAdapters
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.fetches import TransferPlanner
from lorax_async.runtime.folders import FolderLeases
from lorax_async.runtime.leases import DigestChecks
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.base import Source, SourceRouter
from lorax_async.sources.local import LocalSource
from lorax_async.sources.tensors import HostCopies, MemorySource
from lorax_async.telemetry import Budget, Statistics, Telemetry, Tracer, Usage

METADATA_THREADS = 2


class StoreParts:
    """What finds, downloads, checks and keeps the files of adapters. Call `close` once.

    `check_open` raises once the store or loader is closing. `source` replaces all sources.
    """

    def __init__(
        self, config: StoreConfig, source: Source | None, check_open: Callable[[], None]
    ) -> None:
        self.threads = ThreadPool(METADATA_THREADS, "lorax-metadata")
        self.tracer = Tracer()
        self.telemetry = Telemetry(self.tracer)
        self.remote = make_remote_source(config, self.tracer)
        if source is None:
            local = LocalSource(
                roots=config.local_roots,
                limits=config.limits,
                threads=self.threads,
                hashes=config.checks_before_use,
                convert_bin=config.convert_bin,
            )
            parse = partial(parse_allowed_ref, allow=config.allow)
            self.source = SourceRouter(local, self.remote, parse)
        else:
            self.source = SourceRouter(source, source)
        self.resolver = Resolver(
            self.source,
            self.telemetry,
            check_open,
            revalidate=config.revalidate,
            revalidate_files=config.revalidate_files,
        )
        self.digests = DigestChecks(self.source, check_open)
        self.folders = FolderLeases(source or self.source, self.resolver, self.digests, check_open)

    async def close(self, timeout: float) -> None:
        """Fail calls, wait `timeout` seconds for folder leases, end tasks and threads."""
        stopping = asyncio.ensure_future(self.stop_tasks())
        try:
            await self.folders.close(timeout)
        finally:
            await stopping
            await self.stop_tasks()  # again, for tasks of calls that ended meanwhile
            await end_in_thread("lorax-stop", self.end)

    async def stop_tasks(self) -> None:
        await self.resolver.stop()
        await self.digests.stop()

    def end(self) -> None:
        """End threads and connections. Blocks."""
        self.remote.close()
        self.threads.shutdown()


class Assembly:
    """All parts of one loader. Call `open` before use, and `close` once."""

    driver: Driver
    acquiring: Acquirer
    tensor_adapters: TensorAdapters

    def __init__(
        self,
        sharding: Sharding,
        config: LoaderConfig,
        source: Source | None,
        device: Device | None,
        check_open: Callable[[], None],
    ) -> None:
        self._sharding = sharding
        self._config = config
        self._check_open = check_open
        self._device = device or _make_device(sharding.held, config)
        self.base_copies = BaseCopies(sharding)
        self.store = store = StoreParts(config, source, check_open)
        self.copies = HostCopies(config.memory_bytes)
        self._memory = MemorySource(self.copies, config.limits, store.threads)
        store.source.memory = self._memory

    async def open(self) -> None:
        """Allocate memory and start the driver; on an error or a cancellation, end all threads."""
        store, check_open = self.store, self._check_open
        try:
            staging, images = await call_in(store.threads, self._allocate_memory)
            self.driver = self._make_driver(staging, images)
            self.acquiring = Acquirer(store.resolver, self.driver, store.digests, check_open)
            self.tensor_adapters = TensorAdapters(
                self._memory, store.resolver, self.acquiring, self.driver, check_open
            )
        except BaseException:
            await asyncio.shield(end_in_thread("lorax-stop", self._abort))
            raise

    def _allocate_memory(self) -> tuple[StagingRing, torch.Tensor]:
        """Open the device and allocate the host memory that copies read. In a thread.

        Return the staging ring, and uint8 `[pinned_bytes]` for pinned images.
        """
        device, config = self._device, self._config
        device.open()
        # A device that cannot read files needs a buffer to read into and one for the cast result.
        buffers = 1 if device.reads_files else 2
        staging = StagingRing(
            device.staging_memory(config.staging_bytes),
            min(MOVE_BYTES, config.staging_bytes // buffers),
        )
        if device.reads_files or not config.pinned_bytes:
            return staging, torch.empty(0, dtype=torch.uint8)
        return staging, device.staging_memory(config.pinned_bytes)

    def _make_driver(self, staging: StagingRing, images: torch.Tensor) -> Driver:
        config, device, held = self._config, self._device, self._sharding.held
        budgets = Budgets(
            Residency(
                device_bytes=config.device_bytes,
                alignment=device.alignment,
                max_slots=config.max_slots,
                copies=COPIES_AHEAD * config.io_threads,
                run_bytes=RUN_BYTES,
                policy=policy(config.eviction),
            ),
            policy(config.eviction),
            ImageBudget(images.nbytes, device.alignment, policy(config.eviction)),
        )
        times = LifecycleTimes(
            starvation_age=config.starvation_age, min_residency=config.min_residency
        )
        return Driver(
            Lifecycle(budgets, times),
            source=self.store.source,
            telemetry=self.store.telemetry,
            transfer=GroupTransfer(
                device,
                staging,
                held.names,
                check_finite=config.check_finite,
                tracer=self.store.tracer,
                base=self.base_copies,
            ),
            planner=TransferPlanner(
                self._sharding, config, device, self.base_copies, move_bytes=staging.move_bytes
            ),
            num_layers=held.num_layers,
            io_threads=config.io_threads,
            metadata_threads=self.store.threads,
            images=images,
            host_bytes=config.host_bytes,
            starvation_age=config.starvation_age,
            before_use=config.checks_before_use,
        )

    def statistics(self) -> Statistics:
        """Return totals; after `close`, the last ones."""
        budgets = self.driver.lifecycle.budgets
        evictions = {
            "device": budgets.device.evictions,
            "host": self.driver.host_tier.evictions,
            "pinned": budgets.images.evictions,
        }
        return replace(self.driver.telemetry.statistics(), evictions=MappingProxyType(evictions))

    def usage(self) -> Usage:
        """Return the use of all budgets, also after `close`."""
        budgets, copies, cache = self.driver.lifecycle.budgets, self.copies, self.store.remote.cache
        cached = None if cache is None else cache.budget.last_used
        device, host, arena = budgets.device, self.driver.host_tier, budgets.device.arena
        pinned, leases = budgets.images.arena, self.driver.lease_table.leases
        return Usage(
            slots=Budget(device.slots_used, device.max_slots),
            device_bytes=Budget(arena.nbytes - arena.free_bytes, arena.nbytes),
            host_bytes=Budget(host.used, host.nbytes),
            pinned_bytes=Budget(pinned.nbytes - pinned.free_bytes, pinned.nbytes),
            memory_bytes=Budget(copies.used, copies.nbytes),
            cache_bytes=None if cached is None else Budget(cached, self._config.cache_bytes),
            leases=sum(map(len, leases.values())),
            waiting=len(self.driver.waiter_table),
        )

    async def close(self, timeout: float) -> None:
        """Fail waiters, wait `timeout` seconds for leases, end all parts and threads."""
        folders = asyncio.ensure_future(self.store.folders.close(timeout))
        stopping = asyncio.ensure_future(self.store.stop_tasks())
        try:
            await self.driver.close(LoaderClosedError("the loader was closed"), timeout)
        finally:
            await folders
            await stopping
            await self.store.stop_tasks()
            await self.acquiring.stop()
            self.copies.clear()
            await end_in_thread("lorax-stop", self._end)
            self.copies.clear()  # again, for copies of calls that ended meanwhile

    def _abort(self) -> None:
        self.store.end()
        self._device.close()

    def _end(self) -> None:
        self.driver.join()
        self._abort()


def _make_device(layout: ModelLayout, config: LoaderConfig) -> Device:
    """Return the device that the settings name, not yet open."""
    dtype = config.storage_dtype or layout.dtype
    nbytes, slots = config.device_bytes, config.max_slots
    if config.device == "cpu":
        return CpuDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    if config.device == "simulated":
        from lorax_async.devices.simulated import SimulatedDevice  # noqa: PLC0415

        return SimulatedDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    return CudaDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots, device=config.device)
