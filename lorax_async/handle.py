"""What a caller holds of an adapter on a device: a lease, with views of its weights."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self, SupportsIndex

import torch

from lorax_async.concurrency import running_loop
from lorax_async.config import Shard
from lorax_async.devices.base import Device
from lorax_async.errors import AdapterTimeoutError, LoraxError, UsageError
from lorax_async.events import SlotId
from lorax_async.formats.peft_names import TensorRole
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.runtime.leases import AdapterVectors, Lease
from lorax_async.types import AdapterKey, Verification


@dataclass(frozen=True, slots=True, eq=False)
class ModuleWeights:
    """One module's part of an adapter: the delta is `scale * (x @ a.T) @ b.T`.

    Of an embedding `x @ a.T` is `a.T[ids]`. With a bias the delta is `scale * ((x @ a.T) @ b.T +
    bias)`. With a magnitude the rows of the base's weight plus delta are scaled to that length.

    Attributes
    ----------
    a, b
        `[rank, in]` and `[out, rank]`: views on the device, valid while the handle is held. Of a
        sharded loader `in` and `out` are the shard's (`loader.held_layout`).
    scale, rank
        As PEFT computes them; the rank is the true one, without padding.
    bias, magnitude
        `[out]`, in the file's dtype: lora_bias's and DoRA's; None where the adapter has none. Of a
        sharded loader's row-parallel module they are whole: for after the all-reduce, once.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rank: int
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


