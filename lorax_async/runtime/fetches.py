"""Tasks that open, check, plan and fetch adapters, and the readers that stay open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from time import monotonic
from typing import NamedTuple

from lorax_async.concurrency import FetchControl, call_in
from lorax_async.config import LoaderConfig
from lorax_async.devices.base import Device
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.errors import AdapterError, FetchError, LoraxError, as_lorax_error
from lorax_async.events import HeaderChecked
from lorax_async.files import Reader
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.safetensors import parse_header
from lorax_async.lifecycle.adapter_state import FileState, SlotState
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.planning.sharding import Sharding
from lorax_async.planning.transfer_plan import TransferPlan, plan_transfer
from lorax_async.sources.base import AdapterFile, RefusalCallback, Source
from lorax_async.telemetry import Telemetry
from lorax_async.types import AdapterKey, RemoteKey, Verification

_logger = logging.getLogger("lorax_async")

LARGE_PREFIX = 256 * 1024
"""A longer header is parsed in a thread: it would block the loop for too long."""

MANY_MEMBERS = 64
"""A config with more members is parsed in a thread too. PEFT writes about 40 without patterns."""

CACHED_PLANS = 32

GATHER_SECONDS = 0.05
"""Layers that arrive within it are reported together, unless a caller uses them one by one."""


class TransferPlanner:
    """Plans adapters for one layout, shard, dtype and device.

    A plan depends on config, header and size alone, which are equal for adapters from one training
    setup, so the last plans are cached by exactly these bytes.
    """

    def __init__(
        self,
        sharding: Sharding,
        config: LoaderConfig,
        device: Device,
        base: BaseCopies,
        *,
        move_bytes: int,
    ) -> None:
        self._sharding = sharding
        self._base = base
        self._limits = config.limits
        self._plan_transfer = partial(
            plan_transfer,
            dtype=config.storage_dtype,
            alignment=device.alignment,
            rank_multiple=device.rank_multiple,
            limits=config.limits,
            staging_move_bytes=move_bytes,
            cuts=sharding.cuts,
            compares_copies=config.base_copies != "trust",
        )
        self._cached_plan = lru_cache(maxsize=CACHED_PLANS)(self._plan)

    def is_long(self, file: AdapterFile) -> bool:
        """Return whether planning would block the event loop for too long.

        A shard's plan takes about three times as long: every tensor is cut and moved separately.
        """
        return bool(self._sharding.cuts) or _is_large(file)

    def plan(self, file: AdapterFile) -> TransferPlan:
        """Check config, header and layout against each other, and plan the transfer.

        Pure; may take milliseconds. Raise `AdapterFormatError`, `UnsupportedAdapterError` or
        `IncompatibleAdapterError`.
        """
        make = self._plan if _is_large(file) else self._cached_plan
        plan = make(file.config, file.prefix, file.reader.nbytes)
        if plan.copies:
            self._base.require_comparable(plan.copies)
        return plan

    def _plan(self, config: bytes, prefix: bytes, file_size: int) -> TransferPlan:
        spec = parse_config(config, self._limits)
        header = parse_header(prefix, file_size, self._limits)
        return self._plan_transfer(header, spec, self._sharding.whole)


def _is_large(file: AdapterFile) -> bool:
    return len(file.prefix) > LARGE_PREFIX or file.config.count(b":") > MANY_MEMBERS


Outcome = Callable[[], list[Command]]
"""A method of the lifecycle with the arguments of one outcome."""


class _RunningFetch(NamedTuple):
    """A running fetch; `opened` is set once it has a plan, or has failed."""

    control: FetchControl
    opened: asyncio.Event


@dataclass(eq=False, kw_only=True)
class FetchTasks:
    """Runs one task per fetch; each ends with exactly one outcome.

    `threads` parse large headers. `decide` is called on the loop with an adapter and an outcome,
    `verified` before the outcome of a fetch that checked all bytes. With `before_use`, no group is
    reported before that. Only `stop` cancels tasks; a fetch without demand is ended by its fetch
    control.
    """

    source: Source
    planner: TransferPlanner
    threads: Executor
    lifecycle: Lifecycle
    telemetry: Telemetry
    decide: Callable[[AdapterKey, Outcome], None]
    verified: Callable[[AdapterKey, Verification], None]
    before_use: bool

    def __post_init__(self) -> None:
        self.plans: dict[AdapterKey, TransferPlan] = {}
        self.verifications: dict[AdapterKey, Verification] = {}
        self._readers: dict[AdapterKey, Reader] = {}
        self._refusals: dict[AdapterKey, RefusalCallback] = {}
        self._running: dict[AdapterKey, _RunningFetch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._planning = asyncio.Lock()

    def start_fetch(self, key: AdapterKey, attempt: int, *, urgent: bool) -> None:
        self.verifications.pop(key, None)
        fetch = self._running[key] = _RunningFetch(FetchControl(urgent=urgent), asyncio.Event())
        self._spawn("fetch", key, self._fetch(key, attempt, fetch))

    async def opened(self, key: AdapterKey) -> None:
        """Wait until the adapter's running fetch, if there is one, has a plan or has failed."""
        if key in self._running:
            await self._running[key].opened.wait()

    def raise_priority(self, key: AdapterKey) -> None:
        """Raise the priority of the adapter's running fetch, if there is one."""
        if key in self._running:
            self._running[key].control.raise_priority()

    def is_fetching(self, key: AdapterKey) -> bool:
        return key in self._running

    def refuse_weights(self, key: AdapterKey, error: LoraxError) -> None:
        """Let the source drop its copy of weights that failed a check, unless it was verified."""
        refuse = self._refusals.get(key)
        if key in self._running:
            self._running[key].control.refused = error
        if refuse is None:
            return

        async def drop_copy() -> None:
            try:
                await refuse(error, weights=True)
            except LoraxError as problem:
                _logger.warning("the invalid copy of %s was not dropped: %s", key, problem)

        self._spawn("refuse", key, drop_copy())

    def cancel_fetch(self, key: AdapterKey) -> None:
        self._running[key].control.cancel()

    def reader(self, key: AdapterKey) -> Reader:
        """Return the reader of `key`; reopen it if it was closed."""
        reader = self._readers.get(key)
        if reader is None:
            reader = self._readers[key] = self.source.reopen(key)
        return reader

    async def require_readable(self, key: AdapterKey) -> None:
        """Open the file of an adapter that is filling its slot, so that it cannot be evicted.

        Raise `EvictedError` if it was evicted.
        """
        reader = self.reader(key)
        await call_in(self.threads, lambda: reader.nbytes)

    def close_reader(self, key: AdapterKey) -> None:
        reader = self._readers.pop(key, None)
        if reader is not None:
            reader.close()

    def close_idle_reader(self, key: AdapterKey) -> None:
        """Close the reader unless bytes are being read: file descriptors are scarce."""
        life = self.lifecycle.states.get(key)
        busy = life is not None and (
            life.file is FileState.FETCHING or life.slot is SlotState.FILLING or life.copying
        )
        if not busy:
            self.close_reader(key)

    def forget(self, key: AdapterKey) -> None:
        self.plans.pop(key, None)
        self.verifications.pop(key, None)
        self._refusals.pop(key, None)
        self.close_reader(key)

    async def stop(self) -> None:
        """Cancel the tasks that are left, and close their readers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for fetch in self._running.values():
            fetch.opened.set()
        for key in tuple(self._readers):
            self.close_reader(key)

    def _spawn(self, verb: str, key: AdapterKey, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"lorax {verb} {key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, key: AdapterKey, attempt: int, fetch: _RunningFetch) -> None:
        control = fetch.control
        error: LoraxError | None = None
        try:
            file, plan = await self._open_and_plan(key, control)
            self.plans[key] = plan
            fetch.opened.set()
            if not control.cancelled:
                self._report_header(key, attempt, file, plan)
                self.verifications[key] = await self._fetch_groups(
                    key, attempt, file, plan, control
                )
                if control.refused is not None and file.refuse is not None:
                    # A copy failed its check before the source had a copy to drop.
                    await file.refuse(control.refused, weights=True)
            if control.cancelled:
                error = FetchError("the fetch was cancelled: no waiter is left")
        except Exception as problem:  # noqa: BLE001 - becomes the task's outcome
            error = as_lorax_error(problem, "fetching the adapter failed")
        # Clean up first: the outcome may start the next fetch of this key.
        del self._running[key]
        fetch.opened.set()
        if error is None:
            self.verified(key, self.verifications[key])
            self.decide(key, partial(self.lifecycle.published, key, attempt))
            self.close_idle_reader(key)
        else:
            self.close_reader(key)
            self.decide(key, partial(self.lifecycle.fetch_failed, key, attempt, error))

    async def _open_and_plan(
        self, key: AdapterKey, control: FetchControl
    ) -> tuple[AdapterFile, TransferPlan]:
        """Open and plan the adapter; once more if it was refused because a copy was outdated."""
        opened_before = False
        while True:
            file = await self._open(key, control)
            try:
                return file, await self._plan(key, file)
            except AdapterError as error:
                self._readers.pop(key, None)
                outdated = await file.refused(error)
                if opened_before or not outdated:
                    raise
                opened_before = True

    async def _open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        with self.telemetry.timed("fetch", key, "fetch header"):
            file = await self.source.open(key, control)
        self.telemetry.add_bytes("fetch", len(file.config) + len(file.prefix))
        self.close_reader(key)
        self._readers[key] = file.reader
        self._refusals.pop(key, None)
        if file.refuse is not None:
            self._refusals[key] = file.refuse
        return file

    async def _plan(self, key: AdapterKey, file: AdapterFile) -> TransferPlan:
        # A hop to a thread does not count beside a network.
        if isinstance(key, RemoteKey) or self.planner.is_long(file):
            with self.telemetry.timed("verify", key, "verify header"):
                return await call_in(self.threads, partial(self.planner.plan, file))
        # One per turn of the loop: adapters that were opened at the same time would otherwise be
        # planned in the same turn and block all other tasks.
        async with self._planning:
            with self.telemetry.timed("verify", key, "verify header"):
                plan = self.planner.plan(file)
            await asyncio.sleep(0)
        return plan

    def _report_header(
        self, key: AdapterKey, attempt: int, file: AdapterFile, plan: TransferPlan
    ) -> None:
        now, needs = monotonic(), plan.needs(holdable=file.holdable)
        self.telemetry.checked(key, now)
        if self.telemetry.has_subscribers:
            self.telemetry.publish(HeaderChecked(key, None, attempt, now))
        checked = partial(self.lifecycle.header_checked, key, attempt, needs, cached=file.cached)
        self.decide(key, checked)

    async def _fetch_groups(
        self,
        key: AdapterKey,
        attempt: int,
        file: AdapterFile,
        plan: TransferPlan,
        control: FetchControl,
    ) -> Verification:
        loop, fetched = asyncio.get_running_loop(), list[int]()
        missing, reported = set(range(len(plan.groups))), 0.0

        def report() -> None:
            nonlocal reported
            if fetched:
                reported = loop.time()
                span_fetched = partial(self.lifecycle.span_fetched, key, attempt, *fetched)
                fetched.clear()
                self.decide(key, span_fetched)

        def group_fetched(group: int) -> None:
            """Report groups of one turn together, or of `GATHER_SECONDS` if no caller streams."""
            missing.discard(group)
            if self.before_use:
                return
            fetched.append(group)
            if not missing or self.lifecycle.states[key].streams:
                loop.call_soon(report)
            elif len(fetched) == 1:
                loop.call_at(reported + GATHER_SECONDS, report)

        spans = [group.spans for group in plan.groups]
        joined = partial(loop.call_soon, report)  # a caller that joins may stream
        with self.telemetry.tracer.span("files", None, "fetch", key), control.watch(joined):
            try:
                verification = await self.source.fetch_groups(file, spans, group_fetched, control)
            except BaseException:
                fetched.clear()  # a `report` that is still due must not follow the failure
                raise
        report()
        return verification
