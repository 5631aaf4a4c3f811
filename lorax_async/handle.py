"""Handles: leases on adapters on a device, with views of their weights."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Self, SupportsIndex

import torch

from lorax_async.concurrency import running_loop
from lorax_async.config import Shard
from lorax_async.devices.base import Device
from lorax_async.errors import AdapterTimeoutError, LoraxError, Stage, UsageError
from lorax_async.events import SlotId
from lorax_async.formats.tensor_kinds import TensorRole
from lorax_async.planning.layout import ModelLayout, Module, Parameter
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.runtime.leases import ExtraTensors, Lease
from lorax_async.types import AdapterKey, Verification


@dataclass(frozen=True, slots=True, eq=False)
class ModuleWeights:
    """One module's part of an adapter: the delta is `scale * (x @ a.T) @ b.T`.

    For an embedding, `x @ a.T` is `a.T[ids]`. With a bias, the delta is `scale * ((x @ a.T) @ b.T +
    bias)`. With a magnitude, each row of the base's weight plus delta is scaled to that length.

    Attributes
    ----------
    a, b
        `[rank, in]` and `[out, rank]`: views on the device, valid until the handle is released. In
        a sharded loader, `in` and `out` are the shard's (`loader.held_layout`).
    scale, rank
        As PEFT computes them; the rank excludes padding.
    bias, magnitude
        `[out]`, in the file's dtype: those of lora_bias and DoRA; None if the adapter has none. For
        a row-parallel module of a sharded loader they are whole: apply them once, after the
        all-reduce.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rank: int
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


class WholeModule(ModuleWeights):
    """A module that the adapter replaces (modules_to_save): it computes with these parameters.

    `weight` and `bias` are views on the device, as `ModuleWeights.a`; None for one that the adapter
    leaves as the base has it. Those of linear modules and embeddings have the loader's dtype,
    others the file's. Of a resized vocabulary, `weight` has another number of rows than the base's.
    It has no A and B: reading them raises `UsageError`. With `tokens`, `weight` has the rows of
    these tokens alone (trainable_token_indices), in place of the embedding's, and of a head's that
    is tied to it.
    """

    __slots__ = ("tokens", "weight")
    weight: torch.Tensor | None
    tokens: tuple[int, ...]

    def __init__(
        self, weight: torch.Tensor | None, bias: torch.Tensor | None, tokens: tuple[int, ...] = ()
    ) -> None:
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "tokens", tokens)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ModuleWeights.__slots__:
            raise UsageError(
                f"the adapter replaces this whole module, and has no {name!r} for it: compute with"
                " its weight and bias, or refuse adapters with handle.extras"
            )
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"WholeModule({self.weight!r}, {self.bias!r}, {self.tokens!r})"


class ParameterWeights(ModuleWeights):
    """A bare parameter that the adapter changes (target_parameters), as of fused experts.

    `expert(n)` has A and B of one expert, of `experts`; a parameter without experts has one.
    `scale` and `rank` are those of all. It has no A and B itself: reading them raises `UsageError`.
    """

    __slots__ = ("_a", "_b", "_swapped", "experts")
    experts: int
    _a: torch.Tensor
    _b: torch.Tensor
    _swapped: bool

    def __init__(
        self, parameter: Parameter, extras: ExtraTensors, device: Device, index: int
    ) -> None:
        slot = extras.slot(index, TensorRole.PARAMETER_A)
        b = extras.view(device, index, TensorRole.PARAMETER_B)
        if b is None:
            b = extras.view(device, index, TensorRole.EXPERTS_B)
        fields: dict[str, object] = {
            "scale": slot.scale,
            "rank": slot.rank,
            "bias": None,
            "magnitude": None,
        }
        fields |= {"experts": parameter.experts, "_swapped": slot.swapped, "_b": b}
        fields |= {"_a": extras.view(device, index, TensorRole.PARAMETER_A)}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def expert(self, number: int) -> ModuleWeights:
        """Return one expert's A `[rank, in]` and B `[out, rank]`, with the scale of all."""
        if not 0 <= number < self.experts:
            raise UsageError(f"there is no expert {number} of {self.experts}")
        a, b, count, rank = self._a, self._b, self.experts, self.rank
        first = a.view(count, rank, -1)[number]
        if b.dim() > 2:  # a block for each part of the rank
            blocks: Any = torch.block_diag  # untyped in torch
            last = b[number][0] if b.shape[1] == 1 else blocks(*b[number])
        else:
            last = b.view(-1, rank, count)[:, :, number]
        if self._swapped:
            first, last = last.T, first.T
        return ModuleWeights(first, last, self.scale, rank)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ModuleWeights.__slots__:
            raise UsageError(
                f"the adapter changes a bare parameter, whose {name!r} has all experts: use"
                " expert(number), or refuse adapters with handle.extras"
            )
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"<ParameterWeights of {self.experts} experts, rank {self.rank}>"


