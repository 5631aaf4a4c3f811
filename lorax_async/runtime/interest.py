"""What callers want of adapters: wishes, leases, pins, and that one should be gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command
from lorax_async.core.life import Grant
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.waiters import Tier, Waiter
from lorax_async.errors import AdapterInUseError, AdapterTimeoutError
from lorax_async.runtime.calls import Calls
from lorax_async.runtime.tenancy import Lease
from lorax_async.runtime.tenants import Tenants


@dataclass(frozen=True, slots=True)
class Wish:
    """One caller's wish for an adapter; `future` gives its lease, or None to a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class Interest:
    """Turns calls into changes of interest; `obey` carries out what the lifecycle answers.

    `hasten` hears of each key that somebody waits for in the foreground.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        tenants: Tenants,
        obey: Callable[[list[Command]], None],
        hasten: Callable[[AdapterKey], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._tenants = tenants
        self._obey = obey
        self._hasten = hasten
        self._pins: dict[object, tuple[AdapterKey, Grant]] = {}
        self.calls = Calls(lifecycle.lives)

    def begin(
        self, key: AdapterKey, tier: Tier, *, foreground: bool = True, priority: int = 0
    ) -> Wish:
        """Want the adapter as far as `tier`; to be followed by `granted` or `abandon`."""
        found = self.calls.found(key) if foreground else None
        waiter, future = self._tenants.add_waiter()
        since = asyncio.get_running_loop().time()
        self._obey(self._lifecycle.want(key, Waiter(waiter, tier, since, foreground, priority)))
        if found is not None:
            self._hasten(key)
            self.calls.wished(key, found, self._lifecycle.stage(key))
        return Wish(key, waiter, future)

    async def granted(self, wish: Wish) -> Lease | None:
        """Wait until the wish comes true, or raise why it will not."""
        return await wish.future

    def abandon(self, wish: Wish) -> None:
        """Withdraw one wish and give back what it brought; the others stay. Idempotent."""
        self._tenants.drop_waiter(wish.waiter)
        self._obey(self._lifecycle.withdraw(wish.key, wish.waiter))
        future = wish.future
        if future.done() and not future.cancelled() and future.exception() is None:
            lease = future.result()
            if lease is not None:
                lease.end()

    def try_lease(self, key: AdapterKey) -> Lease | None:
        """A lease on a resident adapter, at once."""
        if self._lifecycle.take_lease(key) is None:
            return None
        self.calls.hits["device"] += 1
        return self._tenants.new_lease(key)

    def share(self, lease: Lease) -> Lease:
        """One more lease on the same stay in a slot. Raises if that one may not be used."""
        lease.check()
        self._lifecycle.add_lease(lease.tenancy.key)
        shared = self._tenants.new_lease(lease.tenancy.key)
        shared.stale = lease.stale
        if lease.promise is not None:
            lease.promise.join(shared)
        return shared

    def pin(self, name: object, lease: Lease) -> bool:
        """Keep what is leased, on behalf of `name`, in place of what that pinned before.

        False if the adapter is leaving.
        """
        lease.check()
        key, grant = lease.tenancy.key, lease.tenancy.grant
        if self._pins.get(name) == (key, grant):
            return True
        if not self._lifecycle.pin(key):
            return False
        self.unpin(name)
        self._pins[name] = (key, grant)
        return True

    def pinned(self, ours: Callable[[object], bool]) -> list[object]:
        """The names that have pinned something, of those that are `ours`."""
        return [name for name in self._pins if ours(name)]

    def unpin(self, name: object) -> bool:
        """Whether `name` had pinned something."""
        pinned = self._pins.pop(name, None)
        if pinned is None:
            return False
        self._obey(self._lifecycle.unpin(*pinned))
        return True

    async def unload(self, key: AdapterKey, seconds: float) -> None:
        """Wait until the adapter has left device and host memory, `seconds` at most.

        Raises `AdapterInUseError` if it is still leased then, and it stays.
        """
        for name in [name for name, (pinned, _) in self._pins.items() if pinned == key]:
            del self._pins[name]
        gone = self._tenants.add_unload(key)
        self._obey(self._lifecycle.unload(key))
        try:
            async with asyncio.timeout(seconds):
                await gone
        except TimeoutError:
            if gone.cancelled():  # else it went in the same turn
                raise self._not_gone(key, seconds) from None
        finally:
            if self._tenants.drop_unload(key, gone):
                self._obey(self._lifecycle.withdraw_unload(key))

    def _not_gone(self, key: AdapterKey, seconds: float) -> AdapterInUseError | AdapterTimeoutError:
        holders = sorted(lease.holder or "no task" for lease in self._tenants.leases.get(key, ()))
        if not holders:
            problem = (
                f"it was not gone within {seconds:g} s: it is still copied, computed with or held"
            )
            return AdapterTimeoutError(problem, key=key, stage="ready")
        return AdapterInUseError(
            f"leases still held after {seconds:g} s: {len(holders)}, by {', '.join(holders)};"
            " release them, or unload with a longer timeout",
            key=key,
        )
