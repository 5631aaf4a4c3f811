"""Ids that mean tensors: copy the tensors, load them, then assign the id in one step."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from lorax_async.errors import AdapterTimeoutError, Stage, UsageError, as_lorax_error
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.acquire import Acquirer, OrderedCalls, require_priority
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.tensors import MemorySource
from lorax_async.types import AdapterKey, AdapterRef, Ref, TensorsKey


@dataclass(eq=False)
class TensorAdapters:
    """Assigns ids to tensors, and unassigns them.

    The host copy in `source` is kept while an id is assigned to it, a call loads it, or the adapter
    has waiters, leases or pins. `check_open` raises once the loader is closing.
    """

    source: MemorySource
    resolver: Resolver
    acquiring: Acquirer
    driver: Driver
    check_open: Callable[[], None]
    _order: OrderedCalls = field(default_factory=OrderedCalls, init=False)
    _calls: Counter[AdapterKey] = field(default_factory=Counter, init=False)

    async def load(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: bytes,
        seconds: float,
        *,
        priority: int,
        replaces: bool,
    ) -> Lease:
        """Load the tensors, assign `ref` to them, and return a lease.

        Raise `UsageError` if `ref` is assigned to other tensors, unless `replaces`. On an error or
        a cancellation the assignment does not change.
        """
        require_priority(priority)
        deadline = asyncio.get_running_loop().time() + seconds
        stage: Stage = "fetch"
        limit = asyncio.timeout_at(deadline)
        try:
            with self._order.place(ref) as wait_for_turn, ExitStack() as kept:
                async with limit:
                    key = await self.source.take(tensors, config, self.check_open)
                    kept.enter_context(self._keep(key))
                    stage = "queue"
                    await wait_for_turn()
                assigned = self.resolver.names.get(ref)
                if assigned is not None and assigned != key and not replaces:
                    raise UsageError(
                        "the name means other tensors already; replace them with `replace`, unload"
                        " them first, or choose another name"
                    )
                return await self._load_and_assign(ref, key, deadline, priority)
        except Exception as error:  # noqa: BLE001 - raised below, without frames
            problem = as_lorax_error(error.with_traceback(None), "tensors were not loaded")
            if isinstance(error, TimeoutError) and limit.expired():
                problem = AdapterTimeoutError(f"it was not ready within {seconds:g} s", stage=stage)
        raise problem.located(id=ref.text)  # its original frames refer to the bytes

    def unassign(self, ref: Ref, key: AdapterKey) -> None:
        """Remove the assignment of `ref` to `key`, after `key` was unloaded by it."""
        self.resolver.names.unassign(ref, key)
        if isinstance(key, TensorsKey):
            self._unload_if_unassigned(key)

    async def _load_and_assign(
        self, ref: AdapterRef, key: AdapterKey, deadline: float, priority: int
    ) -> Lease:
        clock = asyncio.get_running_loop().time
        while True:  # an adapter that must go cannot be pinned: load it again
            left = max(0.0, deadline - clock())
            lease = await self.acquiring.lease(key, WantedTier.DEVICE, left, priority=priority)
            with ExitStack() as failing:
                failing.callback(lease.end)
                if self._assign(ref, key, lease):
                    failing.pop_all()
                    return lease

    def _assign(self, ref: AdapterRef, key: AdapterKey, lease: Lease) -> bool:
        """Move the id and its pins in one step; return False if the new version must go."""
        pins = self.driver.pins
        names = [name for name in pins.names if self.resolver.names.covers(ref, name)]
        if not all(pins.pin(name, lease) for name in names):
            return False
        before = self.resolver.known(ref)
        self.resolver.names.assign(ref, key)
        if before is not None and before != key:
            self._unload_if_unassigned(before)
        return True

    @contextmanager
    def _keep(self, key: AdapterKey) -> Iterator[None]:
        self._calls[key] += 1
        self.driver.keep(key)
        try:
            yield
        finally:
            self._calls -= Counter([key])  # keeps positive counts only
            self._unload_if_unassigned(key)

    def _unload_if_unassigned(self, key: AdapterKey) -> None:
        """Unload the adapter once it is idle, unless an id is assigned to it or a call loads it."""
        if not self.resolver.names.has_id(key) and key not in self._calls:
            self.driver.unload_when_idle(key, self._forget)

    def _forget(self, key: AdapterKey) -> None:
        if isinstance(key, TensorsKey):
            self.driver.forget(key)
            self.source.copies.drop(key)
