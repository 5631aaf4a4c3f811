"""Construct, open and close the parts of one loader: threads, device, source, driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch

from lorax_async.cache.disk_cache import OwnCache
from lorax_async.concurrency import in_own_thread
from lorax_async.config import LoaderConfig
from lorax_async.devices import make_device
from lorax_async.devices.base import Device
from lorax_async.devices.staging import StagingRing
from lorax_async.devices.transfer import GroupTransfer
from lorax_async.errors import LoaderClosedError
from lorax_async.ids import parse_allowed_ref
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle, LifecycleTimes
from lorax_async.lifecycle.policies import policy
from lorax_async.lifecycle.queues import COPIES_AHEAD
from lorax_async.lifecycle.residency import HostBudget, ImageBudget, Residency
from lorax_async.planning.sharding import Sharding
from lorax_async.remote.remote_source import make_remote_source
from lorax_async.runtime.acquire import Acquirer
from lorax_async.runtime.digest_checks import DigestChecks
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.fetches import TransferPlanner
from lorax_async.runtime.folders import FolderFetcher, FolderLeases
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.telemetry import Budget, Statistics, Usage
from lorax_async.runtime.tensor_adapters import TensorAdapters
from lorax_async.sources.base import Source, SourceRouter
from lorax_async.sources.host_copies import HostCopies
from lorax_async.sources.local import LocalSource
from lorax_async.sources.tensors import MemorySource
from lorax_async.tracing import Tracer

MOVE_BYTES = 4 << 20
"""Bytes per cast through staging: few calls, and several casts fit the default ring."""

METADATA_THREADS = 2


class Assembly:
    """All parts of one loader. Call `open` before use, and `close` once."""

    driver: Driver
    resolver: Resolver
    digests: DigestChecks
    acquiring: Acquirer
    tensor_adapters: TensorAdapters
    folders: FolderFetcher

    def __init__(
        self, sharding: Sharding, config: LoaderConfig, source: Source | None, device: Device | None
    ) -> None:
        assert config.storage_dtype is not None
        self._sharding = sharding
        self._config = config
        self._metadata = ThreadPoolExecutor(METADATA_THREADS, "lorax-metadata")
        self._device = device or make_device(sharding.held, config)
        self._cache = OwnCache(config)
        self.tracer = Tracer()
        self._remote = make_remote_source(config, self._cache, self.tracer)
        self.copies = HostCopies(config.memory_bytes, self._cache.get if config.spill else None)
        self._memory = MemorySource(
            self.copies,
            sharding.whole,
            dtype=config.storage_dtype,
            limits=config.limits,
            threads=self._metadata,
        )
        local = LocalSource(
            roots=config.local_roots,
            limits=config.limits,
            threads=self._metadata,
            hashes=config.verify == "before_use",
        )
        if source is None:
            parse = partial(parse_allowed_ref, allow=config.allow)
            self._source = SourceRouter(self._memory, local, self._remote, parse)
        else:
            self._source = SourceRouter(self._memory, source, source)
        self._memory.merger.source = self._source
        self._folder_leases = FolderLeases(source or self._source)

    async def open(self, check_open: Callable[[], None]) -> None:
        """Allocate memory and start the driver; on an error or a cancellation, end all threads."""
        try:
            loop = asyncio.get_running_loop()
            staging, images = await loop.run_in_executor(self._metadata, self._allocate_memory)
            self.driver = self._make_driver(staging, images)
            telemetry = self.driver.telemetry
            self.driver.waiter_table.in_memory = self.copies.in_memory
            self.resolver = Resolver(self._source, telemetry, self._config.revalidate)
            self.digests = DigestChecks(self._source, telemetry, check_open)
            self.acquiring = Acquirer(self.resolver, self.driver, self.digests, check_open)
            self.folders = FolderFetcher(self.resolver, self._folder_leases, self.digests)
            self.tensor_adapters = TensorAdapters(
                self._memory, self.resolver, self.acquiring, self.driver, check_open
            )
        except BaseException:
            await asyncio.shield(in_own_thread("lorax-stop", self._abort))
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
                policy=policy(config.eviction),
            ),
            HostBudget(config.host_bytes, policy(config.eviction)),
            ImageBudget(images.nbytes, device.alignment, policy(config.eviction)),
        )
        times = LifecycleTimes(
            starvation_age=config.starvation_age, min_residency=config.min_residency
        )
        return Driver(
            Lifecycle(budgets, times),
            source=self._source,
            device=device,
            transfer=GroupTransfer(
                device,
                staging,
                [module.name for module in held.modules],
                check_finite=config.check_finite,
                tracer=self.tracer,
            ),
            planner=TransferPlanner(self._sharding, config, device, move_bytes=staging.move_bytes),
            num_layers=held.num_layers,
            io_threads=config.io_threads,
            metadata_threads=self._metadata,
            images=images,
            tracer=self.tracer,
            before_use=config.verify == "before_use",
        )

    def statistics(self) -> Statistics:
        """Return totals; after `close`, the last ones."""
        budgets = self.driver.lifecycle.budgets
        evictions = {
            "device": budgets.device.evictions,
            "host": budgets.host.evictions,
            "pinned": budgets.images.evictions,
        }
        return replace(
            self.driver.telemetry.statistics(),
            spills=self.copies.spills,
            evictions=MappingProxyType(evictions),
        )

    def usage(self) -> Usage:
        """Return the use of all budgets, also after `close`."""
        budgets, copies, cached = self.driver.lifecycle.budgets, self.copies, self._cache.last_used
        device, host, arena = budgets.device, budgets.host, budgets.device.arena
        pinned, leases = budgets.images.arena, self.driver.lease_table.leases
        return Usage(
            slots=Budget(device.slots_used, device.max_slots),
            device_bytes=Budget(arena.nbytes - arena.free_bytes, arena.nbytes),
            host_bytes=Budget(host.nbytes - host.free, host.nbytes),
            pinned_bytes=Budget(pinned.nbytes - pinned.free_bytes, pinned.nbytes),
            memory_bytes=Budget(copies.used, copies.nbytes),
            cache_bytes=None if cached is None else Budget(cached, self._config.cache_bytes),
            leases=sum(map(len, leases.values())),
            waiting=len(self.driver.waiter_table),
        )

    async def close(self, timeout: float) -> None:
        """Fail waiters, wait `timeout` seconds for leases, end all parts and threads."""
        folders = asyncio.ensure_future(self._folder_leases.close(timeout))
        try:
            self.digests.begin_close()
            await self.driver.close(LoaderClosedError("the loader was closed"), timeout)
        finally:
            await folders
            await self.resolver.stop()
            await self.digests.stop()
            await self.acquiring.stop()
            self.copies.clear()
            await in_own_thread("lorax-stop", self._end)
            self.copies.clear()  # again, for copies of calls that ended meanwhile

    def _abort(self) -> None:
        self._metadata.shutdown()
        self._device.close()

    def _end(self) -> None:
        self.driver.join()
        self._memory.close()
        self._remote.close()
        self._metadata.shutdown()
        self._cache.close()
        self._device.close()
