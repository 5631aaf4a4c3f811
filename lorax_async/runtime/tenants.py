"""Who waits for adapters, and who holds them: waiters, tenancies and leases of one loader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.errors import LoraxError
from lorax_async.runtime.tenancy import Lease, Tenancy
from lorax_async.verification import Verification


class Tenants:
    """The loop's side of waiting and holding.

    `lease_ended(lease, in_use, soon)` and `lease_quiet(lease)` are called in any thread.
    """

    def __init__(
        self,
        num_layers: int,
        lease_ended: Callable[[Lease, bool, bool], None],
        lease_quiet: Callable[[Lease], None],
    ) -> None:
        self.leases: dict[AdapterKey, set[Lease]] = {}
        self._num_layers = num_layers
        self._lease_ended = lease_ended
        self._lease_quiet = lease_quiet
        self._waiters: dict[int, asyncio.Future[Lease | None]] = {}
        self._unloads: dict[AdapterKey, list[asyncio.Future[None]]] = {}
        self._tenancies: dict[AdapterKey, Tenancy] = {}
        self._last_waiter = 0

    @property
    def waiting(self) -> int:
        """Wishes that neither came true nor failed."""
        return len(self._waiters)

    def add_waiter(self) -> tuple[int, asyncio.Future[Lease | None]]:
        """A future that `serve` or `fail` will set."""
        self._last_waiter += 1
        future: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        self._waiters[self._last_waiter] = future
        return self._last_waiter, future

    def drop_waiter(self, waiter: int) -> None:
        self._waiters.pop(waiter, None)

    def move_in(
        self,
        key: AdapterKey,
        grant: Grant,
        plan: TransferPlan,
        verification: Verification | None,
        has_arrived: Callable[[], bool],
    ) -> Tenancy:
        tenancy = Tenancy(key, grant, plan, self._num_layers, verification, has_arrived)
        self._tenancies[key] = tenancy
        return tenancy

    def move_out(self, key: AdapterKey) -> None:
        self._tenancies.pop(key).vectors = None

    def verified(self, key: AdapterKey, verification: Verification) -> None:
        """All bytes of it are here, and were checked so far."""
        tenancy = self._tenancies.get(key)
        if tenancy is not None:
            tenancy.verify(verification)

    def tenancy(self, key: AdapterKey) -> Tenancy:
        return self._tenancies[key]

    def in_slots(self) -> dict[int, AdapterKey]:
        """Whose the slots are, by their numbers."""
        return {each.grant.slot.index: key for key, each in self._tenancies.items()}

    def new_lease(self, key: AdapterKey) -> Lease:
        tenancy = self._tenancies[key]
        tenancy.streamed = tenancy.streamed or not tenancy.complete
        lease = Lease(tenancy, self._lease_ended, self._lease_quiet)
        self.leases.setdefault(key, set()).add(lease)
        return lease

    def end_lease(self, lease: Lease) -> None:
        held = self.leases[lease.tenancy.key]
        held.remove(lease)
        if not held:
            del self.leases[lease.tenancy.key]
        if lease.promise is not None:
            lease.promise.leave(lease)
        lease.tenancy.wake_tasks()

    def serve(self, key: AdapterKey, waiter: int, grant: Grant | None) -> None:
        """Fulfil a wish. A waiter that was cancelled meanwhile gives its lease back."""
        lease = self.new_lease(key) if grant is not None else None
        future = self._waiters.pop(waiter, None)
        if future is not None and not future.done():
            future.set_result(lease)
        elif lease is not None:
            lease.end()

    def add_unload(self, key: AdapterKey) -> asyncio.Future[None]:
        """A future that `unloaded` will set, unless `drop_unload` comes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unloads.setdefault(key, []).append(future)
        return future

    def drop_unload(self, key: AdapterKey, future: asyncio.Future[None]) -> bool:
        """Whether it was still waited for."""
        waiting = self._unloads.get(key, [])
        if future not in waiting:
            return False
        waiting.remove(future)
        if not waiting:
            del self._unloads[key]
        return True

    def unloaded(self, key: AdapterKey) -> None:
        for future in self._unloads.pop(key, ()):
            if not future.done():
                future.set_result(None)

    def fail(self, waiters: Iterable[int], error: LoraxError) -> None:
        for waiter in waiters:
            future = self._waiters.pop(waiter, None)
            if future is not None and not future.done():
                future.set_exception(error.located())
                future.exception()  # a waiter may be gone before it looks