class ModuleViews(Mapping[str, ModuleWeights]):
    """Weights by the layout's module names, for ready layers; each access checks the lease."""

    def __init__(self, lease: Lease, device: Device, layout: ModelLayout) -> None:
        self._lease = lease
        self._device = device
        self._layout = layout
        groups = lease.occupancy.plan.groups
        self._rows: dict[str, TableRow | int] = {
            layout.modules[row.module].name: row for group in groups for row in group.rows
        }
        extras = lease.occupancy.extras
        beside = extras.whole | extras.trained | extras.parameters if extras is not None else ()
        for module in sorted(beside):
            self._rows[layout.at(module).name] = module

    def __getitem__(self, name: str) -> ModuleWeights:
        self._lease.check()
        row = self._rows[name]
        module = row if isinstance(row, int) else row.module
        layer = self._layout.at(module).layer
        if not self._lease.occupancy.is_ready(layer):
            raise UsageError(f"layer {layer} is not ready yet; await layer_ready({layer})")
        entry = self._layout.at(module)
        if isinstance(entry, Parameter):
            extras = self._lease.occupancy.extras
            assert extras is not None
            return ParameterWeights(entry, extras, self._device, module)
        if isinstance(row, int):
            rows = self._extra(module, TensorRole.TOKENS)
            if rows is not None:
                extras = self._lease.occupancy.extras
                return WholeModule(rows, None, extras.tokens(module) if extras else ())
            return WholeModule(self._extra(module, _WEIGHT), self._extra(module, _OWN_BIAS))
        operands = self._device.operands(module, self._lease.occupancy.grant.slot.index)
        assert operands is not None
        a, b, _ = operands
        bias, magnitude = map(partial(self._extra, module), (TensorRole.BIAS, TensorRole.MAGNITUDE))
        rank = row.rank
        return ModuleWeights(a[:rank], b[:, :rank], row.scale, rank, bias, magnitude)

    def _extra(self, module: int, part: TensorRole) -> torch.Tensor | None:
        extras = self._lease.occupancy.extras
        return None if extras is None else extras.view(self._device, module, part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


_WEIGHT, _OWN_BIAS = TensorRole.WEIGHT, TensorRole.OWN_BIAS


class AdapterHandle:
    """A lease on one adapter: the adapter keeps its slot until the handle is released.

    Use it as a context manager (`async with` or `with`), or call `release`. Do not use its views
    after that.
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
        """The part of each tensor-parallel module that the weights are; None for all of it."""
        self._lease = lease
        self._share = share
        lease.id = id
        self._device = device
        self._layout = layout
        self._timeout = timeout

    @property
    def key(self) -> AdapterKey:
        """The exact version of the adapter."""
        return self._lease.occupancy.key

    @property
    def slot(self) -> SlotId:
        """The column of the device's tables, and its generation."""
        return self._lease.occupancy.grant.slot

    @property
    def device(self) -> Device:
        """The loader's device, with the tables that kernels read."""
        return self._device

    @property
    def layout(self) -> ModelLayout:
        """The layout of the loader's base model."""
        return self._layout

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return self._lease.occupancy.plan.rank

    @property
    def nbytes(self) -> int:
        """The adapter's bytes on the device."""
        return self._lease.occupancy.plan.nbytes

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer groups with tensors: -1 before the layers, 0 … L-1, L after them."""
        return self._lease.occupancy.layers

    @property
    def timeout(self) -> float:
        """The default timeout of the handle's waits, in seconds."""
        return self._timeout

    @property
    def resident(self) -> bool:
        """Whether every layer is on the device."""
        return self._lease.occupancy.complete

    @property
    def arrived(self) -> bool:
        """Whether all bytes are on this machine, so that missing layers need no network."""
        occupancy = self._lease.occupancy
        return occupancy.complete or occupancy.has_arrived()

    @property
    def released(self) -> bool:
        return self._lease.closed

    @property
    def stale(self) -> bool:
        """Whether the source was unreachable, and this is the version that it named last."""
        return self._lease.stale

    @property
    def modules(self) -> Mapping[str, ModuleWeights]:
        """Weights by the layout's module names, for the layers that are ready."""
        self._lease.check()
        return ModuleViews(self._lease, self._device, self._layout)

    @property
    def extras(self) -> ExtraTensors | None:
        """What kernels do not read; None if A, B and scale are all."""
        self._lease.check()
        return self._lease.occupancy.extras

    @property
    def vocabulary(self) -> int | None:
        """The tokens of the adapter's own vocabulary; None if it has as many as the base's.

        Its header says so: it raises nothing, also once the adapter has failed.
        """
        extras = self._lease.occupancy.extras
        if extras is None:
            return None
        for index in extras.whole:
            module, rows = self._layout.at(index), extras.rows(index)
            if isinstance(module, Module) and rows not in {None, module.weight_shape[0]}:
                return rows
        return None

    def is_ready(self, layer: int) -> bool:
        """Return whether the tensors of `layer` (-1 … L) and all before it are on the device.

        A layer without tensors is always ready. Takes no lock; thread-safe.
        """
        return self._lease.occupancy.is_ready(layer)

    async def layer_ready(self, layer: int, timeout: float | None = None) -> None:
        """Wait until `is_ready(layer)`, at most `timeout` seconds (None: the config's).

        Raise the error that ended the load, `AdapterTimeoutError`, `HandleClosedError` after
        release, `UsageError` for a layer that the base does not have or on another event loop.
        """
        self._lease.check()
        async with self._within(timeout, f"layer {layer} did not arrive", "copy"):
            await self._lease.occupancy.ready(layer, self._lease.check)

    def wait_layer(self, layer: int, timeout: float | None = None) -> None:
        """Wait as `layer_ready` does, in a thread without an event loop.

        Raise `UsageError` if it would block an event loop, which may be the loader's.
        """
        self._lease.check()
        if not self.is_ready(layer) and running_loop() is not None:
            raise UsageError(
                "wait_layer would block the event loop; await layer_ready, or call it in a thread"
            )
        seconds = self._timeout if timeout is None else timeout
        try:
            self._lease.occupancy.wait(layer, seconds, self._lease.check)
        except TimeoutError as error:
            if isinstance(error, LoraxError):
                raise
            raise self._timeout_error(f"layer {layer} did not arrive", seconds, "copy") from None

    @asynccontextmanager
    async def _within(
        self, timeout: float | None, problem: str, stage: Stage
    ) -> AsyncIterator[None]:
        """Raise `AdapterTimeoutError` if the block takes longer than `timeout`."""
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired() or isinstance(error, LoraxError):
                raise
            raise self._timeout_error(problem, seconds, stage) from None

    def _timeout_error(self, problem: str, seconds: float, stage: Stage) -> AdapterTimeoutError:
        late = f"{problem} within {seconds:g} s"
        return AdapterTimeoutError(late, id=self.id, key=self.key, stage=stage)

    @property
    def is_verified(self) -> bool:
        """Whether `verified` would return at once."""
        return self._lease.is_verified

    def require_sound(self) -> None:
        """Raise the error that made the adapter unusable, if there is one, released or not.

        For long computations within one `use`. Takes no lock; thread-safe.
        """
        self._lease.require_sound()

    async def verified(self, timeout: float | None = None) -> Verification:
        """Wait until all bytes are here and checked; return how they were checked.

        Raise `IntegrityError` if the source's digest does not match (for every handle of the
        adapter), or the caller's `digest` does not (for this handle and its clones only);
        `AdapterTimeoutError` and the others as `layer_ready` does.
        """
        self._lease.check()
        async with self._within(timeout, "it was not fetched and checked", "verify"):
            return await self._lease.verified(self._lease.check)

    def queue_behind(self, layer: int, stream: object | None = None) -> bool:
        """Make a stream wait for the copies of `layer` and of all layers before it.

        Does not block: the device waits. Return False, without effect, if some of the copies have
        not been enqueued yet; use `layer_ready` or `wait_layer` then. `stream` is one of the
        device's library (`torch.Stream` on cuda), None the current one. Thread-safe.
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
        """Keep the slot's bytes for a computation. Thread-safe.

        If the handle is released in the block, its slot is freed after the block: on an
        asynchronous device, once the work on `stream` (None: the current one) has run.
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
        """Return another handle on the same adapter, with its own release. On the loader's loop.

        Also possible while the adapter is leaving, which then takes until both are released.
        """
        self._lease.check()
        if not self._lease.occupancy.on_its_loop:
            raise UsageError("clone a handle on the event loop of its loader")
        lease = self._share(self._lease)
        lease.holder = current_task_name()
        return type(self)(
            self.id, lease, self._device, self._layout, self._timeout, self._share, self.shard
        )

    def release(self) -> None:
        """End the lease. Synchronous, idempotent, thread-safe."""
        self._lease.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UsageError("a handle is one lease and cannot be copied; use clone()")

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.closed:
            lease.end("the handle was garbage-collected", soon=True)
            warnings.warn(
                f"an adapter handle of {self.id!r} was never released; use `async with`",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        state = "released" if self.released else "resident" if self.resident else "streaming"
        return f"<AdapterHandle {self.id!r} {state} slot {self.slot.index} rank {self.rank}>"


def current_task_name() -> str:
    """Return the name of the running task, or an empty string."""
    task = asyncio.current_task()
    return task.get_name() if task is not None else ""
