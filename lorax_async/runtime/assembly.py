"""Construct, open and close the parts of one loader: threads, device, source, driver."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch

from lorax_async.cache.disk_cache import OwnCache
from lorax_async.config import LoaderConfig
from lorax_async.devices import make_device
from lorax_async.devices.base import Device
from lorax_async.devices.staging import StagingRing
from lorax_async.devices.transfer import GroupTransfer
from lorax_async.errors import LoaderClosedError
from lorax_async.ids import parse_allowed_ref
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle, LifecycleTimes
from lorax_async.lifecycle.policies import policy
from lorax_async.lifecycle.queues import COPIES_AHEAD
from lorax_async.lifecycle.residency import HostBudget, ImageBudget, Residency
from lorax_async.planning.sharding import Sharding
from lorax_async.remote.remote_source import make_remote_source
from lorax_async.runtime.acquire import Acquirer, Prefetch, require_priority
from lorax_async.runtime.digest_checks import DigestChecks
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.fetches import TransferPlanner
from lorax_async.runtime.folders import Fetches, Fetching
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.telemetry import Statistics, Usage, usage_of
from lorax_async.runtime.tensor_adapters import TensorAdapters
from lorax_async.sources.base import Source
from lorax_async.sources.host_copies import HostCopies
from lorax_async.sources.local import LocalSource
from lorax_async.sources.router import SourceRouter
from lorax_async.sources.tensors import MemorySource
from lorax_async.tracing.recorder import Tracer
from lorax_async.types import AdapterKey, Ref, text_of

MOVE_BYTES = 4 << 20
"""Bytes per cast through staging: few calls, and several casts fit the default ring."""

METADATA_THREADS = 2


_NO_IMAGES = torch.empty(0, dtype=torch.uint8)


class _CopyMemory(NamedTuple):
    """Host memory that copies read: the staging ring, and uint8 `[pinned_bytes]` for images."""

    staging: StagingRing
    images: torch.Tensor


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Retrieve a task's error, lest asyncio log it: a prefetch need not be awaited."""
    if not task.cancelled():
        task.exception()


