"""Apply many adapters in one batch of a Hugging Face decoder.

    attached = attach(model, loader)
    with attached.batch([pirate, None, shout]):  # a handle, or None for the base, per row
        await asyncio.to_thread(model.generate, **inputs, max_new_tokens=32)

The batch is a context variable: it applies to the code of its block, also in `asyncio.to_thread`.
For other threads (`run_in_executor`, `threading.Thread`) pass the context on, inside the block:

    context = contextvars.copy_context()
    await loop.run_in_executor(pool, context.run, functools.partial(model, input_ids))

A streaming handle is accepted: every layer waits for its own weights (up to a budget: see
`LayerGate`), so do not run the model on the event loop's thread. Adapters are for inference; a
gradient through them raises `UsageError`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NoReturn, Self, cast

import torch
from torch import nn

from lorax_async.config import DTYPES, Shard
from lorax_async.engines.batch import (
    AdaptedModule,
    DoraFactors,
    LoaderLocation,
    ModelBatch,
    PlanCache,
    Rows,
)
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import ConfigError, LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.layouts import is_conv1d, is_lookup
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, OtherModule, Parallelism, Parameter

_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def groups_of(modules: Iterable[Module]) -> dict[int, tuple[int, ...]]:
    """Return, by module index, the indices of all modules with the same input, itself included.

    Derived from the names below one parent. It is a hint: kernels compare the tensor itself before
    they reuse a shrunk input.
    """
    kinds = {name: kind for kind, names in enumerate(_SAME_INPUT) for name in names}
    found: dict[tuple[str, int, int], list[int]] = {}
    for index, module in enumerate(modules):
        parent, _, name = module.name.rpartition(".")
        if name in kinds and not module.embedding:
            found.setdefault((parent, kinds[name], module.in_features), []).append(index)
    return {index: tuple(group) for group in found.values() if len(group) > 1 for index in group}


def modules_of(model: nn.Module, layout: ModelLayout, shard: Shard | None) -> list[nn.Module]:
    """Return the model's modules in the layout's order; raise `ConfigError` for differences.

    `shard` is the shard that the layout's sizes describe.
    """
    found = dict(model.named_modules())
    mismatches = (_mismatch(found.get(module.name), module) for module in layout.modules)
    if problems := [problem for problem in mismatches if problem is not None]:
        base, remedy = "the loader's base", "make the layout with layouts.from_module(model)"
        if shard is not None:
            base = f"the {shard} that the loader holds"
            remedy = "for a whole model make the loader without a shard"
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(f"the model is not {base}: {'; '.join(problems[:3])}{more}; {remedy}")
    return [found[module.name] for module in layout.modules]


def _mismatch(found: nn.Module | None, module: Module) -> str | None:
    if found is None:
        return f"it has no module {module.name!r}"
    kind = type(found).__name__
    if isinstance(found, nn.Embedding) != module.embedding:
        return f"module {module.name!r} is a {kind}"
    if isinstance(found, nn.Linear):
        sizes = found.in_features, found.out_features
    elif isinstance(found, nn.Embedding):
        sizes = found.num_embeddings, found.embedding_dim
        if not is_lookup(module.name, found):
            return f"module {module.name!r} ({kind}) does more than look up tokens or positions"
    elif is_conv1d(found):
        sizes = found.nx, found.nf
    else:
        return f"module {module.name!r} is a {kind}"
    if sizes != (module.in_features, module.out_features):
        wanted = f"{module.in_features} → {module.out_features}"
        return f"module {module.name!r} is {sizes[0]} → {sizes[1]}, not {wanted}"
    return None


def require_fit(modules: list[nn.Module], stored: str, device: torch.device) -> None:
    """Raise `ConfigError` unless the model computes in the dtype `stored` of adapters, on `device`.

    The dtype of most modules counts, as in `layouts.from_module`: a router may be wider. Integer
    weights, which are quantised, are ignored.
    """
    weights: list[torch.Tensor] = [cast(Any, module).weight for module in modules]
    floating = Counter(weight.dtype for weight in weights if weight.dtype.is_floating_point)
    if floating:
        computed = str(floating.most_common(1)[0][0]).removeprefix("torch.")
        if computed not in DTYPES:
            raise ConfigError(
                f"the model computes in {computed}; convert it to one of {', '.join(DTYPES)}"
            )
        if computed != stored:
            raise ConfigError(
                f"the model computes in {computed} and the loader stores adapters in {stored}; make"
                f" it with LoaderConfig(dtype={computed!r})"
            )
    for weight in weights:
        if weight.device.type != device.type:
            raise ConfigError(
                f"the model is on {weight.device} and the loader's adapters are on {device}; move"
                " the model, or set another LoaderConfig.device"
            )


Forward = Callable[..., torch.Tensor]


def attach(model: nn.Module, loader: AdapterLoader) -> AttachedModel:
    """Make the model's modules apply the adapters of `loader`, row by row.

    Only the modules' `forward` changes, not names, parameters, `state_dict`, hooks or tied weights.
    Takes milliseconds, on the loader's event loop. The model is unchanged after an error.

    `model` is the base that `loader.held_layout` describes: `nn.Linear` and transformers' `Conv1D`
    modules with inputs `[rows, tokens, features]`, and embeddings with inputs `[rows, tokens]`.
    The adapters of `loader`, which is open, have the dtype in which the model computes.

    Raises
    ------
    ConfigError
        Modules, shapes, dtype or device of model and loader do not fit each other.
    UsageError
        The model is attached already, or the loader is closed or belongs to another loop.
    """
    arguments: tuple[object, object] = (model, loader)
    if not (isinstance(arguments[0], nn.Module) and isinstance(arguments[1], AdapterLoader)):
        kinds = " and ".join(type(each).__name__ for each in arguments)
        raise UsageError(f"attach takes an nn.Module and its AdapterLoader, not {kinds}")
    device, tables = loader.device, loader.tables
    loop = asyncio.get_running_loop()
    copies = loader.base_copies
    bases = modules_of(model, loader.held_layout, loader.config.shard)
    place = LoaderLocation(
        device,
        tables,
        loop,
        DoraFactors(),
        PlanCache(),
        copies,
        caps_logits=_caps_logits(model),
        tied=_tied_heads(bases, loader.held_layout.modules),
        parameters=loader.held_layout.parameters_by_index,
        tracer=loader.tracer,
    )
    require_fit(bases, str(loader.config.dtype), place.tables.rank.device)
    if any(isinstance(vars(base).get("forward"), AdaptedForward) for base in bases):
        raise UsageError("the model has adapters attached already; detach them first")
    copies.use_model(bases)
    return AttachedModel(model, bases, loader.held_layout, place)


def _is_beside(path: str, owners: set[str]) -> bool:
    """Return whether a module is in one of `owners`, and none of the experts themselves."""
    ends = [n for n, character in enumerate(path) if character == "."]
    return ".experts." not in path and any(path[:end] in owners for end in ends)


def _tied_heads(bases: list[nn.Module], modules: Sequence[Module]) -> dict[int, int]:
    """Return the index of the embedding whose weight a linear module shares, by the latter's."""
    weights: list[Any] = [getattr(base, "weight", None) for base in bases]
    embeddings = {id(weights[n]): n for n, module in enumerate(modules) if module.embedding}
    return {
        n: embeddings[id(weight)]
        for n, weight in enumerate(weights)
        if not modules[n].embedding and id(weight) in embeddings
    }


