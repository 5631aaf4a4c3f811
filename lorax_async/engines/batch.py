"""One batch of an attached model: the adapter of each row, and how it is applied."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import inf
from threading import Lock
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from lorax_async.devices.base import Device
from lorax_async.devices.base_copies import BaseCopies, plain_weight
from lorax_async.engines import experts
from lorax_async.engines.layer_gate import LayerGate, PassSpans
from lorax_async.errors import LoraxError, UsageError
from lorax_async.formats.tensor_kinds import TensorRole
from lorax_async.handle import AdapterHandle, ParameterWeights
from lorax_async.lru import remember
from lorax_async.planning.batch_plan import BASE_ONLY, plan_rows
from lorax_async.planning.layout import Adaptable, Module, Parameter
from lorax_async.runtime.leases import ExtraTensors
from lorax_async.telemetry import Tracer
from lorax_kernels import Operands, Plan, Tables, Thresholds, apply

T = TypeVar("T")

MAX_PLANS = 4
"""Enough for the prefill and the decoding step of two batches. A plan keeps at most
`Thresholds.kept_bytes`."""


class PlanCache(Generic[T]):
    """A thread-safe cache of the most recently used plans."""

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._plans: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the plan of `key`, made by `make` if missing. `make` must not block."""
        with self._lock:
            plan = self._plans.get(key) or make()
            remember(self._plans, key, plan, self._max_plans)
            return plan

    def forget(self) -> None:
        with self._lock:
            self._plans.clear()


_NORM_ELEMENTS = 1 << 24
"""Elements of a base's weight per step of computing norms: 64 MiB in float32."""

Segment = tuple[int, int, int]
"""(start, stop, slot), as in a plan."""


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedModule:
    """A module of the model, its layout entry, and the entry's index.

    `group` holds the indices of the modules with the same input, or is empty; `parameters` those
    of the module's bare parameters. `flat` is whether it is beside fused experts, whose inputs are
    `[rows * tokens, in]`.
    """

    base: nn.Module
    module: Adaptable
    index: int
    group: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()
    flat: bool = False


class DoraFactors:
    """DoRA's factors of outputs: the magnitude of each row of a weight, divided by its norm.

    Float32 `[out]`, computed from the base's weight at the first use and kept until the adapter
    leaves its slot. Thread-safe.
    """

    def __init__(self) -> None:
        self._factors: WeakKeyDictionary[ExtraTensors, dict[int, torch.Tensor]] = (
            WeakKeyDictionary()
        )
        self._lock = Lock()

    def of(
        self,
        extras: ExtraTensors,
        magnitude: torch.Tensor,
        operands: Operands,
        adapted: AdaptedModule,
    ) -> torch.Tensor:
        """Return the adapter's factors for a module."""
        with self._lock:
            factors = self._factors.setdefault(extras, {})
            factor = factors.get(adapted.index)
            if factor is None:
                factor = _factor(magnitude, operands, adapted)
                if factor.device.type != "cpu":  # the next use may be on another stream
                    torch.accelerator.current_stream(factor.device).synchronize()
                factors[adapted.index] = factor
        return factor

    def forget(self) -> None:
        with self._lock:
            self._factors.clear()


def _add_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: Operands,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    base: nn.Module,
) -> None:
    a, b, scale = operands
    delta = linear(linear(x, a), b, None if bias is None else bias.to(b.dtype))
    if factor is None:
        y.add_(delta.mul_(scale))
        return
    base_bias = getattr(base, "bias", None)
    unbiased = y if base_bias is None else y - base_bias
    y.add_((factor - 1) * unbiased + factor * delta * scale)


def _add_embedded(
    y: torch.Tensor,
    ids: torch.Tensor,
    operands: Operands,
    factor: torch.Tensor | None,
    base: nn.Module,
) -> None:
    a, b, scale = operands
    delta = embedding(ids, a.T) @ b.T
    if delta.dtype != y.dtype:
        raise ValueError(f"expected y in {y.dtype}, and the adapter's product is {delta.dtype}")
    delta = (delta if factor is None else factor * delta) * scale
    embed_scale = getattr(base, "embed_scale", None)
    if embed_scale is not None:
        # The base's output is scaled already.
        delta *= torch.as_tensor(embed_scale, dtype=delta.dtype, device=delta.device)
    y.copy_((y if factor is None else factor * y) + delta)


