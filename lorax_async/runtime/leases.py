"""Leases on adapters' slots, the slot occupancies that they share, pins, and digests of callers."""

from __future__ import annotations

import asyncio
import os
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lorax_async.concurrency import SharedTasks, result_of, running_loop
from lorax_async.devices.base import CopyTicket, Device
from lorax_async.devices.staging import TORCH_DTYPES
from lorax_async.devices.transfer import SlotCopies
from lorax_async.errors import HandleClosedError, IntegrityError, LoraxError, UsageError
from lorax_async.formats.tensor_kinds import PARAMETERS, WHOLE, TensorRole
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.lru import remember
from lorax_async.planning.transfer_plan import ExtraSlot, TransferPlan
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey, Ref, Verification, expected_digest

_MAX_COPIED = 4_096
"""The limit of versions whose weights are known to be finite."""


TOKENS = TensorRole.TOKENS


class ExtraTensors:
    """What kernels do not read of one slot occupancy: vectors, whole modules, trained tokens.

    Dropped when the slot is freed. A module is named by its index in the layout
    (`ModelLayout.at`).
    """

    def __init__(self, plan: TransferPlan, grant: SlotGrant) -> None:
        self._extras = {
            (extra.module, extra.part): (extra, Extent(extent.offset + extra.offset, extra.nbytes))
            for group, extent in zip(plan.groups, grant.extents, strict=True)
            for extra in group.extras
        }
        self.whole = frozenset(module for module, part in self._extras if part in WHOLE)
        """The modules of which the adapter has the weight or the bias itself."""
        self.biases = [module for module, part in self._extras if part is TensorRole.OWN_BIAS]
        """Of these, the modules with a bias."""
        self.trained = frozenset(module for module, part in self._extras if part is TOKENS)
        """The modules of which the adapter has rows of tokens."""
        self.parameters = frozenset(module for module, part in self._extras if part in PARAMETERS)
        """The bare parameters that the adapter changes."""
        self.needing_ties = [it.module for it, _ in self._extras.values() if it.needs_tie]
        """Of those with trained tokens, the modules with which another has to be tied."""

    @property
    def modules(self) -> list[int]:
        """The modules with a bias or a magnitude beside A and B."""
        beside = {TensorRole.BIAS, TensorRole.MAGNITUDE}
        return [module for module, part in self._extras if part in beside]

    def view(self, device: Device, module: int, part: TensorRole) -> torch.Tensor | None:
        """Return a view on the device, as `ExtraSlot` says; None if the adapter has no such tensor.

        The bytes are valid once the module's layer is ready.
        """
        found = self._extras.get((module, part))
        if found is None:
            return None
        extra, extent = found
        return device.view(extent).view(TORCH_DTYPES[extra.dtype]).view(extra.shape)

    def rows(self, module: int) -> int | None:
        """Return the rows of a whole module's weight; None if the adapter has none."""
        found = self._extras.get((module, TensorRole.WEIGHT))
        return None if found is None else found[0].shape[0]

    def slot(self, module: int, part: TensorRole) -> ExtraSlot:
        """Return the slot of a tensor that the adapter has."""
        return self._extras[module, part][0]

    def tokens(self, module: int) -> tuple[int, ...]:
        """Return the tokens of a module whose rows the adapter has."""
        found = self._extras.get((module, TensorRole.TOKENS))
        return () if found is None else found[0].tokens


