"""One batch of an attached model: which adapter each row uses, for as long as its block lasts."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, Generic, NoReturn, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from lorax_async.devices.base import Device
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import LoraxError, UsageError
from lorax_async.formats.peft_names import TensorRole
from lorax_async.handle import AdapterHandle
from lorax_async.planning.batch_plan import BASE_ONLY, plan_rows
from lorax_async.planning.layout import Module
from lorax_async.runtime.leases import AdapterVectors
from lorax_async.tracing.recorder import LayerTimes, OpenSpan, Recorder, Tracer
from lorax_kernels import Operands, Plan, Tables, Thresholds, apply

T = TypeVar("T")

MOST = 4
"""Of two batches, a prefill's and a step's each. A plan keeps `Thresholds.kept_bytes` at most."""


class PlanCache(Generic[T]):
    """In any thread; the one that was used longest ago goes first."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The plan of this key; `make` is called where there is none, and must not wait."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = make()
                if len(self._plans) > self._most:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def forget(self) -> None:
        with self._lock:
            self._plans.clear()


_AT_A_TIME = 1 << 24
"""Elements of a base's weight that are measured at a time: 64 MiB in float32."""

Segment = tuple[int, int, int]
"""(start, stop, slot), as a plan's."""


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedModule:
    """A module of the model, what the layout says of it, and its place there.

    `group` are the places of the modules that are given the same input, or nothing.
    """

    base: nn.Module
    module: Module
    index: int
    group: tuple[int, ...] = ()


