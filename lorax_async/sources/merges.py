"""Merges of other sources' adapters, with PEFT's arithmetic: their plan, then their bytes."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import sqrt
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from lorax_async.concurrency import FetchControl, outcome, wait_for_end
from lorax_async.config import Limits
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    FetchError,
    IncompatibleAdapterError,
    LoraxError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.files import Reader
from lorax_async.formats.peft_config import MAX_PATTERNS, parse_config
from lorax_async.formats.peft_names import PREFIX, TensorRole
from lorax_async.formats.safetensors import (
    TensorDescription,
    TensorSpan,
    parse_header,
    write_header,
)
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.pairing import MAX_MATCHING_STEPS, TensorPair, pair_tensors
from lorax_async.planning.transfer_plan import check_size
from lorax_async.sources.base import AdapterFile, Source
from lorax_async.sources.host_copies import HostCopies, HostCopy, host_memory
from lorax_async.types import (
    MAX_FACTOR,
    AdapterKey,
    AdapterSpec,
    Merge,
    MergedKey,
    Verification,
    weakest,
)

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_P = TypeVar("_P")
_T = TypeVar("_T")


class MergedTensor(NamedTuple):
    """A `[rank, in]` or B `[out, rank]` of one module, at [start, stop) of the merged file.

    `pairs` are the module's tensors, with the numbers of their parts. Where they have less than the
    full rank, the rest is zero.
    """

    factor: TensorRole
    shape: tuple[int, int]
    start: int
    stop: int
    pairs: tuple[tuple[int, TensorPair], ...]


class NewLayers(NamedTuple):
    """The layers that PEFT's `add_weighted_adapter` creates and initialises before it merges.

    `sizes` are (in, out) features in the model's order; `start` is `init_lora_weights`.
    """

    rank: int
    sizes: tuple[tuple[int, int], ...]
    start: object


class MergePlan(NamedTuple):
    """A merged adapter: its config, its header, and its tensors in file order."""

    config: bytes
    prefix: bytes
    nbytes: int
    tensors: tuple[MergedTensor, ...]
    new_layers: NewLayers


def plan_merge(
    key: MergedKey, parts: Sequence[AdapterFile], layout: ModelLayout, *, dtype: str, limits: Limits
) -> MergePlan:
    """Check every part as a load of it would, and the parts against each other.

    `dtype` is "F32", "F16" or "BF16". The messages of `AdapterFormatError`,
    `IncompatibleAdapterError` and `UnsupportedAdapterError` name the part or the module.
    """
    specs: list[AdapterSpec] = []
    pieces: dict[int, list[tuple[int, TensorPair]]] = {}
    for number, part in enumerate(parts):
        try:
            spec, pairs = _pair_part(part, layout, limits)
        except LoraxError as error:
            raise error.prefixed(_part_words(key, number)) from error.__cause__
        specs.append(spec)
        for pair in pairs:
            pieces.setdefault(pair.module, []).append((number, pair))
    modules = [(layout.modules[module], pieces[module]) for module in sorted(pieces)]
    config, ranks = _write_config(
        {m.name: _merged_rank(key.merge, m.name, pairs, limits) for m, pairs in modules},
        {spec.base_model for spec in specs},
        limits,
    )
    shapes = [
        (module.name, factor, shape, tuple(pairs))
        for module, pairs in modules
        for factor, shape in (
            (TensorRole.A, (ranks[module.name], module.in_features)),
            (TensorRole.B, (module.out_features, ranks[module.name])),
        )
    ]
    prefix, places = write_header(
        TensorDescription(_tensor_name(name, factor), dtype, shape)
        for name, factor, shape, _ in shapes
    )
    check_size(places[-1][1], "in its merged file", limits)
    tensors = tuple(
        MergedTensor(factor, shape, *place, pairs)
        for (_, factor, shape, pairs), place in zip(shapes, places, strict=True)
    )
    new_layers = NewLayers(
        max([specs[0].rank, *(int(entry.value) for entry in specs[0].rank_patterns)]),
        tuple((module.in_features, module.out_features) for module, _ in modules),
        json.loads(parts[0].config).get("init_lora_weights", True),
    )
    return MergePlan(config, prefix, places[-1][1], tensors, new_layers)


def _part_words(key: MergedKey, number: int) -> str:
    """Return the prefix of an error about one part: its number and its name without the folder."""
    name = str(key.merge.parts[number]).rstrip("/").rpartition("/")[2]
    return f"part {number + 1} ({shorten(name, 100)!r}): "


def _pair_part(
    part: AdapterFile, layout: ModelLayout, limits: Limits
) -> tuple[AdapterSpec, list[TensorPair]]:
    spec = parse_config(part.config, limits)
    header = parse_header(part.prefix, part.reader.nbytes, limits)
    for span in header.tensors:
        if not span.name.endswith(_SUFFIXES):
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} is not plain LoRA, and only plain LoRA can be"
                " merged; load this adapter by itself"
            )
    return spec, pair_tensors(header, spec, layout, limits)


def _merged_rank(
    merge: Merge, module: str, pairs: Sequence[tuple[int, TensorPair]], limits: Limits
) -> int:
    ranks = [pair.rank for _, pair in pairs]
    shown = " and ".join(map(str, ranks))
    for number, pair in pairs:
        if not abs(merge.weights[number] * pair.scale) <= MAX_FACTOR:
            raise AdapterFormatError(
                f"module {module!r}: weight {merge.weights[number]:g} times the scale of part"
                f" {number + 1} ({pair.scale:g}) is more than float32 holds; lower the weight"
            )
    if merge.strategy != "linear":
        if len(set(ranks)) > 1:
            raise IncompatibleAdapterError(
                f"module {module!r}: {merge.strategy!r} merges equal ranks, but the parts have"
                f" {shown}; 'linear' merges any"
            )
        return ranks[0]
    if sum(ranks) > limits.max_rank:
        raise UnsupportedAdapterError(
            f"module {module!r}: 'linear' adds the ranks up, and {shown} make {sum(ranks)}, above"
            f" the limit of {limits.max_rank}; raise Limits.max_rank, or merge fewer adapters"
        )
    return sum(ranks)


def _write_config(
    ranks: Mapping[str, int], bases: set[str | None], limits: Limits
) -> tuple[bytes, Mapping[str, int]]:
    """Return a config with scale 1 and a rank per module, and the resulting ranks.

    If a config cannot express the ranks, or would be too long, all modules get the largest.
    """

    def encoded(ranks: Mapping[str, int]) -> bytes:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        others = {name: other for name, other in ranks.items() if other != rank}
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": next(iter(bases)) if len(bases) == 1 else None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        return json.dumps(config, separators=(",", ":")).encode()

    config = encoded(ranks)
    exceptions = len(ranks) - max(Counter(ranks.values()).values())
    characters = sum(2 * len(_tensor_name(name, TensorRole.A)) for name in ranks)
    if (
        exceptions <= MAX_PATTERNS
        and 2 * exceptions * characters <= MAX_MATCHING_STEPS
        and len(config) <= limits.max_config_bytes
    ):
        spec = parse_config(config, limits)  # a module's name may be another's suffix
        if all(spec.rank_of(name) == spec.alpha_of(name) == rank for name, rank in ranks.items()):
            return config, ranks
    padded = dict.fromkeys(ranks, max(ranks.values()))
    return encoded(padded), padded


def _tensor_name(module: str, factor: TensorRole) -> str:
    return f"{PREFIX}{module}.lora_{factor.value}.weight"


def combine(
    merge: Merge,
    factor: TensorRole,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Merge one module's A, or B, of all parts; return it in float32.

    `factors` are weight and scale of each part. "linear" puts the tensors side by side along the
    rank (PEFT's "cat"), and multiplies A by both; other strategies need equal shapes. DARE draws
    from `generator`, in the state of PEFT's before this tensor.
    """
    tensors = [tensor.float() for tensor in tensors]
    if merge.strategy == "linear":
        if factor is TensorRole.B:
            return torch.cat(tensors, dim=1)
        # Two products, rounded twice as PEFT does.
        pairs = zip(tensors, factors, strict=True)
        return torch.cat([tensor * weight * scale for tensor, (weight, scale) in pairs])
    # A and B share the product of weight and scale; A has the sign.
    roots = [sqrt(abs(weight * scale)) for weight, scale in factors]
    if factor is TensorRole.A:
        signed = zip(roots, factors, strict=True)
        roots = [-root if weight * scale < 0 else root for root, (weight, scale) in signed]
    weights, density = torch.tensor(roots, dtype=torch.float32), merge.density or 1.0
    peft = _merge_utils()
    if density < 1:  # at 1 PEFT prunes nothing, with a warning
        method = "random" if merge.drops else "magnitude"
        with _DrawingFrom(generator):
            tensors = [peft.prune(t, density, method, rescale=merge.drops) for t in tensors]
    if not merge.elects:
        return cast(torch.Tensor, peft.task_arithmetic(tensors, weights))
    # Signs are elected on unweighted tensors, and turn the sum into a mean.
    stacked = torch.stack(tensors)
    elected = peft.calculate_majority_sign_mask(stacked, merge.majority_sign)
    weighted = stacked * peft.reshape_weight_task_tensors(stacked, weights)
    return cast(torch.Tensor, peft.disjoint_merge(weighted, elected))


