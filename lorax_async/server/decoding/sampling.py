"""The next token of a sequence, chosen from its logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lorax_async.errors import UsageError
from lorax_async.server.generation import Sampling

_LIKELY = 256, 8192
"""Among so many tokens top_p is looked for first: to sort a whole vocabulary takes milliseconds."""


class Sampler:
    """Chooses the tokens of one sequence, with random numbers that are its own: one per token.

    Raises `UsageError` for a number out of range.
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
        """A token by its `logits`: float32 `[vocabulary]` on the CPU, none of them NaN"""
        likely = torch.softmax((logits - logits.max()).double() / self._temperature, dim=-1)
        if self._top_p == 1:
            return self._drawn(likely)
        likely, tokens = nucleus(likely, self._top_p)
        return int(tokens[self._drawn(likely)])

    def _drawn(self, likely: torch.Tensor) -> int:
        sums = likely.cumsum(dim=-1)
        at = torch.rand((), dtype=sums.dtype, generator=self._random) * sums[-1]
        return min(int(torch.searchsorted(sums, at, right=True)), len(sums) - 1)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row of `logits` `[rows, vocabulary]`; None where these are no use."""
    largest, likeliest = logits.max(dim=-1)  # NaN where there is one
    sound, tokens = largest.isfinite().tolist(), likeliest.tolist()
    found = list[int | None]()
    for row, sampler in enumerate(samplers):
        if not sound[row]:
            found.append(None)
        else:
            found.append(tokens[row] if sampler.greedy else sampler.choose(logits[row].cpu()))
    return found


def nucleus(likely: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens, as few as have `top_p` together: their probabilities, and which."""
    for many in (*_LIKELY, len(likely)):
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
    if seed is not None and not (_is_whole(seed) and -(1 << 63) <= seed < 1 << 63):
        raise UsageError(f"seed must be an integer of 64 bits or None, not {seed!r}")


def _is_number(value: object) -> bool:
    if not isinstance(value, float | int) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
