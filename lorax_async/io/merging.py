"""The arithmetic of merges: several adapters' tensors of one module to one, by PEFT's functions.

All in float32, as which PEFT holds adapters unless it is told otherwise; for the same input the
same bits come out as from PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import sqrt
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lorax_async.core.merge_plan import NewLayers
from lorax_async.core.peft_names import Part
from lorax_async.merge import MajoritySign, Merge


def concatenate(
    out: torch.Tensor,
    factor: Part,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
) -> None:
    """Write the pieces of a "linear" merge side by side along the rank (PEFT's "cat").

    Parameters
    ----------
    out
        A `[rank, in]` or B `[out, rank]`, of any of the three dtypes; what is not filled stays.
    tensors, factors
        Of the parts, with the weight and the scale of each: A is multiplied by both, B by neither.
    """
    at = 0
    for tensor, (weight, scale) in zip(tensors, factors, strict=True):
        if factor is Part.A:
            rank = tensor.shape[0]
            # In two steps, and so rounded twice: PEFT's bits.
            out[at : at + rank].copy_(tensor.float() * weight * scale)
        else:
            rank = tensor.shape[1]
            out[:, at : at + rank].copy_(tensor)
        at += rank


def combine(
    merge: Merge,
    factor: Part,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Merge the tensors of all parts, of one shape, by "ties" or one of the two of DARE.

    DARE draws from `generator`, which stands where PEFT's would before this tensor.
    """
    roots = [_root(weight * scale, signed=factor is Part.A) for weight, scale in factors]
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
    """Prune each tensor, elect signs if `sign` says how, and add up what is left, weighted.

    With a `generator` the weights that go are picked at random, and the others divided by the
    density; else the smallest go. Signs are elected before the weights count, and the sum becomes a
    mean.
    """
    peft = _merge_utils()
    tensors = [tensor.float() for tensor in tensors]
    if density < 1:  # else PEFT prunes nothing either, with a warning
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


def seeded(merge: Merge, layers: NewLayers) -> torch.Generator | None:
    """Return a generator that stands where PEFT's stands when it begins to merge; None for none.

    `merge.seed` is what `torch.manual_seed` would be given before `add_weighted_adapter`, which
    makes and initialises the layers of the new adapter first. PEFT's usual starts are followed;
    "orthogonal" and "mica" draw more, so that other weights are dropped than by PEFT.
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

    That would import transformers: seconds, in which a thread holds up the loop and its own merge.
    """
    peft = find_spec("peft")
    for folder in (peft.submodule_search_locations if peft is not None else None) or ():
        path = os.path.join(folder, "utils", "merge_utils.py")
        spec = spec_from_file_location("lorax_async.peft_merge_utils", path)
        if spec is not None and spec.loader is not None and os.path.isfile(path):
            module = module_from_spec(spec)
            with suppress(ImportError):  # it needs more of peft than it did
                spec.loader.exec_module(module)
                return module
    return import_module("peft.utils.merge_utils")


class _DrawingFrom(TorchFunctionMode):
    """Lets `torch.bernoulli`, as PEFT calls it, draw from a generator of our own.

    In this thread alone, where it is entered: the process's generator, which other threads draw
    from meanwhile, is neither seeded nor read.
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
        named = dict(kwargs or {})
        if func is torch.bernoulli:
            named["generator"] = self._generator
        return func(*args, **named)


def _root(product: float, *, signed: bool) -> float:
    """Return the root for A and B each, so that their product has the whole; A has the sign."""
    root = sqrt(abs(product))
    return -root if signed and product < 0 else root
