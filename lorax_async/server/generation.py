"""What is to be generated, what comes of it, and the interface of a model that computes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from lorax_async.errors import LoraxError
from lorax_async.handle import AdapterHandle
from lorax_async.types import AdapterId

Finish = Literal["stop", "length"]

# -- generations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token.

    Attributes
    ----------
    temperature
        From 0, which takes the likeliest token.
    top_p
        Above 0, at most 1: sample from the fewest tokens that have this probability together.
    seed
        The same seed gives the same tokens, whatever is computed beside them. None: any.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate.

    Attributes
    ----------
    adapter
        As for `AdapterLoader.load`; None is the base alone.
    prompt
        Token ids, at least one.
    max_new_tokens
        End it with "length" after this many.
    stop_tokens
        Any of these ends it with "stop", and is not returned.
    deadline
        Seconds from `submit` within which its first step must begin; None takes the loader's
        timeout.
    client
        Whose it is, as in `scheduling.requests.Request`.
    """

    adapter: AdapterId | None
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    deadline: float | None = None
    client: Hashable = field(default=None, repr=False)


# -- steps of a decoder ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequencePart:
    """The part of one sequence to compute in a step.

    Attributes
    ----------
    sequence
        Names it from its first step until it is forgotten.
    start
        The position of the first of `tokens`; earlier steps computed those before. 0 starts over.
    tokens
        Token ids, at least one.
    handle
        Its adapter, resident or streaming, leased for the step; None is the base.
    """

    sequence: int
    start: int
    tokens: Sequence[int]
    handle: AdapterHandle | None


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """Parts of different sequences, computed together.

    Attributes
    ----------
    budget
        Seconds that it may wait for layers of adapters.
    others_wait
        Whether other sequences could be computed instead; see `scheduling.Batch`. In any thread.
    """

    parts: Sequence[SequencePart]
    budget: float
    others_wait: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step.

    Attributes
    ----------
    logits
        float32 `[parts, vocabulary]`, of the token after each part's last one. Rows in `out` are
        undefined.
    out
        The error of each part that was not computed, by its number. Its sequence is forgotten;
        after an `AdapterTimeoutError` it can start over.
    """

    logits: torch.Tensor
    out: Mapping[int, LoraxError]


class Decoder(Protocol):
    """A model with its KV cache, called in one worker thread, one step after the other."""

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""

    def compute(self, step: DecoderStep) -> StepResult:
        """Compute a step; blocks. An exception fails all of its parts."""

    def forget(self, sequence: int) -> None:
        """Free a sequence's keys and values. Idempotent."""
