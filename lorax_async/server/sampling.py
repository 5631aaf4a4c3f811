"""The choice of a sequence's next token from its logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lorax_async.errors import UsageError
from lorax_async.server.generation import Sampling

_CANDIDATES = 256, 8192
"""Numbers of likeliest tokens to search for `top_p` first: sorting a whole vocabulary takes
milliseconds."""


class Sampler:
    """Choose the tokens of one sequence, with its own random numbers: one per token.

    Raise `UsageError` for a number out of range.
    """

    def __init__(self, sampling: Sampling) -> None:
        _require_sampling(sampling)
        self.greedy = sampling.temperature == 0
        """Whether it takes the likeliest token."""
        self._temperature = float(sampling.temperature)
        self._top_p = float(sampling.top_p)
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Return a token, given float32 logits `[vocabulary]` on the CPU without NaN."""
        likely = torch.softmax((logits - logits.max()).double() / self._temperature, dim=-1)
        if self._top_p == 1:
            return self._draw(likely)
        likely, tokens = _nucleus(likely, self._top_p)
        return int(tokens[self._draw(likely)])

    def _draw(self, likely: torch.Tensor) -> int:
        sums = likely.cumsum(dim=-1)
        at = torch.rand((), dtype=sums.dtype, generator=self._random) * sums[-1]
        return min(int(torch.searchsorted(sums, at, right=True)), len(sums) - 1)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Return the next token of each row of `[rows, vocabulary]`; None for unusable logits."""
    largest, likeliest = logits.max(dim=-1)  # NaN if there is one
    usable, tokens = largest.isfinite().tolist(), likeliest.tolist()
    chosen = list[int | None]()
    for row, sampler in enumerate(samplers):
        if not usable[row]:
            chosen.append(None)
        else:
            chosen.append(tokens[row] if sampler.greedy else sampler.choose(logits[row].cpu()))
    return chosen


def _nucleus(likely: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fewest likeliest tokens that have `top_p` together: probabilities, token ids."""
    for many in (*_CANDIDATES, len(likely)):
        found, tokens = likely.topk(min(many, len(likely)))
        if found.sum() >= top_p:
            break
    before = found.cumsum(dim=-1) - found
    kept = int((before < top_p).sum())
    return found[:kept], tokens[:kept]


def _require_sampling(sampling: Sampling) -> None:
    temperature, top_p, seed = sampling.temperature, sampling.top_p, sampling.seed
    if not (_is_number(temperature) and temperature >= 0):
        raise UsageError(f"temperature must be a number from 0, not {temperature!r}")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise UsageError(f"top_p must be above 0 and at most 1, not {top_p!r}")
    is_whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (is_whole and -(1 << 63) <= seed < 1 << 63):
        raise UsageError(f"seed must be an integer of 64 bits or None, not {seed!r}")


def _is_number(value: object) -> bool:
    if not isinstance(value, float | int) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
