"""One batch of an attached model: which adapter each row uses, for as long as its block lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, NoReturn
from weakref import ReferenceType, ref

import torch

from lorax_async.core.batch_plan import BASE_ONLY, plan_rows
from lorax_async.core.layout import Module
from lorax_async.engines.features import Adapted, Factors, Features, Segment
from lorax_async.engines.last_plans import LastPlans
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.io.ports import Device
from lorax_async.runtime.vectors import Vectors
from lorax_async.tracing.recorder import LayerTimes, Recorder, Span, Tracer
from lorax_kernels import Plan, Tables, Thresholds, apply

Rows = Sequence[AdapterHandle | None] | None
"""One adapter or None (the base) per row; None for a batch of any size that uses the base only."""


@dataclass(frozen=True, slots=True, eq=False)
class RowsPlan:
    """The segments of adapters that kernels know, and those of adapters with vectors."""

    kernel: Plan
    others: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a loader's adapters are, and whose thread brings them there.

    `tables` are the device's; `factors` are of the model's weights and the adapters there; `plans`
    are those of the last batches.
    """

    device: Device
    tables: Tables
    loop: asyncio.AbstractEventLoop
    factors: Factors
    plans: LastPlans[RowsPlan]
    tracer: Tracer = field(default_factory=Tracer)


class Batch:
    """The rows of one batch. Layers may be computed in any thread.

    The adapters' bytes stay where they are until the block was left and the last layer that had
    begun by then is done: a cancelled task leaves its thread in the middle of a forward pass.
    """

    def __init__(
        self,
        rows: Rows,
        place: Place,
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
        self._vectors: dict[int, Vectors] = {}
        self._features = Features(place.device, place.tables, place.factors, self._vectors)
        self._tenants = tuple(None if row is None else row.slot for row in rows or ())
        self._flat: tuple[ReferenceType[torch.Tensor], torch.Tensor] | None = None
        self._uses = ExitStack()
        self._lock = Lock()
        self._running = 1  # the block itself
        self._ended = False
        self._recorded: tuple[Recorder, Span, LayerTimes] | None = None

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

    def adapt(self, y: torch.Tensor, x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
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

    def _add(self, y: torch.Tensor, x: torch.Tensor, plan: RowsPlan, adapted: Adapted) -> None:
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

    def _require_untouched(self, x: torch.Tensor, adapted: Adapted) -> None:
        """Without a dimension of rows nobody can say whose tokens these are."""
        ranks, module = self._place.tables.rank[adapted.index], adapted.module
        if any(int(ranks[handle.slot.index]) for handle in self._handles):
            wanted = "[rows, tokens]" if module.embedding else "[rows, tokens, features]"
            raise UsageError(
                f"module {module.name!r} got an input of shape {list(x.shape)}, in which the rows "
                f"of a batch of {self._rows} cannot be told apart; adapters can be applied to "
                f"{wanted} only"
            )

    def _plan(self, tokens: int) -> RowsPlan:
        """Of rows with `tokens` tokens each: a prefill's, a decoding step's, the head's."""
        out = self.gate.slots_out
        key = self._tenants, tokens, out, self._thresholds
        return self._place.plans.get(key, partial(self._new_plan, tokens, out))

    def _new_plan(self, tokens: int, out: frozenset[int]) -> RowsPlan:
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
        return RowsPlan(kernel, tuple(segment for segment in each if segment[2] in vectors))


def _refuse_gradient(_: torch.Tensor) -> NoReturn:
    raise UsageError(
        "attached adapters answer only, and a gradient would miss them; detach before training"
    )