def _factor(magnitude: torch.Tensor, operands: Operands, adapted: AdaptedModule) -> torch.Tensor:
    """Return `magnitude / ‖weight + scale * B @ A‖`, with the norm of each row of `[out, in]`."""
    weight, (a, b, scale) = _weight_rows(adapted), operands
    step = max(1, _NORM_ELEMENTS // weight.shape[1])
    norms = []
    for rows, b_rows in zip(torch.split(weight, step), torch.split(b, step), strict=True):
        # In the memory order of the weight: fast to add, and PEFT's order of summation.
        left, right = b_rows.float(), a.float()
        delta = left @ right if rows.is_contiguous() else (right.T @ left.T).T
        norms.append(torch.linalg.norm(delta.mul_(scale).add_(rows), dim=1))
    return magnitude.float() / torch.cat(norms)


def _weight_rows(adapted: AdaptedModule) -> torch.Tensor:
    """Return the base's weight as `[out, in]`. Raises `UsageError` for a packed one."""
    module, weight = adapted.module, plain_weight(adapted.base)
    assert isinstance(module, Module)
    if weight is not None and weight.shape == module.weight_shape:
        return weight.T if module.transposed or module.embedding else weight
    weight = cast(torch.Tensor, adapted.base.weight)  # checked by `attach`
    raise UsageError(
        f"DoRA needs the base's weight, and that of module {module.name!r} is a"
        f" {type(weight).__name__} of {weight.dtype} on {weight.device}; load the model with plain"
        " weights, or merge the adapter into its base"
    )


class ReplacedModules:
    """The base's modules with the parameters of an adapter, made at their first use.

    Kept until the adapter leaves its slot. Thread-safe.
    """

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[ExtraTensors, dict[int, nn.Module]] = WeakKeyDictionary()
        self._lock = Lock()

    def of(self, extras: ExtraTensors, device: Device, adapted: AdaptedModule) -> nn.Module:
        """Return the module with the adapter's weight and bias. Raises `UsageError` as `_own`."""
        with self._lock:
            modules = self._modules.setdefault(extras, {})
            found = modules.get(adapted.index)
            if found is None:
                found = modules[adapted.index] = _replaced(extras, device, adapted)
        return found

    def forget(self) -> None:
        with self._lock:
            self._modules.clear()


def _replaced(extras: ExtraTensors, device: Device, adapted: AdaptedModule) -> nn.Module:
    """Return a copy of a module that shares everything but its parameters."""
    base = adapted.base
    parameters = dict(base.named_parameters(recurse=False))
    for key, part in (("weight", TensorRole.WEIGHT), ("bias", TensorRole.OWN_BIAS)):
        own, given = parameters.get(key), extras.view(device, adapted.index, part)
        if given is None:
            continue
        if own is None or type(own) is not nn.Parameter or not own.is_floating_point():
            kind = "none" if own is None else f"a {type(own).__name__} of {own.dtype}"
            raise UsageError(
                f"the adapter replaces the {key} of module {adapted.module.name!r}, and the model's"
                f" is {kind}; load the model with plain weights"
            )
        if given.dtype != own.dtype and isinstance(adapted.module, Module):
            raise UsageError(
                f"module {adapted.module.name!r} has {own.dtype} weights, and the loader stores"
                f" whole modules in {given.dtype}; make it with another LoaderConfig.dtype"
            )
        if given.dtype != own.dtype:  # those of other modules have the file's
            given = given.to(own.dtype)
            if given.device.type != "cpu":  # the next use may be on another stream
                torch.accelerator.current_stream(given.device).synchronize()
        parameters[key] = cast(nn.Parameter, given)
    made = object.__new__(type(base))
    vars(made).update(vars(base))
    vars(made)["_parameters"] = {**vars(base)["_parameters"], **parameters}
    vars(made).pop("forward", None)  # that of `attach`
    return made


Rows = Sequence[AdapterHandle | None] | None
"""One adapter or None (the base) per row; None for a batch of any size that uses the base only."""


class BatchPlans(NamedTuple):
    """The kernels' plan, and the segments of adapters with bias or DoRA."""

    kernel: Plan
    others: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoaderLocation:
    """A loader's device and event loop, with what an attached model keeps for its adapters.

    `tables` are the device's; `factors` belong to the model's weights; `plans` to the latest
    batches. `copies` compare with the model while it is attached; `replaced` are its modules with
    adapters' parameters. `caps_logits` is whether the model changes the head's outputs, so that
    -inf would not stay what it is. `tied` has the embedding's index of each head that shares its
    weight, `parameters` the bare ones by index.
    """

    device: Device
    tables: Tables
    loop: asyncio.AbstractEventLoop
    factors: DoraFactors
    plans: PlanCache[BatchPlans]
    copies: BaseCopies
    caps_logits: bool = False
    tied: Mapping[int, int] = field(default_factory=dict)
    parameters: Mapping[int, Parameter] = field(default_factory=dict)
    tracer: Tracer = field(default_factory=Tracer)
    replaced: ReplacedModules = field(default_factory=ReplacedModules)

    def with_tied(self, modules: frozenset[int]) -> frozenset[int]:
        """Return the modules with the heads that are tied to one of them."""
        heads = (head for head, module in self.tied.items() if module in modules)
        return modules.union(heads) if modules else modules


class ModelBatch:
    """The rows of one batch. Layers may be computed in any thread.

    The adapters stay in use until the block is left and the layers that began before are done: a
    cancelled task leaves its thread in the middle of a forward pass.
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
        # If a row may be out, the bits of the other rows must not depend on it.
        self._thresholds = Thresholds(kept_bytes=0) if self.gate.may_take_out else Thresholds()
        self._place = place
        self._rows = None if rows is None else len(rows)
        self._slots = [BASE_ONLY if row is None else row.slot.index for row in rows or ()]
        self._handles = tuple(dict.fromkeys(row for row in rows or () if row is not None))
        self._extras: dict[int, ExtraTensors] = {}  # by slot
        self.replaced: frozenset[int] = frozenset()
        """The modules that an adapter of the batch replaces, or bare parameters that it changes,
        as indices into the layout."""
        self._row_slots = tuple(None if row is None else row.slot for row in rows or ())
        self._tokens = 0
        """Tokens per row of the pass, by the last input that told it."""
        self._flat: tuple[ReferenceType[torch.Tensor], torch.Tensor] | None = None
        self._uses = ExitStack()
        self._lock = Lock()
        self._running = 1  # the block itself
        self._ended = False

    def begin(self) -> None:
        """Use the adapters; raise as `AdapterHandle.use` and use none.

        With a budget, an adapter that has failed is out from the start.
        """
        with ExitStack() as uses:
            for handle in self._handles:
                try:
                    uses.enter_context(handle.use())
                    if (extras := handle.extras) is not None:
                        self._extras[handle.slot.index] = extras
                        self.replaced |= extras.whole | extras.parameters
                        self.replaced |= self._place.with_tied(extras.trained)
                except UsageError:
                    raise
                except LoraxError as error:
                    self.gate.leave_out(handle, error)
            self._uses = uses.pop_all()
        if self._place.tracer.on is not None:
            rows = "base" if self._rows is None else f"rows: {self._rows}"
            slots = [handle.slot.index for handle in self._handles]
            self.gate.spans = PassSpans(self._place.tracer, rows, slots)

    def end(self) -> None:
        """Refuse further layers. Do not wait for a running one."""
        self._ended = True
        self._leave()  # after the flag: a layer that missed it has entered already

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Keep the adapters in use for one layer. Raises `UsageError` once the block is left."""
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
            if self.gate.spans is not None:
                self.gate.spans.leave()
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            if self.gate.spans is not None:
                self.gate.spans.end()
            self._uses.close()

    def check(self, x: torch.Tensor, module: Adaptable) -> None:
        """Raise UsageError if `x` `[rows, tokens, in]` has another number of rows."""
        if self._rows is not None and x.dim() == 3 and x.shape[0] != self._rows:
            raise UsageError(
                f"module {module.name!r} got {x.shape[0]} rows in a batch of {self._rows}; give "
                "one adapter or None per row (beams and return sequences multiply the rows)"
            )

    def replace(
        self,
        base: Callable[..., torch.Tensor],
        inputs: tuple[torch.Tensor, ...],
        adapted: AdaptedModule,
    ) -> torch.Tensor:
        """Return the output of a module that adapters of the batch replace, row by row.

        `base` is the base's forward. Rows of another number of features, of a resized vocabulary,
        are as wide as the widest: what a row has no logits for is -inf.
        """
        self.gate.enter(adapted.module.layer)
        out, index = self.gate.slots_out, adapted.index
        whole = self._rows_of(lambda extras: index in extras.whole)
        place = self._place
        modules = {
            slot: place.replaced.of(self._extras[slot], place.device, adapted)
            for slot in whole
            if slot not in out
        }
        alone = len(set(self._slots)) == 1
        if alone and modules:
            (module,) = modules.values()
            return _guarded(_compute(module, inputs))
        if not alone and any(x.dim() < 2 or x.shape[0] != self._rows for x in inputs):
            raise _mixed_error(adapted.module, inputs, self._rows)
        known = inputs
        if adapted.module.embedding and whole:
            # The base may not know the ids of these rows.
            known = (inputs[0].index_fill(0, _rows_like(chain(*whole.values()), inputs[0]), 0),)
        y = base(*known)
        if isinstance(adapted.module, Module):
            y = self.adapt(y, known[0], adapted)
            self._write_tokens(y, known[0], adapted)
        for slot, module in modules.items():
            rows = _rows_like(whole[slot], y)
            own = _compute(module, tuple(x[rows] for x in inputs))
            if own.shape[-1] != y.shape[-1] and place.caps_logits:
                raise UsageError(
                    f"module {adapted.module.name!r}: the model caps its logits, so that rows with"
                    " vocabularies of different sizes cannot share a batch; give each a batch"
                )
            y = _with_rows(y, rows, own)
        return y

    def change(
        self, base: Callable[..., Any], inputs: tuple[torch.Tensor, ...], adapted: AdaptedModule
    ) -> Any:
        """Return the outputs of a module whose bare parameters adapters of the batch change.

        `base` is the base's forward.
        """
        self.gate.enter(adapted.module.layer)
        own = frozenset(adapted.parameters)
        rows = self._rows_of(lambda extras: not own.isdisjoint(extras.parameters))
        adapters = {
            slot: self._parameters(slot, adapted)
            for slot in rows
            if slot not in self.gate.slots_out
        }
        if adapters and len(set(self._slots)) == 1:
            (adapter,) = adapters.values()
            return experts.compute(adapted.base, adapter, inputs)
        if self._rows is None or any(not self._has_rows(x, adapted) for x in inputs):
            raise _mixed_error(adapted.module, inputs, self._rows)
        split = [experts.split_rows(adapted.base, x, self._rows) for x in inputs]
        changed = {row for slot in adapters for row in rows[slot]}
        parts = []
        if rest := [row for row in range(self._rows) if row not in changed]:
            parts.append((rest, base(*(x[:, rest].flatten(0, 2) for x in split))))
        for slot, adapter in adapters.items():
            own_inputs = tuple(x[:, rows[slot]].flatten(0, 2) for x in split)
            parts.append((rows[slot], experts.compute(adapted.base, adapter, own_inputs)))
        return _joined(parts, adapted.base)

    def _has_rows(self, x: torch.Tensor, adapted: AdaptedModule) -> bool:
        """Return whether the tokens of each row are together in an input `x`."""
        if x.dim() > 2:
            return x.shape[0] == self._rows
        return len(x) == experts.slabs_of(adapted.base) * (self._rows or 0) * self._tokens

    def _parameters(self, slot: int, adapted: AdaptedModule) -> dict[str, ParameterWeights]:
        """Return an adapter's share of a module's bare parameters, by their names there."""
        extras, place = self._extras[slot], self._place
        found = {}
        for index in adapted.parameters:
            if index in extras.parameters:
                parameter = place.parameters[index]
                found[parameter.key] = ParameterWeights(parameter, extras, place.device, index)
        return found

    def _rows_of(self, has: Callable[[ExtraTensors], bool]) -> dict[int, list[int]]:
        """Return the rows of each slot whose extras fulfil `has`."""
        rows: dict[int, list[int]] = {}
        slots = {slot for slot, extras in self._extras.items() if has(extras)}
        for row, slot in enumerate(self._slots):
            if slot in slots:
                rows.setdefault(slot, []).append(row)
        return rows

    def _write_tokens(self, y: torch.Tensor, x: torch.Tensor, adapted: AdaptedModule) -> None:
        """Write trained tokens over `y`: their rows in an embedding, their logits in a head."""
        place, index = self._place, adapted.index
        target, alone = y.detach(), len(set(self._slots)) == 1
        for slot, rows in self._rows_of(lambda extras: bool(extras.trained)).items():
            extras = self._extras[slot]
            source = index if index in extras.trained else place.tied.get(index, index)
            weight = extras.view(place.device, source, TensorRole.TOKENS)
            if weight is None or slot in self.gate.slots_out:
                continue
            tokens = _rows_like(extras.tokens(source), y)
            at: Any = slice(None) if alone else _rows_like(rows, y)
            if adapted.module.embedding:
                target[at] = _looked_up(target[at], x[at], tokens, weight, adapted.base)
            else:
                own = target[at]
                own[..., tokens] = linear(x[at], weight)
                target[at] = own

    def adapt(self, y: torch.Tensor, x: torch.Tensor, adapted: AdaptedModule) -> torch.Tensor:
        """Add each row's adapter to the layer's output `y` `[rows, tokens, out]` and return it.

        Waits for streaming adapters and skips those in `gate.out`; without a budget, raises their
        errors, also `IntegrityError` for weights that failed verification.
        """
        if not self._handles:
            return y
        module, tables = adapted.module, self._place.tables
        self.gate.enter(module.layer)
        tokens = self._count_tokens(x, adapted) if isinstance(y, torch.Tensor) else None
        if tokens is None:
            self._require_untouched(x, y, adapted)
            return y
        y = _guarded(y.contiguous())
        flat_y, flat_x = y.detach(), x.detach()
        if not (adapted.flat and x.dim() == 2):
            flat_y, flat_x = flat_y.flatten(0, -2), self._flattened(x, adapted.module.embedding)
        out = self.gate.slots_out
        # Prefill, decoding step or head.
        key = self._row_slots, tokens, out, self._thresholds
        plan = self._place.plans.get(key, partial(self._new_plan, tokens, out))
        others = plan.others
        try:
            if module.embedding:
                others = plan.kernel.segments + others
            else:
                apply(flat_y, flat_x, plan.kernel, adapted.index, tables, group=adapted.group)
            self._add_others(flat_y, flat_x, others, adapted)
        except ValueError as error:
            raise UsageError(
                f"module {module.name!r}: {error}; give the loader the dtype and layout that the"
                " module computes with (autocast changes the dtype)"
            ) from error
        return y

    def _count_tokens(self, x: torch.Tensor, adapted: AdaptedModule) -> int | None:
        """Return the tokens per row of a module's input; None if its rows cannot be told apart."""
        if adapted.flat and x.dim() == 2 and self._rows is not None:
            return self._tokens if x.shape[0] == self._rows * self._tokens else None
        # Embeddings also get positions, one row for all: [1, tokens].
        if x.shape[0] != self._rows or (x.dim() != 2 if adapted.module.embedding else x.dim() < 3):
            return None
        if x.dim() > 3:  # of attention's compressed keys and values, by head
            return x[0, ..., 0].numel()
        self._tokens = x.shape[1]
        return self._tokens

    @torch.no_grad()
    def _add_others(
        self, y: torch.Tensor, x: torch.Tensor, segments: Iterable[Segment], adapted: AdaptedModule
    ) -> None:
        """Add what kernels do not to `y` `[tokens, out]`: bias and DoRA, and embeddings.

        `x` is `[tokens, in]`, or an embedding's ids `[tokens]`. An adapter has vectors for all of
        its modules or for none. Raises ValueError for another dtype than the adapter's,
        `UsageError` if DoRA needs the base's weight and it is packed or meta.
        """
        place, index = self._place, adapted.index
        for start, stop, slot in segments:
            operands = place.tables.operands(index, slot)
            if operands is None:
                continue
            if y.dtype != operands[0].dtype:
                raise ValueError(f"expected y in {operands[0].dtype}, got {y.dtype}")
            bias = factor = None
            if (extras := self._extras.get(slot)) is not None:
                bias = extras.view(place.device, index, TensorRole.BIAS)
                magnitude = extras.view(place.device, index, TensorRole.MAGNITUDE)
                if magnitude is not None:
                    factor = place.factors.of(extras, magnitude, operands, adapted)
            rows = y[start:stop], x[start:stop]
            if adapted.module.embedding:
                _add_embedded(*rows, operands, factor, adapted.base)
            else:
                _add_linear(*rows, operands, bias, factor, adapted.base)

    def _flattened(self, x: torch.Tensor, embedding: bool) -> torch.Tensor:
        """Return `x` as `[tokens, in]`, or an embedding's as `[tokens]`.

        q, k and v get the same view, by which kernels recognize their common input.
        """
        cached = self._flat
        if cached is not None and cached[0]() is x:
            return cached[1]
        flat = x.detach().flatten(0, -1 if embedding else -2).contiguous()
        if flat.data_ptr() == x.data_ptr():  # a copy would not follow later writes to x
            self._flat = ref(x), flat
        return flat

    def _require_untouched(self, x: torch.Tensor, y: Any, adapted: AdaptedModule) -> None:
        """Raise `UsageError` if an adapter changes a module of which rows cannot be told apart."""
        ranks, module = self._place.tables.rank[adapted.index], adapted.module
        if not any(int(ranks[handle.slot.index]) for handle in self._handles):
            return
        if not isinstance(y, torch.Tensor):
            raise UsageError(
                f"module {module.name!r} has several outputs, to which PEFT adds no adapter"
                " either; train one without this module"
            )
        wanted = "[rows, tokens]" if module.embedding else "[rows, tokens, features]"
        raise UsageError(
            f"module {module.name!r} got an input of shape {list(x.shape)}, in which the rows of a"
            f" batch of {self._rows} cannot be told apart; adapters can be applied to {wanted} only"
        )

    def _new_plan(self, tokens: int, out: frozenset[int]) -> BatchPlans:
        segments = plan_rows(self._slots, [tokens] * len(self._slots))
        bounds, slots = segments.bounds, segments.slots
        beside = {slot for slot, extras in self._extras.items() if extras.modules}
        left_out = out.union(beside)
        kernel = Plan.from_segments(
            bounds,
            [BASE_ONLY if slot in left_out else slot for slot in slots],
            device=self._place.tables.rank.device,
            thresholds=self._thresholds,
            max_rank=max(1, *(handle.rank for handle in self._handles)),
        )
        by_slot = zip(bounds, bounds[1:], slots, strict=False)
        beside -= out
        return BatchPlans(kernel, tuple(segment for segment in by_slot if segment[2] in beside))


def _compute(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return what the module's class computes, without hooks, which are the base's."""
    forward: Callable[..., torch.Tensor] = type(module).forward
    return forward(module, *inputs)


def _looked_up(
    y: torch.Tensor, ids: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, base: nn.Module
) -> torch.Tensor:
    """Return an embedding's output with other rows for some tokens. Every input may have them."""
    ordered, order = tokens.sort()
    found = torch.searchsorted(ordered, ids).clamp_(max=len(ordered) - 1)
    own = weight[order[found]]
    scale = getattr(base, "embed_scale", None)
    if scale is not None:
        own = own * torch.as_tensor(scale, dtype=own.dtype, device=own.device)
    return torch.where((ordered[found] == ids).unsqueeze(-1), own, y)


def _rows_like(rows: Iterable[int], tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(rows), device=tensor.device)


def _with_rows(y: torch.Tensor, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return `y` with other rows, and with -inf for features that a row does not have."""
    width = own.shape[-1]
    if width > y.shape[-1]:
        y = nn.functional.pad(y, (0, width - y.shape[-1]), value=-inf)
    elif width < y.shape[-1]:
        own = nn.functional.pad(own, (0, y.shape[-1] - width), value=-inf)
    return y.index_copy(0, rows, own)


def _joined(
    parts: Sequence[tuple[Sequence[int], torch.Tensor | tuple[torch.Tensor, ...]]], base: nn.Module
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return the outputs of a module, of which each part has the given rows."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    outputs = [(rows, (y,) if isinstance(y, torch.Tensor) else y) for rows, y in parts]
    joined = []
    for number, y in enumerate(outputs[0][1]):
        split = [experts.split_rows(base, own[number], len(rows)) for rows, own in outputs]
        joined.append(torch.cat(split, 1)[:, order.to(y.device)].flatten(0, 2))
    return joined[0] if isinstance(parts[0][1], torch.Tensor) else tuple(joined)


def _mixed_error(
    module: Adaptable, inputs: tuple[torch.Tensor, ...], rows: int | None
) -> UsageError:
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    return UsageError(
        f"module {module.name!r} got an input of shape {shapes}, in which the rows of a batch of"
        f" {rows} cannot be told apart, and an adapter replaces this module; give the whole batch"
        " this adapter"
    )


def _guarded(y: torch.Tensor) -> torch.Tensor:
    """Return `y`; if it requires a gradient, a copy that raises `UsageError` when one flows.

    A copy, because `y` may be a view, and torch can crash when it looks for the gradient of a view
    whose memory was written to through `detach`.
    """
    apply: Any = _Inference.apply
    guarded: torch.Tensor = apply(y) if y.requires_grad else y
    return guarded


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, y: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return y.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> NoReturn:  # noqa: ARG004
        raise UsageError(
            "attached adapters are for inference, and a gradient would miss them; detach before"
            " training"
        )
