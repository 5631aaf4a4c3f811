"""Sequences that a decoder computes in parts, and what each row would be alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from engines.variants import logits_of
from lorax_async import AdapterHandle
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.ports import Computed, Part, Step

Solo = Callable[[str | None, Sequence[int]], torch.Tensor]
"""Logits after these tokens, computed alone with the adapter of that name."""


@dataclass(eq=False)
class Sequence_:
    """What a decoder was given of a sequence so far, and what it will be given."""

    number: int
    name: str | None
    handle: AdapterHandle | None
    tokens: list[int]
    computed: int = 0

    @property
    def wants(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(eq=False)
class Play:
    """Computes steps, and compares each row with its solo run."""

    decoder: TransformersDecoder
    solo: Solo
    atol: float = 2e-5
    others_wait: bool = False
    steps: list[list[int]] = field(default_factory=list)

    async def step(self, rows: Sequence[tuple[Sequence_, int]], *, budget: float = 0.0) -> Computed:
        """Compute so many tokens of each; whoever has all its tokens gets the likeliest next one."""
        parts = [
            Part(one.number, one.computed, one.tokens[one.computed : one.computed + n], one.handle)
            for one, n in rows
        ]
        step = Step(parts, budget, lambda: self.others_wait)
        computed = await asyncio.to_thread(self.decoder.compute, step)
        for number, (one, tokens) in enumerate(rows):
            if number in computed.out:
                one.computed = 0
                continue
            one.computed += tokens
            expected = self.solo(one.name, one.tokens[: one.computed])
            torch.testing.assert_close(computed.logits[number], expected, atol=self.atol, rtol=1e-4)
            assert computed.logits[number].argmax() == expected.argmax()
            if not one.wants:
                one.tokens.append(int(expected.argmax()))
        return computed


@contextmanager
def alone(peft_model: Any) -> Iterator[Solo]:
    """PEFT's, with the active adapter; None is the base."""

    def solo(name: str | None, tokens: Sequence[int]) -> torch.Tensor:
        inputs = {"input_ids": torch.tensor([list(tokens)])}
        if name is None:
            with peft_model.disable_adapter():
                return logits_of(peft_model, inputs)[0, -1]
        peft_model.set_adapter(name)
        return logits_of(peft_model, inputs)[0, -1]

    yield solo


def base_alone(model: Any) -> Solo:
    return lambda _, tokens: logits_of(model, {"input_ids": torch.tensor([list(tokens)])})[0, -1]