def _caps_logits(model: nn.Module) -> bool:
    """Return whether the model caps its logits, as Gemma 2 does."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "final_logit_softcapping", None))


class AttachedModel:
    """A model with adapters; `detach` it, or use it as a context manager."""

    def __init__(
        self, model: nn.Module, bases: list[nn.Module], layout: ModelLayout, place: LoaderLocation
    ) -> None:
        self._model, self._layout, modules = model, layout, layout.modules
        self._place = place
        self._current: ContextVar[ModelBatch | None] = ContextVar("lorax batch", default=None)
        self._lock = Lock()
        self._open: set[ModelBatch] = set()
        groups = groups_of(modules)
        owners = {it.module.rpartition(".")[0] for it in layout.parameters}
        self._replaced = [
            AdaptedForward(
                self,
                AdaptedModule(
                    base, module, index, groups.get(index, ()), flat=_is_beside(module.name, owners)
                ),
            )
            for index, (base, module) in enumerate(zip(bases, modules, strict=True))
        ]
        for replaced in self._replaced:
            replaced.install()
        self._others: dict[str, AdaptedForward] = {}
        """By path, of the modules that an adapter of a batch has replaced, or their parameters."""

    @contextmanager
    def batch(
        self,
        rows: Rows,
        budget: float | None = None,
        others_wait: Callable[[], bool] = lambda: False,
        *,
        beside: bool = False,
    ) -> Iterator[LayerGate]:
        """Use the adapter `rows[i]` for row i of the model's input within the block.

        With a budget, check the gate's `out` after each pass: these rows were computed without
        their adapters, which failed or did not arrive in time.

        `rows` are per row a handle of this loader, resident or streaming, or None for the base;
        None in place of the sequence: any number of rows, all of the base. `budget`, in seconds
        per pass, `others_wait` and `beside` are `LayerGate`'s.

        Raises
        ------
        UsageError
            Invalid rows, a handle of another loader, or a detached model. Inside the block, the
            model raises it for an input with another number of rows.
        HandleClosedError
            A handle was released before. Inside the block, a release takes effect at its end.
        LoraxError
            The error that ended an adapter's load, without a budget.
        """
        self._check(rows)
        batch = ModelBatch(rows, self._place, budget, others_wait, beside=beside)
        with self._lock:
            if not self._replaced:
                raise UsageError("the adapters were detached from this model; attach again")
            self._open.add(batch)
        try:
            batch.begin()
            if batch.replaced:
                self._install_others(batch)
            token = self._current.set(batch)
            try:
                yield batch.gate
            finally:
                self._current.reset(token)
                batch.end()
        finally:
            with self._lock:
                self._open.remove(batch)

    def current(self) -> ModelBatch:
        """Return the batch of the running context. Raises `UsageError` without one."""
        batch = self._current.get()
        if batch is None:
            raise UsageError(
                "the model has adapters attached and no batch that assigns them to rows; run it "
                "in `with attached.batch([...])` (batch(None) is the base alone), and pass the "
                "context to threads: asyncio.to_thread, or contextvars.copy_context().run"
            )
        return batch

    def detach(self) -> None:
        """Restore the model's own forwards. Idempotent.

        Raises `UsageError`, and changes nothing, while a batch is open (its rows would silently
        lose their adapters), or if a forward was replaced after `attach`.
        """
        with self._lock:
            if self._open:
                raise UsageError(f"batches open on this model: {len(self._open)}; leave them first")
            installed = [*self._replaced, *self._others.values()]
            for replaced in installed:
                replaced.check()
            for replaced in installed:
                replaced.restore()
            self._replaced = []
            self._others.clear()
            self._place.factors.forget()
            self._place.replaced.forget()
            self._place.plans.forget()
            self._place.copies.use_model(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _check(self, rows: Rows) -> None:
        if rows is None:
            return
        if not rows:
            raise UsageError("a batch has at least one row; batch(None) is the base alone")
        for number, row in enumerate(rows):
            if row is None:
                continue
            if not isinstance(row, AdapterHandle):
                raise UsageError(f"row {number} is a {type(row).__name__}; give a handle or None")
            if row.device is not self._place.device:
                raise UsageError(
                    f"row {number}: {row!r} is another loader's; load it with this one"
                )
            try:
                self._require_local(row)
                self._require_ties(row)
            except UsageError:
                raise
            except LoraxError:
                continue  # it has failed: the batch leaves it out, or raises the error

    def _require_ties(self, row: AdapterHandle) -> None:
        """Refuse trained tokens of a pair that is tied in the adapter's base and not in the model.

        And what PEFT does not define: a tied head that the adapter changes otherwise too.
        """
        if row.extras is None or not row.extras.trained:
            return
        tied, extras = self._place.tied, row.extras
        problem = None
        for module in extras.needing_ties:
            if module not in tied.values() and module not in tied:
                problem = "of a tied head, and the model's is not tied to its embedding"
        for head, embedding in tied.items():
            if embedding not in extras.trained:
                continue
            own, changed = extras.tokens(head), self._layout.at(head).name in row.modules
            base: Any = self._replaced[head].base_module
            if (changed and not own) or own == extras.tokens(embedding):
                problem = "whose head, tied to the embedding, it changes otherwise too"
            elif not own and base.bias is not None:
                problem = "of a tied head that has a bias, which PEFT would leave out"
        if problem is not None:
            raise UsageError(f"adapter {row.id!r} has trained tokens {problem}; merge it")

    def _install_others(self, batch: ModelBatch) -> None:
        """Replace the forwards of norms, experts and the like, which only these batches need."""
        first, layout = len(self._layout.modules), self._layout
        try:
            with self._lock:
                for index in sorted(batch.replaced):
                    entry = layout.at(index)
                    path = entry.module if isinstance(entry, Parameter) else entry.name
                    if index < first or path in self._others:
                        continue
                    base, whole = self._model.get_submodule(path), layout.resolve_whole(path)
                    own = index if whole is None else whole
                    adapted = AdaptedModule(
                        base, layout.at(own), own, parameters=layout.parameters_of(path)
                    )
                    self._others[path] = AdaptedForward(self, adapted)
                    self._others[path].install()
        except BaseException:
            batch.end()
            raise

    def _require_local(self, row: AdapterHandle) -> None:
        """Refuse a bias or magnitude of a row-parallel module.

        A bias is added once, after the all-reduce; a row's norm needs all columns.
        """
        if row.shard is None or row.shard.world_size == 1 or row.extras is None:
            return
        for index in (*row.extras.modules, *row.extras.biases):
            module = self._layout.at(index)
            if isinstance(module, Module) and module.parallel is Parallelism.ROW:
                raise UsageError(
                    f"adapter {row.id!r} has a bias or a magnitude for module {module.name!r}, of"
                    f" which {row.shard} has some columns: it cannot be applied before the sum over"
                    " all ranks; apply handle.modules yourself, or replicate the module"
                )


class AdaptedForward:
    """The forward of an attached module: the base's output plus its adapters'.

    It is an instance attribute of the module, as in accelerate's hooks.
    """

    def __init__(self, attached: AttachedModel, adapted: AdaptedModule) -> None:
        self.base: Forward = adapted.base.forward
        self._attached = attached
        self._adapted = adapted
        self.base_module = adapted.base
        self._attributes = vars(adapted.base)
        # An attribute that hid the class's forward, for example of accelerate's hooks.
        self._before: Forward | None = self._attributes.get("forward")

    def __call__(self, x: torch.Tensor, *more: torch.Tensor, **named: Any) -> Any:
        batch, adapted = self._attached.current(), self._adapted
        with batch.computing():
            module = adapted.module
            if not batch.replaced.isdisjoint(adapted.parameters):
                if named or (isinstance(module, OtherModule) and adapted.index in batch.replaced):
                    raise UsageError(
                        f"module {module.name!r} got named inputs, or one adapter of the batch"
                        " replaces it and another changes its parameters; give each a batch"
                    )
                return batch.change(self.base, (x, *more), adapted)
            if adapted.index in batch.replaced:
                batch.check(x, module)
                if named:
                    raise UsageError(
                        f"module {module.name!r} got named inputs, whose rows cannot be told apart,"
                        " and an adapter replaces it; load the adapter's base merged with it"
                    )
                return batch.replace(self.base, (x, *more), adapted)
            if not isinstance(module, Module):
                return self.base(x, *more, **named)
            batch.check(x, module)
            return batch.adapt(self.base(x), x, adapted)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a model is copied or pickled without its adapters; detach first")

    def install(self) -> None:
        self._attributes["forward"] = self

    def check(self) -> None:
        if self._attributes.get("forward") is not self:
            raise UsageError("a module's forward was replaced after attach; undo that first")

    def restore(self) -> None:
        if self._before is None:
            del self._attributes["forward"]  # uncovers the class's
        else:
            self._attributes["forward"] = self._before
