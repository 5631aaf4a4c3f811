"""The arithmetic of merges: several adapters' tensors of one module to one, as PEFT computes it.

Source: peft 0.21.2, `add_weighted_adapter` and `utils/merge_utils.py`. All in float32, as which
PEFT holds adapters unless it is told otherwise; for the same input the same bits come out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import sqrt
from threading import Lock

import torch

from lorax_async.core.merge_draws import Start
from lorax_async.core.peft_names import Part
from lorax_async.merge import MajoritySign, Merge

_SKIP = 1 << 16
_SPACING = 1 << 20
"""Draws between two remembered states: a skip of some milliseconds, 5 KB of memory."""


def concatenate(
    out: torch.Tensor,
    factor: Part,
    tensors: Sequence[torch.Tensor],
    factors: Sequence[tuple[float, float]],
) -> None:
    """Write the pieces of a "linear" merge side by side along the rank.

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
    """One float32 tensor out of those of all parts, of one shape, for "ties" and the two of DARE.

    `generator`, for DARE at a density below 1, stands where PEFT's would before this tensor, and
    afterwards where it would after it.
    """
    roots = [_root(weight * scale, signed=factor is Part.A) for weight, scale in factors]
    return combine_weighted(
        [tensor.float() for tensor in tensors],
        torch.tensor(roots, dtype=torch.float32),
        drops=merge.drops,
        sign=merge.majority_sign if merge.elects else None,
        density=1.0 if merge.density is None else merge.density,
        generator=generator,
    )


def combine_weighted(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    drops: bool,
    sign: MajoritySign | None,
    density: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Prune each tensor, elect signs if `sign` says how, and add up what is left, weighted.

    `drops`: the pruned weights are picked at random, and the others divided by the density; else
    the smallest go. Signs are elected before the weights count, and the sum becomes a mean.
    """
    if density < 1:
        tensors = [
            _dropped(tensor, density, generator) if drops else _largest(tensor, density)
            for tensor in tensors
        ]
    stacked = torch.stack(list(tensors))
    weighted = stacked * weights.view(-1, *(1 for _ in stacked.shape[1:]))
    if sign is None:
        return weighted.sum(dim=0)
    signs = stacked.sign()
    balance = stacked.sum(dim=0) if sign == "total" else signs.sum(dim=0)
    majority = (balance >= 0).float() * 2 - 1
    agreeing = (signs == majority).float()  # as numbers, in which all this is several times faster
    return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def _root(product: float, *, signed: bool) -> float:
    """A and B each get the root, so that their product has the whole; A has the sign."""
    root = sqrt(abs(product))
    return -root if signed and product < 0 else root


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    flat = tensor.abs().reshape(-1)
    # Unsorted, which picks the same ones, also among equals.
    kept = torch.topk(flat, int(density * flat.numel()), sorted=False).indices
    mask = torch.zeros_like(flat).index_fill_(0, kept, 1)
    return tensor * mask.view(tensor.shape)


def _dropped(
    tensor: torch.Tensor, density: float, generator: torch.Generator | None
) -> torch.Tensor:
    # The numbers that torch.bernoulli would draw and compare, in a fifth of the time.
    kept = torch.empty_like(tensor).uniform_(generator=generator) < density
    return tensor * kept / density


class Draws:
    """Where PEFT's random generator stands before each of a merge's tensors.

    Parameters
    ----------
    seed
        What PEFT's user would give to `torch.manual_seed` before `add_weighted_adapter`.
    starts
        What is drawn before the first tensor.
    counts
        How many numbers each tensor draws, in PEFT's order.

    Everything is drawn in order, but read in any: on the way, states are remembered here and there.
    Usable from several threads.
    """

    def __init__(self, seed: int, starts: Sequence[Start], counts: Sequence[int]) -> None:
        self._ends = [0, *accumulate(counts)]
        self._starts = starts
        self._generator = torch.Generator().manual_seed(seed)
        self._reached = 0
        self._positions: list[int] = []
        self._states: list[torch.Tensor] = []
        self._lock = Lock()

    def before(self, tensor: int) -> torch.Generator:
        """A generator of the caller's own, before the numbers of the tensor at this position."""
        with self._lock:
            self._reach(tensor)
            nearest = bisect_right(self._positions, tensor) - 1
            position, state = self._positions[nearest], self._states[nearest]
        generator = torch.Generator()
        generator.set_state(state)
        _skip(generator, self._ends[tensor] - self._ends[position])
        return generator

    def _reach(self, tensor: int) -> None:
        if not self._states:
            for start in self._starts:
                _skip(self._generator, start.uniforms)
                if start.normals:
                    torch.empty(start.normals, dtype=torch.float32).normal_(
                        generator=self._generator
                    )
            self._remember()
        for position in range(self._reached, tensor):
            _skip(self._generator, self._ends[position + 1] - self._ends[position])
            self._reached = position + 1
            if self._ends[self._reached] - self._ends[self._positions[-1]] >= _SPACING:
                self._remember()

    def _remember(self) -> None:
        self._positions.append(self._reached)
        self._states.append(self._generator.get_state())


def _skip(generator: torch.Generator, count: int) -> None:
    scratch = torch.empty(min(count, _SKIP), dtype=torch.float32)
    for first in range(0, count, _SKIP):
        scratch[: min(_SKIP, count - first)].uniform_(generator=generator)