class SlotOccupancy(SlotCopies):
    """One adapter's use of a slot: its copies, watermark, error. Shared by all its leases."""

    def __init__(
        self,
        key: AdapterKey,
        grant: SlotGrant,
        plan: TransferPlan,
        num_layers: int,
        verification: Verification | None = None,
        has_arrived: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(plan, grant)
        self.key = key
        self.layers = plan.layers
        self.extras = ExtraTensors(plan, grant) if plan.has_extras else None
        """None once the slot is free."""
        self.error: LoraxError | None = None
        self.verification = verification
        """Set once all bytes are here and checked."""
        self.has_arrived = has_arrived
        """Return whether all bytes are on this machine. Quick, thread-safe."""
        self._num_layers = num_layers
        self.watermark = 0
        """The groups below it are on the device."""
        self._changed = threading.Condition()
        self._loop = running_loop()
        self._sleepers: dict[asyncio.Future[None], int] = {}

    def tickets(self, layer: int) -> list[CopyTicket] | None:
        """Return the tickets of copies up to `layer` that may not be done. Thread-safe.

        None if some of the copies are not enqueued yet.
        """
        groups = range(self.watermark, self._needed(layer))
        tickets = [self.group_tickets.get(group) for group in groups]
        return None if None in tickets else [ticket for ticket in tickets if ticket is not None]

    @property
    def on_its_loop(self) -> bool:
        return self._loop in (None, running_loop())

    @property
    def complete(self) -> bool:
        return self.watermark == len(self.layers)

    def is_ready(self, layer: int) -> bool:
        """Return whether the bytes of `layer` and of those before it are on the device."""
        return self.watermark >= self._needed(layer)

    async def ready(self, layer: int, check: Callable[[], None]) -> None:
        """Wait on the loader's loop until `layer` is ready; raise what `check` raises meanwhile."""
        needed = self._needed(layer)
        await self.until(lambda: self.watermark >= needed, check, needed)

    async def until(
        self, reached: Callable[[], bool], check: Callable[[], None], needed: int | None = None
    ) -> None:
        """Wait on the loader's loop until `reached()`; raise what `check` raises meanwhile.

        Both are called at each `wake_tasks`, and from the watermark `needed` on at each `advance`.
        """
        if not self.on_its_loop:
            raise UsageError("await a handle on the event loop of its loader")
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
        """Wait as `ready` does, in a thread; raise `TimeoutError` after `timeout` seconds."""
        needed = self._needed(layer)

        def is_reached() -> bool:
            check()
            return self.watermark >= needed

        with self._changed:
            if not self._changed.wait_for(is_reached, timeout):
                raise TimeoutError

    def wake_threads(self) -> None:
        """Let waiting threads check again. Thread-safe."""
        with self._changed:
            self._changed.notify_all()

    def wake_tasks(self, watermark: int | None = None) -> None:
        """Let waiting tasks check again; only those that need at most `watermark`. On the loop."""
        for sleeper, needed in self._sleepers.items():
            if (watermark is None or needed <= watermark) and not sleeper.done():
                sleeper.set_result(None)

    def advance(self, watermark: int) -> None:
        """Raise the watermark: the groups below it are on the device."""
        self.watermark = watermark
        self.wake_threads()
        self.wake_tasks(watermark)

    def fail(self, error: LoraxError) -> None:
        """Make the slot unusable and wake its waiters."""
        self.error = error
        self.wake_threads()
        self.wake_tasks()

    def _needed(self, layer: int) -> int:
        """Return the watermark at which `layer` is ready: 0 for a layer without tensors."""
        if not isinstance(layer, int) or not -1 <= layer <= self._num_layers:
            raise UsageError(f"layer {layer!r} is outside -1 … {self._num_layers}")
        group = bisect_left(self.layers, layer)
        present = group < len(self.layers) and self.layers[group] == layer
        return group + 1 if present else 0


@dataclass(eq=False)
class Lease:
    """The right to use one slot occupancy, held by one handle.

    `ended(lease, in_use, soon)` is called once, in the thread that ends the lease; if a kernel
    still runs then, `quiet(lease)` is called once, in the thread that ends the last use.
    """

    occupancy: SlotOccupancy
    ended: Callable[[Lease, bool, bool], None]
    quiet: Callable[[Lease], None]
    id: str | None = None
    """The holder's id of the adapter, for errors."""
    holder: str = ""
    """The name of the holder's task."""
    stale: bool = False
    """Whether the source was unreachable, and this is the version that it named last."""
    verified_by_caller: Verification | None = None
    """The verification by the digest in the holder's ref, if it has one."""

    def __post_init__(self) -> None:
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
            raise UsageError("use a handle in the process of its loader")
        if self._why_closed is not None:
            raise HandleClosedError(self._why_closed, id=self.id, key=self.occupancy.key)
        self.require_sound()

    def require_sound(self) -> None:
        """Raise the error of the slot, if there is one."""
        error = self.occupancy.error
        if error is not None:
            raise error.located(id=self.id) from error.__cause__

    @property
    def is_verified(self) -> bool:
        """Whether all checks of the bytes have ended. Thread-safe."""
        return self.occupancy.verification is not None

    async def verified(self, check: Callable[[], None]) -> Verification:
        """Wait on the loader's loop until `is_verified`; return how the bytes were checked."""
        occupancy = self.occupancy
        await occupancy.until(lambda: self.is_verified, check)
        assert occupancy.verification is not None
        return self.verified_by_caller or occupancy.verification

    def begin_use(self) -> None:
        """Count a kernel that will read the slot; raise if the lease does not allow it."""
        with self._lock:
            self.check()
            self._uses += 1

    def end_use(self) -> None:
        with self._lock:
            self._uses -= 1
            quiet = self.closed and self._uses == 0
        if quiet:
            self.quiet(self)

    def end(self, why: str = "the handle was released", *, soon: bool = False) -> None:
        """End the lease. Idempotent, thread-safe. The slot is not reused before kernels have ended.

        With `soon`, decisions follow on the loop's next turn: a finalizer may run at any point,
        also within another decision.
        """
        if os.getpid() != self._pid:
            return  # a copy in a forked child: the lease is the parent's
        with self._lock:
            if self.closed:
                return
            self._why_closed = why
            in_use = self._uses > 0
        self.occupancy.wake_threads()
        self.ended(self, in_use, soon)


@dataclass(eq=False)
class LeaseTable:
    """The slot occupancies and leases of a loader. On the loop.

    `lease_ended(lease, in_use, soon)` and `lease_quiet(lease)` may be called in any thread.
    """

    lifecycle: Lifecycle
    num_layers: int
    lease_ended: Callable[[Lease, bool, bool], None]
    lease_quiet: Callable[[Lease], None]
    leases: dict[AdapterKey, set[Lease]] = field(default_factory=dict, init=False)
    occupancies: dict[AdapterKey, SlotOccupancy] = field(default_factory=dict, init=False)
    _copied: OrderedDict[AdapterKey, None] = field(default_factory=OrderedDict, init=False)

    def occupy(
        self, key: AdapterKey, grant: SlotGrant, plan: TransferPlan, verified: Verification | None
    ) -> SlotOccupancy:
        life = self.lifecycle.states[key]
        occupancy = self.occupancies[key] = SlotOccupancy(
            key, grant, plan, self.num_layers, verified, lambda: life.has_arrived
        )
        occupancy.was_checked = key in self._copied
        return occupancy

    def note_copied(self, key: AdapterKey) -> None:
        """Remember that all weights of this version are on the device, and so were checked."""
        remember(self._copied, key, None, _MAX_COPIED)

    def vacate(self, key: AdapterKey) -> None:
        self.occupancies.pop(key).extras = None

    def verified(self, key: AdapterKey, verification: Verification) -> None:
        """Record how an adapter's bytes were checked, once all are here."""
        occupancy = self.occupancies.get(key)
        if occupancy is not None:
            occupancy.verification = occupancy.verification or verification
            occupancy.wake_tasks()

    def new_lease(self, key: AdapterKey) -> Lease:
        """Return a lease that the lifecycle counts already."""
        occupancy = self.occupancies[key]
        occupancy.streamed = occupancy.streamed or not occupancy.complete
        lease = Lease(occupancy, self.lease_ended, self.lease_quiet)
        self.leases.setdefault(key, set()).add(lease)
        return lease

    def try_lease(self, key: AdapterKey) -> Lease | None:
        """Return a lease if the adapter is resident, else None."""
        return None if self.lifecycle.take_lease(key) is None else self.new_lease(key)

    def share(self, lease: Lease) -> Lease:
        """Return another lease on the same slot occupancy; raise if `lease` is not usable."""
        lease.check()
        self.lifecycle.add_lease(lease.occupancy.key)
        shared = self.new_lease(lease.occupancy.key)
        shared.stale, shared.verified_by_caller = lease.stale, lease.verified_by_caller
        return shared

    def end_lease(self, lease: Lease) -> None:
        held = self.leases[lease.occupancy.key]
        held.remove(lease)
        if not held:
            del self.leases[lease.occupancy.key]
        lease.occupancy.wake_tasks()


@dataclass(eq=False)
class PinTable:
    """The pins of a loader by name. On the loop; `execute` carries out the lifecycle's commands."""

    lifecycle: Lifecycle
    execute: Callable[[list[Command]], None]
    _pins: dict[object, tuple[AdapterKey, SlotGrant]] = field(default_factory=dict, init=False)

    @property
    def names(self) -> tuple[object, ...]:
        return tuple(self._pins)

    def pin(self, name: object, lease: Lease) -> bool:
        """Pin the leased adapter for `name`, in place of its earlier pin.

        Return False, without effect, if the adapter is being unloaded or its slot was given up.
        """
        lease.check()
        key, grant = lease.occupancy.key, lease.occupancy.grant
        if self._pins.get(name) == (key, grant):
            return True
        commands = self.lifecycle.pin(key)
        if commands is None:
            return False
        earlier, self._pins[name] = self._pins.get(name), (key, grant)
        self.execute(commands)
        if earlier is not None:
            self.execute(self.lifecycle.unpin(*earlier))
        return True

    def unpin(self, name: object) -> bool:
        """Remove the pin of `name`; return whether it had one."""
        pinned = self._pins.pop(name, None)
        if pinned is None:
            return False
        self.execute(self.lifecycle.unpin(*pinned))
        return True

    def drop(self, key: AdapterKey) -> None:
        """Remove all pins of an adapter that is about to be unloaded, which ends them."""
        self._pins = {name: pin for name, pin in self._pins.items() if pin[0] != key}


# -- digests of callers ----------------------------------------------------------------------------

MAX_DIGESTS = 65_536
"""Digests of weights kept; the oldest is dropped first."""


@dataclass(eq=False)
class DigestChecks:
    """Compares digests, and lets `source` hash weights of unknown digest, once for all callers.

    `check_open` raises once the store or loader is closing.
    """

    source: Source
    check_open: Callable[[], None]

    def __post_init__(self) -> None:
        self._known: OrderedDict[AdapterKey, str] = OrderedDict()
        self._hashing = SharedTasks(self._run, lambda key: f"lorax digest {key}")
        self._waiting: set[Lease] = set()

    async def compare(
        self, ref: Ref, key: AdapterKey, known: Verification | None
    ) -> Verification | None:
        """Compare the weights of `key` with the digest in `ref`, if any; hash them if needed.

        `known` is the key's verification, if it is known. Return the verification by the digest.
        Raise `IntegrityError` for a mismatch, and what hashing raises.
        """
        expected = expected_digest(ref)
        if expected is None:
            return None
        digest = self._known_digest(key, known)
        if digest is None:
            with self._hashing.join(key) as task:
                digest = await result_of(task, "verify", self.check_open)
        if digest == expected:
            return Verification("sha256", expected)
        raise IntegrityError(
            f"its weights have the sha256 {digest}, not {expected} as requested; request the"
            " version with that digest, or correct the digest",
            key=key,
            stage="verify",
            retryable=False,
        )

    def agrees(self, ref: Ref, key: AdapterKey, known: Verification | None) -> bool:
        """Return whether the digest in `ref`, if any, is known to match."""
        expected = expected_digest(ref)
        return expected is None or self._known_digest(key, known) == expected

    async def require(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Compare a lease's weights with the digest in `ref`, if any, once all bytes are here.

        Raise as `compare`, the slot's error, or `LoaderClosedError` when the loader is closing.
        """
        if expected_digest(ref) is None:
            return

        def check() -> None:
            self.check_open()
            lease.check()

        self._waiting.add(lease)
        try:
            verification = await lease.verified(check)
        finally:
            self._waiting.discard(lease)
        lease.verified_by_caller = await self.compare(ref, key, verification)

    async def stop(self) -> None:
        """End all waits and tasks, once `check_open` raises; leases stay."""
        for lease in self._waiting:
            lease.occupancy.wake_tasks()
        await self._hashing.stop()

    def _known_digest(self, key: AdapterKey, known: Verification | None) -> str | None:
        """Return the known sha256 of `key`, or None."""
        if known is not None and known.digest and known.kind in ("sha256", "transport"):
            return known.digest
        return self._known.get(key)

    async def _run(self, key: AdapterKey) -> str:
        digest = await self.source.digest(key)
        remember(self._known, key, digest, MAX_DIGESTS)
        return digest