class Assembly:
    """All parts of one loader. Call `open` before use, and `close` once."""

    driver: Driver
    resolver: Resolver
    digests: DigestChecks
    acquiring: Acquirer
    tensor_adapters: TensorAdapters
    fetching: Fetching

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
        self._source = source or SourceRouter(
            LocalSource(
                roots=config.local_roots,
                limits=config.limits,
                threads=self._metadata,
                hashes=config.verify == "before_use",
            ),
            self._remote,
            partial(parse_allowed_ref, allow=config.allow),
        )
        self._copies = HostCopies(config.memory_bytes, self._cache.get if config.spill else None)
        self._memory = MemorySource(
            self._source,
            self._copies,
            sharding.whole,
            dtype=config.storage_dtype,
            limits=config.limits,
            threads=self._metadata,
        )
        self._fetches = Fetches(self._source)
        self._prefetching: set[asyncio.Task[None]] = set()

    async def open(self, check_open: Callable[[], None]) -> None:
        """Allocate memory and start the driver; on an error or a cancellation, end all threads."""
        try:
            loop = asyncio.get_running_loop()
            memory = await loop.run_in_executor(self._metadata, self._allocate_memory)
            self._assemble(memory)
            self.driver.waiter_table.in_memory = self._copies.in_memory
            self.digests = DigestChecks(self._memory, self.driver.telemetry, check_open)
            self.acquiring = Acquirer(self.resolver, self.driver, self.digests, check_open)
            self.fetching = Fetching(self.resolver, self._fetches, self.digests)
            self.tensor_adapters = TensorAdapters(
                self._memory, self.resolver, self.acquiring, self.driver, check_open
            )
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._in_thread(self._abort)))
            raise

    def _allocate_memory(self) -> _CopyMemory:
        """Open the device and allocate staging memory, in a thread."""
        device, config = self._device, self._config
        device.open()
        # A device that cannot read files needs a buffer to read into and one for the cast result.
        buffers = 1 if device.reads_files else 2
        staging = StagingRing(
            device.staging_memory(config.staging_bytes),
            min(MOVE_BYTES, config.staging_bytes // buffers),
        )
        pinned_bytes = 0 if device.reads_files else config.pinned_bytes
        images = device.staging_memory(pinned_bytes) if pinned_bytes else _NO_IMAGES
        return _CopyMemory(staging, images)

    def _assemble(self, memory: _CopyMemory) -> None:
        config, device, staging = self._config, self._device, memory.staging
        names = [module.name for module in self._sharding.held.modules]
        self.driver = Driver(
            Lifecycle(
                self._budgets(memory),
                LifecycleTimes(
                    starvation_age=config.starvation_age, min_residency=config.min_residency
                ),
            ),
            source=self._memory,
            device=device,
            transfer=GroupTransfer(
                device, staging, names, check_finite=config.check_finite, tracer=self.tracer
            ),
            planner=TransferPlanner(self._sharding, config, device, move_bytes=staging.move_bytes),
            num_layers=self._sharding.held.num_layers,
            io_threads=config.io_threads,
            metadata_threads=self._metadata,
            images=memory.images,
            tracer=self.tracer,
            before_use=config.verify == "before_use",
        )
        self.resolver = Resolver(self._memory, self.driver.telemetry, config.revalidate)

    def _budgets(self, memory: _CopyMemory) -> Budgets:
        config, alignment = self._config, self._device.alignment
        device = Residency(
            device_bytes=config.device_bytes,
            alignment=alignment,
            max_slots=config.max_slots,
            copies=COPIES_AHEAD * config.io_threads,
            policy=policy(config.eviction),
        )
        host = HostBudget(config.host_bytes, policy(config.eviction))
        images = ImageBudget(memory.images.nbytes, alignment, policy(config.eviction))
        return Budgets(device, host, images)

    @property
    def copied_bytes(self) -> Mapping[AdapterKey, int]:
        """The bytes of each adapter from tensors, and of each merge, in host memory."""
        return self._copies.sizes

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
            spills=self._copies.spills,
            evictions=MappingProxyType(evictions),
        )

    def usage(self) -> Usage:
        """Return the use of all budgets, also after `close`."""
        driver, cache = self.driver, (self._cache.last_used, self._config.cache_bytes)
        return usage_of(driver.lifecycle.budgets, driver.lease_table, self._copies, cache)

    def prefetch(
        self, refs: Sequence[Ref], tier: WantedTier, seconds: float, priority: int
    ) -> Prefetch:
        """Start one task per ref; `close` waits for those that are left."""
        require_priority(priority)

        async def acquire(ref: Ref) -> None:
            await self.acquiring.acquire(ref, tier, seconds, priority=priority, foreground=False)

        def start(ref: Ref) -> asyncio.Task[None]:
            loop, name = asyncio.get_running_loop(), f"lorax prefetch {text_of(ref)}"
            task = loop.create_task(acquire(ref), name=name)
            task.add_done_callback(_retrieve_error)
            return task

        prefetch = Prefetch([(text_of(ref), partial(start, ref)) for ref in refs])
        self._prefetching.add(prefetch.task)
        prefetch.task.add_done_callback(self._prefetching.discard)
        return prefetch

    async def close(self, timeout: float) -> None:
        """Fail waiters, wait `timeout` seconds for leases, end all parts and threads."""
        folders = asyncio.ensure_future(self._fetches.close(timeout))
        try:
            self.digests.begin_close()
            await self.driver.close(LoaderClosedError("the loader was closed"), timeout)
        finally:
            await folders
            await self.resolver.stop()
            await self.digests.stop()
            await asyncio.gather(*self._prefetching, return_exceptions=True)
            self._copies.clear()
            await self._in_thread(self._end)
            self._copies.clear()  # again, for copies of calls that ended meanwhile

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

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Run blocking `work` (joining, unmapping) in a new thread, and wait for both."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def set_outcome(problem: BaseException | None) -> None:
            if done.cancelled():
                return
            if problem is None:
                done.set_result(None)
            else:
                done.set_exception(problem)

        def body() -> None:
            problem: BaseException | None = None
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised by the awaiting task
                problem = error
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(set_outcome, problem)

        thread = threading.Thread(target=body, name="lorax-stop", daemon=True)
        thread.start()
        await done
        thread.join()
