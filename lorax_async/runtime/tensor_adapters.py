"""Tensors as what an id means: copied, loaded beside what it meant before, then exchanged."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from lorax_async.errors import AdapterTimeoutError, InternalError, LoraxError, Stage, UsageError
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.acquire import Acquirer, OrderedCalls, require_priority
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.tensors import MemorySource
from lorax_async.types import AdapterKey, AdapterRef, MergedKey, Ref, TensorsKey


class TensorAdapters:
    """Gives ids the meaning of tensors, and takes it back.

    A copy in `source` is kept for as long as an id means it, a call is about it, or the adapter is
    waited for, leased or pinned. `check_open` raises once nothing may begin.
    """

    def __init__(
        self,
        source: MemorySource,
        resolver: Resolver,
        acquiring: Acquirer,
        driver: Driver,
        check_open: Callable[[], None],
    ) -> None:
        self._source = source
        self._resolver = resolver
        self._names = resolver.names
        self._acquiring = acquiring
        self._driver = driver
        self._check_open = check_open
        self._order = OrderedCalls()
        self._calls: Counter[AdapterKey] = Counter()

    async def give(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: bytes,
        seconds: float,
        *,
        priority: int,
        replaces: bool,
    ) -> Lease:
        """Let `ref` mean these tensors, once they are resident; a lease on them.

        Unless it `replaces`, a name that means other ones is a `UsageError`. On an error or a
        cancellation `ref` means what it meant.
        """
        require_priority(priority)
        deadline = asyncio.get_running_loop().time() + seconds
        stage: Stage = "fetch"
        problem: LoraxError
        try:
            with self._order.place(ref) as come_first, ExitStack() as kept:
                async with asyncio.timeout_at(deadline) as limit:
                    key = await self._source.take(tensors, config, self._check_open)
                    kept.enter_context(self._kept(key))
                    stage = "queue"
                    await come_first()
                if not replaces:
                    self._require_free(ref, key)
                return await self._load(ref, key, deadline, priority)
        except LoraxError as error:
            problem = error.located(id=ref.text)
        except Exception as error:  # noqa: BLE001 - a fault of ours, whatever it is
            if isinstance(error, TimeoutError) and limit.expired():
                late = f"it was not ready within {seconds:g} s"
                problem = AdapterTimeoutError(late, id=ref.text, stage=stage)
            else:
                problem = InternalError(f"tensors were not taken: {error!r}", id=ref.text)
                problem.__cause__ = error.with_traceback(None)
        raise problem  # without the frames of where it arose, which hold the bytes

    def take_back(self, ref: Ref, key: AdapterKey) -> None:
        """End what `ref` was given to mean, once `key` was unloaded as `ref`."""
        self._names.take_back(ref, key)
        if isinstance(key, TensorsKey):
            self._retire(key)
        elif isinstance(key, MergedKey):
            self._driver.forget(key)
            self._source.copies.drop(key)

    async def _load(
        self, ref: AdapterRef, key: AdapterKey, deadline: float, priority: int
    ) -> Lease:
        clock = asyncio.get_running_loop().time
        while True:  # what leaves again at once cannot be pinned: it is loaded once more
            left = max(0.0, deadline - clock())
            lease = await self._acquiring.lease(key, WantedTier.DEVICE, left, priority=priority)
            try:
                if self._exchange(ref, key, lease):
                    return lease
            except BaseException:
                lease.end()
                raise
            lease.end()

    def _exchange(self, ref: AdapterRef, key: AdapterKey, lease: Lease) -> bool:
        """Move the id and its pins in one step; return False if the new version is leaving."""
        waiter_table = self._driver.waiter_table
        pinned = waiter_table.pinned(lambda name: self._names.covers(ref, name))
        if not all(waiter_table.pin(name, lease) for name in pinned):
            return False
        before = self._resolver.known(ref)
        self._names.give(ref, key)
        if before is not None and before != key:
            self._retire(before)
        return True

    @contextmanager
    def _kept(self, key: AdapterKey) -> Iterator[None]:
        self._calls[key] += 1
        self._driver.idle_unloader.keep(key)
        try:
            yield
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]
            self._retire(key)

    def _retire(self, key: AdapterKey) -> None:
        """Let it go, unless an id means it or is about to."""
        if not self._names.mean(key) and key not in self._calls:
            self._driver.idle_unloader.begin(key, self._gone)

    def _gone(self, key: AdapterKey) -> None:
        if isinstance(key, TensorsKey):
            self._driver.forget(key)
            self._source.copies.drop(key)

    def _require_free(self, ref: AdapterRef, key: AdapterKey) -> None:
        meant = self._names.get(ref)
        if meant is not None and meant != key:
            raise UsageError(
                "the name means other tensors already; replace them with `replace`, unload them"
                " first, or choose another name"
            )