class DoraFactors:
    """What DoRA multiplies outputs with: the magnitude of each row of a weight, over its length.

    Computed at the first use from the base's weight, float32 `[out]`, and kept until the adapter
    leaves its slot. In any thread.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[AdapterVectors, dict[int, torch.Tensor]] = (
            WeakKeyDictionary()
        )
        self._lock = Lock()

    def of(
        self,
        vectors: AdapterVectors,
        magnitude: torch.Tensor,
        operands: Operands,
        adapted: AdaptedModule,
    ) -> torch.Tensor:
        with self._lock:
            known = self._known.setdefault(vectors, {})
            factor = known.get(adapted.index)
            if factor is None:
                factor = _factor(magnitude, operands, adapted)
                if factor.device.type != "cpu":  # the next one may compute on another stream
                    torch.accelerator.current_stream(factor.device).synchronize()
                known[adapted.index] = factor
        return factor

    def forget(self) -> None:
        with self._lock:
            self._known.clear()


@dataclass(frozen=True, slots=True, eq=False)
class VectorFeatures:
    """Adds to modules' outputs what is not A and B of a linear module.

    `vectors` are those of the batch's adapters that have some, by slot. Such an adapter has them
    for each of its modules.
    """

    device: Device
    tables: Tables
    factors: DoraFactors
    vectors: Mapping[int, AdapterVectors]

    @torch.no_grad()
    def add(
        self, y: torch.Tensor, x: torch.Tensor, segments: Iterable[Segment], adapted: AdaptedModule
    ) -> None:
        """Add each segment's adapter to `y` `[tokens, out]`, in place.

        `x` is `[tokens, in]`, or the ids `[tokens]` that an embedding was given. Raises ValueError
        for a dtype that is not the adapter's, `UsageError` if the base's weight is not there.
        """
        for start, stop, slot in segments:
            operands = self.tables.operands(adapted.index, slot)
            if operands is None:
                continue
            if y.dtype != operands[0].dtype:
                raise ValueError(f"expected y in {operands[0].dtype}, got {y.dtype}")
            add = self._add_embedded if adapted.module.embedding else self._add_linear
            add(y[start:stop], x[start:stop], slot, operands, adapted)

    def _add_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        slot: int,
        operands: Operands,
        adapted: AdaptedModule,
    ) -> None:
        a, b, scale = operands
        bias = self._vector(slot, TensorRole.BIAS, adapted)
        delta = linear(linear(x, a), b, None if bias is None else bias.to(b.dtype))
        factor = self._factor(slot, operands, adapted)
        if factor is None:
            y.add_(delta.mul_(scale))
            return
        own = getattr(adapted.base, "bias", None)
        y.add_((factor - 1) * (y if own is None else y - own) + factor * delta * scale)

    def _add_embedded(
        self,
        y: torch.Tensor,
        ids: torch.Tensor,
        slot: int,
        operands: Operands,
        adapted: AdaptedModule,
    ) -> None:
        a, b, scale = operands
        delta, factor = embedding(ids, a.T) @ b.T, self._factor(slot, operands, adapted)
        if delta.dtype != y.dtype:
            raise ValueError(f"expected y in {y.dtype}, and the adapter's product is {delta.dtype}")
        delta = (delta if factor is None else factor * delta) * scale
        scale_of_all = getattr(adapted.base, "embed_scale", None)
        if scale_of_all is not None:
            # The base's output is scaled already.
            delta *= torch.as_tensor(scale_of_all, dtype=delta.dtype, device=delta.device)
        y.copy_((y if factor is None else factor * y) + delta)

    def _factor(self, slot: int, operands: Operands, adapted: AdaptedModule) -> torch.Tensor | None:
        vectors, magnitude = (
            self.vectors.get(slot),
            self._vector(slot, TensorRole.MAGNITUDE, adapted),
        )
        if vectors is None or magnitude is None:
            return None
        return self.factors.of(vectors, magnitude, operands, adapted)

    def _vector(self, slot: int, part: TensorRole, adapted: AdaptedModule) -> torch.Tensor | None:
        vectors = self.vectors.get(slot)
        return None if vectors is None else vectors.view(self.device, adapted.index, part)


def _factor(magnitude: torch.Tensor, operands: Operands, adapted: AdaptedModule) -> torch.Tensor:
    """`magnitude / |weight + scale * B @ A|`, where lengths are of rows of `[out, in]`."""
    weight, (a, b, scale) = _rows(adapted), operands
    step = max(1, _AT_A_TIME // weight.shape[1])
    lengths = []
    for some, b_rows in zip(torch.split(weight, step), torch.split(b, step), strict=True):
        # In the memory order of the weight: quick to add, and PEFT's order of summation.
        left, right = b_rows.float(), a.float()
        whole = left @ right if some.is_contiguous() else (right.T @ left.T).T
        lengths.append(torch.linalg.norm(whole.mul_(scale).add_(some), dim=1))
    return magnitude.float() / torch.cat(lengths)


def _rows(adapted: AdaptedModule) -> torch.Tensor:
    """The base's weight as `[out, in]`."""
    module, weight = adapted.module, adapted.base.weight
    assert isinstance(weight, torch.Tensor)  # the model was attached
    rows = weight.T if module.transposed or module.embedding else weight
    # Any other type is a packed one's, whatever dtype and shape it says it has.
    plain = type(weight) in {torch.Tensor, nn.Parameter} and weight.is_floating_point()
    if plain and not weight.is_meta and rows.shape == (module.out_features, module.in_features):
        return rows
    raise UsageError(
        f"DoRA scales the rows of the base's weight, and that of module {module.name!r} is a"
        f" {type(weight).__name__} of {weight.dtype} on {weight.device}; give the model its plain"
        " weights, or merge the adapter into its base"
    )


