"""Merges of other sources' adapters, with PEFT's arithmetic."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import sqrt
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from lorax_async.concurrency import FetchControl, outcome, wait_for_end
from lorax_async.config import Limits
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.errors import AdapterError, FetchError, LoraxError
from lorax_async.formats.peft_names import TensorRole
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.merge_plan import (
    MergePlan,
    NewLayers,
    PartFile,
    Piece,
    part_words,
    plan_merge,
)
from lorax_async.sources.base import AdapterFile, Source
from lorax_async.sources.host_copies import HostCopies, HostCopy, host_memory
from lorax_async.types import AdapterKey, MajoritySign, Merge, MergedKey, Verification, weakest


def concatenate(
    out: torch.Tensor,
    factor: TensorRole,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
) -> None:
    """Write the pieces of a "linear" merge side by side along the rank (PEFT's "cat").

    Parameters
    ----------
    out
        A `[rank, in]` or B `[out, rank]`, of any of the three dtypes; rows not written stay.
    tensors, factors
        Those of the parts, with weight and scale of each: A is multiplied by both, B by neither.
    """
    at = 0
    for tensor, (weight, scale) in zip(tensors, factors, strict=True):
        if factor is TensorRole.A:
            rank = tensor.shape[0]
            # Two products, rounded twice as PEFT does.
            out[at : at + rank].copy_(tensor.float() * weight * scale)
        else:
            rank = tensor.shape[1]
            out[:, at : at + rank].copy_(tensor)
        at += rank


def combine(
    merge: Merge,
    factor: TensorRole,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Merge the tensors of all parts, of one shape, by "ties" or a DARE strategy.

    DARE draws from `generator`, in the state of PEFT's before this tensor.
    """
    roots = [_root(weight * scale, signed=factor is TensorRole.A) for weight, scale in factors]
    return combine_weighted(
        tensors,
        torch.tensor(roots, dtype=torch.float32),
        generator=generator if merge.drops else None,
        sign=merge.majority_sign if merge.elects else None,
        density=1.0 if merge.density is None else merge.density,
    )


def combine_weighted(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    generator: torch.Generator | None,
    sign: MajoritySign | None,
    density: float,
) -> torch.Tensor:
    """Prune each tensor, elect signs by the method `sign`, and return the weighted sum.

    With a `generator` elements are dropped at random and the others divided by the density; else
    the smallest are dropped. Signs are elected on unweighted tensors, and turn the sum into a mean.
    """
    peft = _merge_utils()
    tensors = [tensor.float() for tensor in tensors]
    if density < 1:  # at 1 PEFT prunes nothing, with a warning
        drops = generator is not None
        with _DrawingFrom(generator):
            tensors = [
                peft.prune(tensor, density, "random" if drops else "magnitude", rescale=drops)
                for tensor in tensors
            ]
    merged: torch.Tensor
    if sign is None:
        merged = peft.task_arithmetic(tensors, weights)
    else:
        stacked = torch.stack(tensors)
        elected = peft.calculate_majority_sign_mask(stacked, sign)
        weighted = stacked * peft.reshape_weight_task_tensors(stacked, weights)
        merged = peft.disjoint_merge(weighted, elected)
    return merged


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
    for folder in (peft.submodule_search_locations if peft is not None else None) or ():
        path = os.path.join(folder, "utils", "merge_utils.py")
        spec = spec_from_file_location("lorax_async.peft_merge_utils", path)
        if spec is not None and spec.loader is not None and os.path.isfile(path):
            module = module_from_spec(spec)
            with suppress(ImportError):  # a later version needs more of peft
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
        kwargs = dict(kwargs or {})
        if func is torch.bernoulli:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _root(product: float, *, signed: bool) -> float:
    """Return the factor of A and of B whose product is `product`; A has the sign."""
    root = sqrt(abs(product))
    return -root if signed and product < 0 else root


_T = TypeVar("_T")


class Merger:
    """Opens the parts of merges, and computes one merge at a time in its own thread.

    Parameters
    ----------
    source
        The source of the parts.
    copies
        Reserves the memory and keeps the result.
    layout, dtype, limits, threads
        As for `MemorySource`.
    """

    def __init__(
        self,
        source: Source,
        copies: HostCopies,
        layout: ModelLayout,
        *,
        dtype: str,
        limits: Limits,
        threads: Executor,
    ) -> None:
        self._source = source
        self._copies = copies
        self._layout = layout
        self._dtype = dtype
        self._limits = limits
        self._planning = threads
        self._computing = ThreadPoolExecutor(1, "lorax-merge")

    async def merge(self, key: MergedKey, control: FetchControl) -> HostCopy:
        """Compute a merge and keep it. Raise as a load of a part does, naming the part."""
        plan, files = await self._plan(key, control)
        copy: HostCopy | None = None
        try:
            copy = await self._reserve(plan.nbytes, control)
            verification = await self._bring(key, files, control)
            content = await self._compute(key, plan, files, control)
        except BaseException:
            if copy is not None:
                copy.leave()
            raise
        finally:
            _close(files)
        copy.fill(key, plan.config, len(plan.prefix), content, verification)
        return self._copies.put(copy)

    def close(self) -> None:
        """End the thread. End all merges before. Blocks."""
        self._computing.shutdown()

    async def _plan(
        self, key: MergedKey, control: FetchControl
    ) -> tuple[MergePlan, Sequence[AdapterFile]]:
        """Open and plan; parts that were refused and outdated are opened once more."""
        loop, outdated = asyncio.get_running_loop(), False
        while True:
            files = await self._open_parts(key, control)
            parts = [PartFile(file.config, file.prefix, file.reader.nbytes) for file in files]
            plan = partial(
                plan_merge, key, parts, self._layout, dtype=self._dtype, limits=self._limits
            )
            try:
                return await loop.run_in_executor(self._planning, plan), files
            except AdapterError as error:
                if not await _refused(files, error) or outdated:
                    raise
                outdated = True
            except BaseException:
                _close(files)
                raise

    async def _open_parts(self, key: MergedKey, control: FetchControl) -> Sequence[AdapterFile]:
        return await _all(
            [
                _of_part(key, number, self._source.open(part, control))
                for number, part in enumerate(key.merge.parts)
                if isinstance(part, AdapterKey)
            ],
            lambda file: file.reader.close(),
        )

    async def _reserve(self, nbytes: int, control: FetchControl) -> HostCopy:
        """Wait for room until `control` ends."""
        reserving = asyncio.ensure_future(self._copies.reserve(nbytes, lambda: None))

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

    async def _bring(
        self, key: MergedKey, files: Sequence[AdapterFile], control: FetchControl
    ) -> Verification:
        bringing = []
        for number, file in enumerate(files):
            whole = [[ByteSpan(len(file.prefix), file.reader.nbytes)]]
            work = self._source.bring(file, whole, lambda _: None, control)
            bringing.append(_of_part(key, number, work))
        return weakest(await _all(bringing, lambda _: None))

    async def _compute(
        self, key: MergedKey, plan: MergePlan, files: Sequence[AdapterFile], control: FetchControl
    ) -> torch.Tensor:
        future = self._computing.submit(compute, key, plan, files, control)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            control.cancel()
            await wait_for_end(future)
            raise


def compute(
    key: MergedKey, plan: MergePlan, files: Sequence[AdapterFile], control: FetchControl
) -> torch.Tensor:
    """Return the merged file, uint8 `[nbytes]`. Blocks; `FetchError` once `control` ends."""
    merge, dtype = key.merge, TORCH_DTYPES[plan.dtype]
    content = host_memory(plan.nbytes, plan.prefix)
    generator = make_generator(merge, plan.new_layers)
    for tensor in plan.tensors:
        if control.cancelled:
            raise FetchError("no caller waits for the merge any more")
        out = content[tensor.start : tensor.stop].view(dtype).view(tensor.shape)
        if tensor.is_padded(merge):
            out.zero_()
        tensors = [_read(key, files, piece) for piece in tensor.pieces]
        factors = [(piece.weight, piece.scale) for piece in tensor.pieces]
        if merge.strategy == "linear":
            concatenate(out, tensor.factor, tensors, factors)
        else:
            combined = combine(merge, tensor.factor, tensors, factors, generator)
            rows, columns = combined.shape
            out[:rows, :columns].copy_(combined)
    return content


def _read(key: MergedKey, files: Sequence[AdapterFile], piece: Piece) -> torch.Tensor:
    span = piece.span
    content = torch.empty(span.stop - span.start, dtype=torch.uint8)
    try:
        files[piece.part].reader.read_into([StagingBuffer.of(content).memory], span.start)
    except LoraxError as error:
        raise error.prefixed(part_words(key, piece.part)) from error.__cause__
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


async def _of_part(key: MergedKey, number: int, work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await work
    except LoraxError as error:
        raise error.prefixed(part_words(key, number)) from error.__cause__


async def _all(works: Sequence[Coroutine[Any, Any, _T]], undo: Callable[[_T], None]) -> list[_T]:
    """Await side by side. On an error or a cancellation end the others and undo their results."""
    tasks = [asyncio.ensure_future(work) for work in works]
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
