"""The seam behind which a model computes, so that another engine can take its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorax_async.errors import LoraxError
from lorax_async.handle import AdapterHandle


@dataclass(frozen=True, slots=True)
class Part:
    """What of one sequence is to be computed in a step.

    Attributes
    ----------
    sequence
        Names it from its first step until it is forgotten.
    start
        The position of the first of `tokens`; all before it were computed in earlier steps. 0
        begins anew, whatever was computed before.
    tokens
        Token ids, at least one.
    handle
        Its adapter, resident or streaming, leased meanwhile; None is the base.
    """

    sequence: int
    start: int
    tokens: Sequence[int]
    handle: AdapterHandle | None


@dataclass(frozen=True, slots=True)
class Step:
    """Parts of different sequences, computed together.

    Attributes
    ----------
    budget
        Seconds for which it may wait for adapters that are not on this machine.
    others_wait
        Whether others could be computed in its place; see `scheduling.Batch`. In any thread.
    """

    parts: Sequence[Part]
    budget: float
    others_wait: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a step.

    Attributes
    ----------
    logits
        float32 `[parts, vocabulary]`: of the token after each part's last one. Rows in `out` hold
        anything.
    out
        Parts, by their number, of which nothing came, and why: what was computed of these sequences
        is gone. After an `AdapterTimeoutError` it can be tried again, from the first token.
    """

    logits: torch.Tensor
    out: Mapping[int, LoraxError]


class Decoder(Protocol):
    """A model and its keys and values, called in one worker thread, a step after the other."""

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have, at most."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""

    def compute(self, step: Step) -> Computed:
        """Blocks. An exception is the decoder's fault: nothing of the step counts."""

    def forget(self, sequence: int) -> None:
        """Let go of a sequence's keys and values; without effect if there are none."""
