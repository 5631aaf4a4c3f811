"""One adapter's stay in a slot: how far it has come, and the leases on it.

Leases are ended, and kernels begun and ended, from any thread; everything else is the loop's.
"""

from __future__ import annotations

import asyncio
import os
import threading
from bisect import bisect_left
from collections.abc import Callable
from typing import Self

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.errors import HandleClosedError, LoraxError, UsageError
from lorax_async.io.inbox import running_loop
from lorax_async.io.ports import CopyTicket
from lorax_async.runtime.vectors import Vectors
from lorax_async.verification import Verification


class Tenancy:
    """What is known of one grant: plan, watermark, error. Shared by all its leases."""

    def __init__(
        self,
        key: AdapterKey,
        grant: Grant,
        plan: TransferPlan,
        num_layers: int,
        verification: Verification | None = None,
        has_arrived: Callable[[], bool] = lambda: False,
    ) -> None:
        self.key = key
        self.grant = grant
        self.plan = plan
        self.layers = plan.layers
        self.vectors = Vectors(plan, grant) if plan.has_vectors else None
        """Until the slot is free again."""
        self.error: LoraxError | None = None
        self.verification = verification
        """Once all bytes are here, and checked as far as they will be."""
        self.has_arrived = has_arrived
        """Whether all bytes are on this machine. Quick, from any thread."""
        self.streamed = False
        """Somebody holds it before its last layer: single layers are waited for."""
        self.copied = 0
        """Copies that ended; counted by the I/O threads, under their lock."""
        self._tickets: dict[int, CopyTicket] = {}
        self._num_layers = num_layers
        self._watermark = 0
        self._changed = threading.Condition()
        self._loop = running_loop()
        self._sleepers: dict[asyncio.Future[None], int] = {}

    def sent(self, group: int, ticket: CopyTicket) -> None:
        """The device was asked for a group's copy. From any thread."""
        self._tickets[group] = ticket

    def tickets(self, layer: int) -> list[CopyTicket] | None:
        """Of the copies of `layer` and of the groups before it that may not be done; None if some
        have not been asked for. From any thread.
        """
        groups = range(self._watermark, self._needed(layer))
        tickets = [self._tickets.get(group) for group in groups]
        return None if None in tickets else [ticket for ticket in tickets if ticket is not None]

    @property
    def on_its_loop(self) -> bool:
        return self._loop in (None, running_loop())

    @property
    def complete(self) -> bool:
        return self._watermark == len(self.layers)

    def is_ready(self, layer: int) -> bool:
        """Whether the bytes of `layer`, and of those before it, are on the device."""
        return self._watermark >= self._needed(layer)

    async def ready(self, layer: int, check: Callable[[], None]) -> None:
        """Wait on the loader's loop, for as long as `check` does not raise."""
        needed = self._needed(layer)
        await self.until(lambda: self._watermark >= needed, check, needed)

    async def until(
        self, reached: Callable[[], bool], check: Callable[[], None], needed: int | None = None
    ) -> None:
        """As `ready`, for what is looked at whenever tasks are woken, and at a watermark."""
        if not self.on_its_loop:
            raise UsageError("a handle is awaited on the event loop of its loader")
        while not reached():
            check()
            sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers[sleeper] = len(self.layers) if needed is None else needed
            try:
                await sleeper
            finally:
                self._sleepers.pop(sleeper, None)
        check()

    def wait(self, layer: int, timeout: float, check: Callable[[], None]) -> None:
        """As `ready`, in a thread; raises also TimeoutError."""
        needed = self._needed(layer)

        def arrived() -> bool:
            check()
            return self._watermark >= needed

        with self._changed:
            if not self._changed.wait_for(arrived, timeout):
                raise TimeoutError

    def wake_threads(self) -> None:
        """Whoever waits in a thread looks again. From any thread."""
        with self._changed:
            self._changed.notify_all()

    def wake_tasks(self) -> None:
        """Whoever waits on the loop looks again."""
        self._wake(len(self.layers))

    def advance(self, watermark: int) -> None:
        """The groups below `watermark` are on the device."""
        with self._changed:
            self._watermark = watermark
            self._changed.notify_all()
        self._wake(watermark)

    def verify(self, verification: Verification) -> None:
        """All bytes are here; how far they were checked."""
        self.verification = self.verification or verification
        self.wake_tasks()

    def check(self) -> None:
        """Raise if the slot must not be used any more."""
        if self.error is not None:
            raise self.error.located() from self.error.__cause__

    def fail(self, error: LoraxError) -> None:
        """The slot must not be used any more."""
        with self._changed:
            self.error = error
            self._changed.notify_all()
        self._wake(len(self.layers))

    def _wake(self, watermark: int) -> None:
        for sleeper, needed in self._sleepers.items():
            if needed <= watermark and not sleeper.done():
                sleeper.set_result(None)

    def _needed(self, layer: int) -> int:
        """The watermark at which `layer` is ready; a layer without tensors is ready at once."""
        if not isinstance(layer, int) or not -1 <= layer <= self._num_layers:
            raise UsageError(f"layer {layer!r} is outside -1 … {self._num_layers}")
        place = bisect_left(self.layers, layer)
        present = place < len(self.layers) and self.layers[place] == layer
        return place + 1 if present else 0