def make_generator(merge: Merge, layers: NewLayers) -> torch.Generator | None:
    """Return a generator in the state of PEFT's when its merge begins; None if nothing is drawn.

    `merge.seed` is the argument of `torch.manual_seed` before `add_weighted_adapter`, which first
    makes and initialises the layers of the new adapter. PEFT's usual initialisations are drawn;
    "orthogonal" and "mica" draw more, so that PEFT drops other weights.
    """
    if not merge.drops:
        return None
    generator = torch.Generator().manual_seed(merge.seed)
    if merge.density == 1:
        return generator
    gaussian = isinstance(layers.start, str) and layers.start.lower() == "gaussian"
    for in_features, out_features in layers.sizes:
        a, b = (torch.empty(layers.rank * size) for size in (in_features, out_features))
        a.uniform_(generator=generator)
        b.uniform_(generator=generator)
        if layers.start is True:
            a.uniform_(generator=generator)
        elif gaussian:
            a.normal_(generator=generator)
    return generator


@cache
def _merge_utils() -> Any:
    """Return `peft.utils.merge_utils`, which needs torch alone, without the rest of peft.

    Importing peft imports transformers, which blocks the loop and the merge for seconds.
    """
    peft = find_spec("peft")
    folder = os.path.dirname((peft and peft.origin) or "")
    path = os.path.join(folder, "utils", "merge_utils.py")
    spec = spec_from_file_location("lorax_async.peft_merge_utils", path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        with suppress(ImportError, OSError):  # a later version needs more of peft
            spec.loader.exec_module(module)
            return module
    return import_module("peft.utils.merge_utils")


class _DrawingFrom(TorchFunctionMode):
    """Makes `torch.bernoulli`, as PEFT calls it, draw from our generator.

    Only in the thread that enters it: other threads draw from the process's generator meanwhile,
    which is neither seeded nor read.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        drawing = {"generator": self._generator} if func is torch.bernoulli else {}
        return func(*args, **(kwargs or {}) | drawing)


@dataclass(eq=False)
class Merger:
    """Opens the parts of merges, and computes one merge at a time in its own thread.

    The parts are opened in `source`, which its router sets. `copies` reserves the memory and keeps
    the result. The rest is as for `MemorySource`.
    """

    copies: HostCopies
    layout: ModelLayout
    dtype: str
    limits: Limits
    threads: Executor
    source: Source = field(init=False)
    _computing: ThreadPoolExecutor = field(
        default_factory=partial(ThreadPoolExecutor, 1, "lorax-merge"), init=False
    )

    async def merge(self, key: MergedKey, control: FetchControl) -> HostCopy:
        """Compute a merge and keep it. Raise as a load of a part does, naming the part."""
        plan, files = await self._plan(key, control)
        copy: HostCopy | None = None

        async def bring_part(file: AdapterFile) -> Verification:
            whole = [[ByteSpan(len(file.prefix), file.reader.nbytes)]]
            return await self.source.bring(file, whole, lambda _: None, control)

        try:
            copy = await self._reserve(plan.nbytes, control)
            verifications = await _for_parts(key, files, bring_part)
            content = await self._compute(key, plan, files, control)
        except BaseException:
            if copy is not None:
                copy.leave()
            raise
        finally:
            _close(files)
        copy.verification = weakest(verifications)
        return self.copies.put(copy, key, plan.config, content)

    def close(self) -> None:
        """End the thread. End all merges before. Blocks."""
        self._computing.shutdown()

    async def _plan(
        self, key: MergedKey, control: FetchControl
    ) -> tuple[MergePlan, Sequence[AdapterFile]]:
        """Open and plan; parts that were refused and outdated are opened once more."""
        loop, outdated = asyncio.get_running_loop(), False
        keys = cast(tuple[AdapterKey, ...], key.merge.parts)
        settings: Any = {"dtype": self.dtype, "limits": self.limits}

        async def open_part(part: AdapterKey) -> AdapterFile:
            return await self.source.open(part, control)

        while True:
            files = await _for_parts(key, keys, open_part, lambda file: file.reader.close())
            plan = partial(plan_merge, key, files, self.layout, **settings)
            try:
                return await loop.run_in_executor(self.threads, plan), files
            except AdapterError as error:
                if not await _refused(files, error) or outdated:
                    raise
                outdated = True
            except BaseException:
                _close(files)
                raise

    async def _reserve(self, nbytes: int, control: FetchControl) -> HostCopy:
        """Wait for room until `control` ends."""
        reserving = asyncio.ensure_future(self.copies.reserve(nbytes, lambda: None))

        def cancel_if_ended() -> None:
            if control.cancelled:
                reserving.cancel()

        try:
            with control.watch(cancel_if_ended):
                await asyncio.wait([reserving])
        except asyncio.CancelledError:
            reserving.cancel()
            reserving.add_done_callback(partial(_undo, HostCopy.leave))
            raise
        if reserving.cancelled():
            raise FetchError("no caller waits for the merge any more")
        return reserving.result()

    async def _compute(
        self, key: MergedKey, plan: MergePlan, files: Sequence[AdapterFile], control: FetchControl
    ) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.dtype]
        future = self._computing.submit(compute, key, plan, files, dtype, control)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            control.cancel()
            await wait_for_end(future)
            raise


def compute(
    key: MergedKey,
    plan: MergePlan,
    files: Sequence[AdapterFile],
    dtype: torch.dtype,
    control: FetchControl,
) -> torch.Tensor:
    """Return the merged file, uint8 `[nbytes]`. Blocks; `FetchError` once `control` ends."""
    content = host_memory(plan.nbytes, plan.prefix)
    generator = make_generator(key.merge, plan.new_layers)
    for tensor in plan.tensors:
        if control.cancelled:
            raise FetchError("no caller waits for the merge any more")
        out = content[tensor.start : tensor.stop].view(dtype).view(tensor.shape)
        is_a, tensors, factors = tensor.factor is TensorRole.A, [], []
        for number, pair in tensor.pairs:
            try:
                tensors.append(_read(files[number].reader, pair.a if is_a else pair.b))
            except LoraxError as error:
                raise error.prefixed(_part_words(key, number)) from error.__cause__
            factors.append((key.merge.weights[number], pair.scale))
        combined = combine(key.merge, tensor.factor, tensors, factors, generator)
        if combined.shape != out.shape:
            out.zero_()
        rows, columns = combined.shape
        out[:rows, :columns].copy_(combined)
    return content


def _read(reader: Reader, span: TensorSpan) -> torch.Tensor:
    content = torch.empty(span.nbytes, dtype=torch.uint8)
    reader.read_into([StagingBuffer.of(content).memory], span.start)
    return content.view(TORCH_DTYPES[span.dtype]).view(span.shape)


async def _refused(files: Iterable[AdapterFile], error: LoraxError) -> bool:
    """Refuse and close the parts; return whether one of them may be another now."""
    remaining = list(files)
    outdated = False
    try:
        while remaining:
            outdated = await remaining.pop(0).refused(error) or outdated
    finally:
        _close(remaining)
    return outdated


def _close(files: Iterable[AdapterFile]) -> None:
    for file in files:
        file.reader.close()


async def _for_parts(
    key: MergedKey,
    inputs: Sequence[_P],
    work: Callable[[_P], Awaitable[_T]],
    undo: Callable[[_T], None] = lambda _: None,
) -> list[_T]:
    """Await the work for all parts side by side. Errors name the part.

    On an error or a cancellation end the others and undo their results.
    """

    async def named(number: int, part: _P) -> _T:
        try:
            return await work(part)
        except LoraxError as error:
            raise error.prefixed(_part_words(key, number)) from error.__cause__

    tasks = [asyncio.ensure_future(named(number, part)) for number, part in enumerate(inputs)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
            task.add_done_callback(partial(_undo, undo))
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _undo(undo: Callable[[_T], None], task: asyncio.Future[_T]) -> None:
    if not task.cancelled() and task.exception() is None:
        undo(task.result())