class ModuleViews(Mapping[str, ModuleWeights]):
    """By the layout's names, for the layers that are ready; each look checks the lease."""

    def __init__(self, lease: Lease, device: Device, layout: ModelLayout) -> None:
        self._lease = lease
        self._device = device
        self._layout = layout
        self._rows: dict[int, TableRow] = {
            row.module: row for group in lease.occupancy.plan.groups for row in group.rows
        }

    def __getitem__(self, name: str) -> ModuleWeights:
        self._lease.check()
        module = self._layout.index(name)
        if module not in self._rows:
            raise KeyError(name)
        row = self._rows[module]
        layer = self._layout.modules[module].layer
        if not self._lease.occupancy.is_ready(layer):
            raise UsageError(f"layer {layer} is not here yet; await layer_ready({layer})")
        operands = self._device.operands(module, self._lease.occupancy.grant.slot.index)
        assert operands is not None
        a, b, _ = operands
        bias, magnitude = (
            self._vector(module, TensorRole.BIAS),
            self._vector(module, TensorRole.MAGNITUDE),
        )
        weights = (a[: row.rank], b[:, : row.rank])
        return ModuleWeights(*weights, row.scale, row.rank, bias, magnitude)

    def _vector(self, module: int, part: TensorRole) -> torch.Tensor | None:
        vectors = self._lease.occupancy.vectors
        return None if vectors is None else vectors.view(self._device, module, part)

    def __iter__(self) -> Iterator[str]:
        return (self._layout.modules[module].name for module in self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class AdapterHandle:
    """A lease on one adapter: while it is held, the adapter stays where it is.

    Leave it as a context manager, or call `release`. Views taken from it must not be used after.
    """

    def __init__(
        self,
        id: str,
        lease: Lease,
        device: Device,
        layout: ModelLayout,
        timeout: float,
        share: Callable[[Lease], Lease],
        shard: Shard | None = None,
    ) -> None:
        self.id = id
        self.shard = shard
        """Which part of every tensor-parallel module the weights are; None: they are whole."""
        self._lease = lease
        self._share = share
        lease.id = id
        self._device = device
        self._layout = layout
        self._timeout = timeout

    @property
    def key(self) -> AdapterKey:
        """Which version of which files."""
        return self._lease.occupancy.key

    @property
    def slot(self) -> SlotId:
        """The column of the device's tables, and which of its tenants this is."""
        return self._lease.occupancy.grant.slot

    @property
    def device(self) -> Device:
        """Where it is: its loader's device, with the tables that kernels read."""
        return self._device

    @property
    def layout(self) -> ModelLayout:
        """Its loader's base model."""
        return self._layout

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return self._lease.occupancy.plan.rank

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the device."""
        return self._lease.occupancy.plan.nbytes

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer groups with tensors: -1 before the layers, 0 … L-1, L after them."""
        return self._lease.occupancy.layers

    @property
    def timeout(self) -> float:
        """Seconds after which its waits give up, unless they are told otherwise."""
        return self._timeout

    @property
    def resident(self) -> bool:
        """Whether every layer is on the device."""
        return self._lease.occupancy.complete

    @property
    def arrived(self) -> bool:
        """Whether all its bytes are on this machine: layers that are missing are not far away."""
        occupancy = self._lease.occupancy
        return occupancy.complete or occupancy.has_arrived()

    @property
    def released(self) -> bool:
        return self._lease.closed

    @property
    def stale(self) -> bool:
        """The source could not be asked, and this is the version that it last named."""
        return self._lease.stale

    @property
    def modules(self) -> Mapping[str, ModuleWeights]:
        """Weights by the layout's module names, for the layers that are ready."""
        self._lease.check()
        return ModuleViews(self._lease, self._device, self._layout)

    @property
    def vectors(self) -> AdapterVectors | None:
        """Its biases or magnitudes; None where kernels, which read A, B and scale, have it all."""
        self._lease.check()
        return self._lease.occupancy.vectors

    def is_ready(self, layer: int) -> bool:
        """Whether the tensors of `layer` (-1 … L), and those before them, are on the device.

        A layer that the adapter does not touch is ready at once. Touches no lock.
        """
        return self._lease.occupancy.is_ready(layer)

    async def layer_ready(self, layer: int, timeout: float | None = None) -> None:
        """Wait until `is_ready(layer)`, `timeout` seconds at most (None: the config's).

        Raises the error that ended the load, `AdapterTimeoutError`, `HandleClosedError` after
        release, `UsageError` for a layer that the base does not have, or on another loop.
        """
        self._lease.check()
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                await self._lease.occupancy.ready(layer, self._lease.check)
        except TimeoutError as error:
            if not deadline.expired() or isinstance(error, LoraxError):
                raise
            raise self._too_late(layer, seconds) from None

    def wait_layer(self, layer: int, timeout: float | None = None) -> None:
        """As `layer_ready`, in a thread without an event loop.

        Raises `UsageError` where it would hold a loop, which may be the one to bring the layer.
        """
        self._lease.check()
        if not self.is_ready(layer) and running_loop() is not None:
            raise UsageError("wait_layer would hold the event loop; await layer_ready, or a thread")
        seconds = self._timeout if timeout is None else timeout
        try:
            self._lease.occupancy.wait(layer, seconds, self._lease.check)
        except TimeoutError as error:
            if isinstance(error, LoraxError):
                raise
            raise self._too_late(layer, seconds) from None

    def _too_late(self, layer: int, seconds: float) -> AdapterTimeoutError:
        problem = f"layer {layer} did not arrive within {seconds:g} s"
        return AdapterTimeoutError(problem, id=self.id, key=self.key, stage="copy")

    @property
    def is_verified(self) -> bool:
        """Whether `verified` has nothing to wait for: nothing can turn out to be false any more."""
        return self._lease.is_verified

    def require_sound(self) -> None:
        """Raise `IntegrityError`, or whatever broke the adapter under this handle, released or not.

        For computations that go on for long under one `use`. Touches no lock; in any thread.
        """
        self._lease.require_sound()

    async def verified(self, timeout: float | None = None) -> Verification:
        """Wait until all bytes are here and checked as far as they will be; how far that was.

        Raises `IntegrityError` if they are not what was promised (whoever holds the adapter gets
        it, from every use), or not what this handle's `digest` says (then other handles may go on);
        `AdapterTimeoutError` and the rest as `layer_ready`.
        """
        self._lease.check()
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await self._lease.verified(self._lease.check)
        except TimeoutError as error:
            if not deadline.expired() or isinstance(error, LoraxError):
                raise
        problem = f"not all of it was here and checked within {seconds:g} s"
        raise AdapterTimeoutError(problem, id=self.id, key=self.key, stage="verify")

    def queue_behind(self, layer: int, stream: object | None = None) -> bool:
        """Let what is put on a stream from here on run after `layer`, and those before it, arrived.

        Blocks nobody: the device itself waits. False if some copies have not been asked for yet;
        then nothing was done, and `layer_ready` or `wait_layer` is the way. `stream` is one of the
        device's library (on cuda a `torch.Stream`); None is the current one. In any thread.
        """
        self._lease.check()
        tickets = self._lease.occupancy.tickets(layer)
        if tickets is None:
            return False
        for ticket in tickets:
            self._device.wait_for(ticket, stream)
        return True

    @contextmanager
    def use(self, stream: object | None = None) -> Iterator[None]:
        """Hold the slot's bytes for a computation, in any thread.

        A handle that is released meanwhile, by anybody, gives its slot back only after the end: on
        a device that computes later, when what is on `stream` (None: the current one) has run.
        """
        self._lease.begin_use()
        try:
            yield
        finally:
            self._end_use(stream)

    def _end_use(self, stream: object | None) -> None:
        try:
            ticket = self._device.note_use(stream)
        except BaseException:
            self._lease.end_use()
            raise
        ticket.add_done_callback(lambda _: self._lease.end_use())

    def clone(self) -> Self:
        """One more handle on the same adapter, to be released by itself. On the loader's loop.

        Where this handle may be used the other one may be had, also while the adapter is leaving:
        that takes until both are released.
        """
        self._lease.check()
        if not self._lease.occupancy.on_its_loop:
            raise UsageError("a handle is cloned on the event loop of its loader")
        lease = self._share(self._lease)
        lease.holder = current_task_name()
        return type(self)(
            self.id, lease, self._device, self._layout, self._timeout, self._share, self.shard
        )

    def release(self) -> None:
        """Give the lease back. Synchronous, idempotent, from any thread."""
        self._lease.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UsageError("a handle is one lease and cannot be copied; use clone()")

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.closed:
            lease.end("the handle was forgotten", soon=True)
            warnings.warn(
                f"an adapter handle of {self.id!r} was never released; use `async with`",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        state = "released" if self.released else "resident" if self.resident else "streaming"
        return f"<AdapterHandle {self.id!r} {state} slot {self.slot.index} rank {self.rank}>"


def current_task_name() -> str:
    """Of the running task; empty where there is none."""
    task = asyncio.current_task()
    return task.get_name() if task is not None else ""
