"""The parts of one loader, put together: threads, device, source, driver; and taken apart again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lorax_async.config import LoaderConfig
from lorax_async.core.layout import ModelLayout
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.residency import Residency
from lorax_async.errors import CapacityError, LoaderClosedError
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.ports import Device, Source
from lorax_async.io.sources.local import LocalSource
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import Transfer
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.planning import Planner
from lorax_async.runtime.resolver import Resolver

MOVE_BYTES = 4 << 20
"""Of one cast through staging: large enough that few calls are made, a few fit the default ring."""

METADATA_THREADS = 2
COPIES_PER_THREAD = 8
"""In flight per I/O thread: enough that a busy loop does not let the threads run dry."""


class Machinery:
    """Everything that one loader owns and has to end. `open` before use, `close` once."""

    driver: Driver
    resolver: Resolver

    def __init__(
        self,
        layout: ModelLayout,
        config: LoaderConfig,
        source: Source | None,
        device: Device | None,
    ) -> None:
        assert config.storage_dtype is not None
        self._layout = layout
        self._config = config
        self._metadata = ThreadPoolExecutor(METADATA_THREADS, "lorax-metadata")
        self._device = device or CpuDevice(
            layout,
            dtype=config.storage_dtype,
            nbytes=config.device_bytes,
            slots=config.max_slots,
        )
        self._source = source or LocalSource(
            roots=[Path(root) for root in config.local_roots],
            limits=config.limits,
            threads=self._metadata,
        )

    async def open(self) -> None:
        """Claim the device's memory; on an error or a cancellation no thread is left."""
        try:
            loop = asyncio.get_running_loop()
            staging = await loop.run_in_executor(self._metadata, self._claim_memory)
            self._assemble(staging)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._in_thread(self._give_up)))
            raise

    def _claim_memory(self) -> StagingRing:
        self._device.open()
        nbytes = self._config.staging_bytes
        try:
            return StagingRing(nbytes, min(MOVE_BYTES, nbytes))
        except (OSError, MemoryError) as error:
            raise CapacityError(f"no memory for {nbytes:,} bytes of staging ({error})") from error

    def _assemble(self, staging: StagingRing) -> None:
        config = self._config
        residency = Residency(
            device_bytes=config.device_bytes,
            alignment=self._device.alignment,
            max_slots=config.max_slots,
            copies=COPIES_PER_THREAD * config.io_threads,
        )
        names = [module.name for module in self._layout.modules]
        self.driver = Driver(
            Lifecycle(residency, starvation_age=config.starvation_age),
            source=self._source,
            device=self._device,
            transfer=Transfer(self._device, staging, names, check_finite=config.check_finite),
            planner=Planner(self._layout, config, self._device, move_bytes=staging.move_bytes),
            num_layers=self._layout.num_layers,
            io_threads=config.io_threads,
            metadata_threads=self._metadata,
        )
        self.resolver = Resolver(self._source, self.driver.journal)

    async def close(self, timeout: float) -> None:
        try:
            await self.driver.close(LoaderClosedError("the loader was closed"), timeout)
        finally:
            await self.resolver.stop()
            await self._in_thread(self._end)

    def _give_up(self) -> None:
        self._metadata.shutdown()
        self._device.close()

    def _end(self) -> None:
        self.driver.join()
        self._metadata.shutdown()
        self._device.close()

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Run what blocks (joining, unmapping) in a thread of its own, and wait for both."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(problem: BaseException | None) -> None:
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
            except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                problem = error
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(tell, problem)

        thread = threading.Thread(target=body, name="lorax-stop", daemon=True)
        thread.start()
        await done
        thread.join()