class Promise:
    """A digest that a caller gave, to be held against what is there. On the loop.

    It is one lease's, and of those shared from it. `task` finds out, and ends when they have.
    """

    def __init__(self) -> None:
        self.pending = True
        self.kept: Verification | None = None
        """What the caller's word makes known of the adapter."""
        self.error: LoraxError | None = None
        self.task: asyncio.Task[None] | None = None
        self._leases: set[Lease] = set()

    def join(self, lease: Lease) -> Self:
        lease.promise = self
        self._leases.add(lease)
        return self

    def leave(self, lease: Lease) -> None:
        self._leases.discard(lease)
        if not self._leases and self.task is not None:  # which may be done
            self.task.cancel()

    def settle(self, kept: Verification | None, error: LoraxError | None = None) -> None:
        self.kept, self.error, self.pending = kept, error, False


class Lease:
    """The right to use one tenancy, held by one handle.

    `ended(lease, in_use, soon)` and `quiet(lease)` are called once each, in whatever thread ends
    the lease or, if that left a kernel running, its last kernel.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        ended: Callable[[Lease, bool, bool], None],
        quiet: Callable[[Lease], None],
    ) -> None:
        self.tenancy = tenancy
        self.id: str | None = None
        """What the holder calls the adapter, for its errors."""
        self.holder = ""
        """Name of the task that holds it."""
        self.stale = False
        """The source could not be asked when it was wanted, and last named this version."""
        self.promise: Promise | None = None
        self._ended = ended
        self._quiet = quiet
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._uses = 0
        self._why_closed: str | None = None

    @property
    def closed(self) -> bool:
        return self._why_closed is not None

    def check(self) -> None:
        """Raise unless the slot may be used now."""
        if os.getpid() != self._pid:
            raise UsageError("a handle belongs to the process of its loader")
        if self._why_closed is not None:
            raise HandleClosedError(self._why_closed, id=self.id, key=self.tenancy.key)
        self.require_sound()

    def require_sound(self) -> None:
        """Raise what broke the slot, or what it holds for this lease; ended or not."""
        error = self.tenancy.error
        if error is None and self.promise is not None:
            error = self.promise.error
        if error is not None:
            raise error.located(id=self.id) from error.__cause__

    @property
    def is_verified(self) -> bool:
        """Whether it is known how far the bytes were checked. From any thread."""
        pending = self.promise is not None and self.promise.pending
        return self.tenancy.verification is not None and not pending

    async def verified(self, check: Callable[[], None]) -> Verification:
        """Wait on the loader's loop until it is known how far the bytes were checked."""
        tenancy, promise = self.tenancy, self.promise
        await tenancy.until(lambda: self.is_verified, check)
        assert tenancy.verification is not None
        return (promise and promise.kept) or tenancy.verification

    def begin_use(self) -> None:
        """A kernel is about to read the slot; raises if the lease does not allow it any more."""
        with self._lock:
            self.check()
            self._uses += 1

    def end_use(self) -> None:
        with self._lock:
            self._uses -= 1
            quiet = self.closed and self._uses == 0
        if quiet:
            self._quiet(self)

    def end(self, why: str = "the handle was released", *, soon: bool = False) -> None:
        """Idempotent. A kernel that runs keeps the slot from being reused until it is done.

        With `soon`, decisions follow on the loop's next turn: a finalizer may run anywhere, also
        in the midst of another decision.
        """
        if os.getpid() != self._pid:
            return  # a forked child's copy: the lease is the parent's
        with self._lock:
            if self.closed:
                return
            self._why_closed = why
            in_use = self._uses > 0
        self.tenancy.wake_threads()
        self._ended(self, in_use, soon)