Rows = Sequence[AdapterHandle | None] | None
"""One adapter or None (the base) per row; None for a batch of any size that uses the base only."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlans:
    """The segments of adapters that kernels know, and those of adapters with vectors."""

    kernel: Plan
    others: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoaderLocation:
    """Where a loader's adapters are, and whose thread brings them there.

    `tables` are the device's; `factors` are of the model's weights and the adapters there; `plans`
    are those of the last batches.
    """

    device: Device
    tables: Tables
    loop: asyncio.AbstractEventLoop
    factors: DoraFactors
    plans: PlanCache[BatchPlans]
    tracer: Tracer = field(default_factory=Tracer)


class ModelBatch:
    """The rows of one batch. Layers may be computed in any thread.

    The adapters' bytes stay where they are until the block was left and the last layer that had
    begun by then is done: a cancelled task leaves its thread in the middle of a forward pass.
    """

    def __init__(
        self,
        rows: Rows,
        place: LoaderLocation,
        budget: float | None = None,
        others_wait: Callable[[], bool] = lambda: False,
        *,
        beside: bool = False,
    ) -> None:
        self.gate = LayerGate(rows or (), place.loop, budget, others_wait, beside=beside)
        # Where a row may be out, the bits of the others must not depend on it.
        self._thresholds = Thresholds(kept_bytes=0) if self.gate.may_take_out else Thresholds()
        self._place = place
        self._rows = None if rows is None else len(rows)
        self._slots = [BASE_ONLY if row is None else row.slot.index for row in rows or ()]
        self._handles = tuple(dict.fromkeys(row for row in rows or () if row is not None))
        self._vectors: dict[int, AdapterVectors] = {}
        self._features = VectorFeatures(place.device, place.tables, place.factors, self._vectors)
        self._lease_table = tuple(None if row is None else row.slot for row in rows or ())
        self._flat: tuple[ReferenceType[torch.Tensor], torch.Tensor] | None = None
        self._uses = ExitStack()
        self._lock = Lock()
        self._running = 1  # the block itself
        self._ended = False
        self._recorded: tuple[Recorder, OpenSpan, LayerTimes] | None = None

    def begin(self) -> None:
        """Hold the adapters; raises what `AdapterHandle.use` raises, and then holds none.

        With a budget, an adapter that has failed is out from the beginning.
        """
        with ExitStack() as uses:
            for handle in self._handles:
                try:
                    uses.enter_context(handle.use())
                    if (vectors := handle.vectors) is not None:
                        self._vectors[handle.slot.index] = vectors
                except UsageError:
                    raise
                except LoraxError as error:
                    self.gate.leave_out(handle, error)
            self._uses = uses.pop_all()
        if (recorder := self._place.tracer.on) is not None:
            self._record(recorder)

    def _record(self, recorder: Recorder) -> None:
        rows = "base" if self._rows is None else f"rows: {self._rows}"
        span = recorder.begin("compute", "passes", rows, adapters=len(self._handles))
        self.gate.times = LayerTimes(recorder, [handle.slot.index for handle in self._handles])
        self._recorded = recorder, span, self.gate.times

    def end(self) -> None:
        """No further layer is computed. Does not wait for one that has begun."""
        self._ended = True
        self._leave()  # after those that did not see it had entered

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While one layer is computed; raises UsageError once the block was left."""
        with self._lock:
            if self._ended:
                raise UsageError(
                    "the block of this batch was left before its forward pass was done; "
                    "await the pass inside the block"
                )
            self._running += 1
        try:
            yield
        finally:
            if self.gate.times is not None:
                self.gate.times.left()
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            if self._recorded is not None:
                recorder, span, times = self._recorded
                times.end()
                recorder.end(span)
            self._uses.close()

    def check(self, x: torch.Tensor, module: Module) -> None:
        """Raise UsageError if `x` `[rows, tokens, in]` has another number of rows."""
        if self._rows is not None and x.dim() == 3 and x.shape[0] != self._rows:
            raise UsageError(
                f"module {module.name!r} got {x.shape[0]} rows in a batch of {self._rows}; give "
                "one adapter or None per row (beams and return sequences multiply the rows)"
            )

    def adapt(self, y: torch.Tensor, x: torch.Tensor, adapted: AdaptedModule) -> torch.Tensor:
        """Add each row's adapter to `y` `[rows, tokens, out]`, the layer's output, and return it.

        Waits for adapters that still stream, and leaves out those that are `gate.out`; without a
        budget it raises their errors, also `IntegrityError` once one turned out to be false.
        """
        if not self._handles:
            return y
        self.gate.enter(adapted.module.layer)
        if not self._has_rows(x, adapted.module):
            self._require_untouched(x, adapted)
            return y
        y = y.contiguous()
        flat_y, flat_x = y.detach().flatten(0, 1), self._flattened(x)
        try:
            self._add(flat_y, flat_x, self._plan(x.shape[1]), adapted)
        except ValueError as error:
            raise UsageError(
                f"module {adapted.module.name!r}: {error}; give the loader the dtype and layout "
                "that the module computes with (autocast changes the dtype)"
            ) from error
        if y.requires_grad:
            on_gradient: Any = y.register_hook  # untyped in torch
            on_gradient(_refuse_gradient)
        return y

    def _has_rows(self, x: torch.Tensor, module: Module) -> bool:
        """Whether the first dimension of the module's input is the batch's rows.

        Embeddings are also given positions, which are one row for all: `[1, tokens]`.
        """
        return x.dim() == 2 and x.shape[0] == self._rows if module.embedding else x.dim() == 3

    def _add(
        self, y: torch.Tensor, x: torch.Tensor, plan: BatchPlans, adapted: AdaptedModule
    ) -> None:
        """To `y` `[tokens, out]`: by the kernels, and what these do not know."""
        if adapted.module.embedding:
            self._features.add(y, x, plan.kernel.segments + plan.others, adapted)
            return
        apply(y, x, plan.kernel, adapted.index, self._place.tables, group=adapted.group)
        self._features.add(y, x, plan.others, adapted)

    def _flattened(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as `[tokens, in]`: the same view again for q, k and v, by which kernels know it."""
        known = self._flat
        if known is not None and known[0]() is x:
            return known[1]
        flat = x.detach().flatten(0, 1).contiguous()
        if flat.data_ptr() == x.data_ptr():  # a copy would not follow what is written to x
            self._flat = ref(x), flat
        return flat

    def _require_untouched(self, x: torch.Tensor, adapted: AdaptedModule) -> None:
        """Without a dimension of rows nobody can say whose tokens these are."""
        ranks, module = self._place.tables.rank[adapted.index], adapted.module
        if any(int(ranks[handle.slot.index]) for handle in self._handles):
            wanted = "[rows, tokens]" if module.embedding else "[rows, tokens, features]"
            raise UsageError(
                f"module {module.name!r} got an input of shape {list(x.shape)}, in which the rows "
                f"of a batch of {self._rows} cannot be told apart; adapters can be applied to "
                f"{wanted} only"
            )

    def _plan(self, tokens: int) -> BatchPlans:
        """Of rows with `tokens` tokens each: a prefill's, a decoding step's, the head's."""
        out = self.gate.slots_out
        key = self._lease_table, tokens, out, self._thresholds
        return self._place.plans.get(key, partial(self._new_plan, tokens, out))

    def _new_plan(self, tokens: int, out: frozenset[int]) -> BatchPlans:
        segments = plan_rows(self._slots, [tokens] * len(self._slots))
        bounds, slots = segments.bounds, segments.slots
        left_out = out.union(self._vectors)
        kernel = Plan.from_segments(
            bounds,
            [BASE_ONLY if slot in left_out else slot for slot in slots],
            device=self._place.tables.rank.device,
            thresholds=self._thresholds,
            max_rank=max(handle.rank for handle in self._handles),
        )
        each = zip(bounds, bounds[1:], slots, strict=False)
        vectors = self._vectors.keys() - out
        return BatchPlans(kernel, tuple(segment for segment in each if segment[2] in vectors))


def _refuse_gradient(_: torch.Tensor) -> NoReturn:
    raise UsageError(
        "attached adapters answer only, and a gradient would miss them; detach before training"
    )
