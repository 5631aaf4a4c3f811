"""A decoder without a model, for tests of the server's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from math import inf
from zlib import crc32

import torch

from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.server.generation import Computed, Step


class FakeDecoder:
    """A `Decoder` whose logits are random numbers, seeded by a sequence's tokens and adapter.

    Parameters
    ----------
    max_sequences
        How many sequences may be kept at a time; None means any number.
    loop
        The loader's event loop. If given, each step waits for the adapters' layers as a model does.

    Attributes
    ----------
    steps
        The steps that were computed, in order.
    kept
        The tokens of each sequence that was not forgotten.

    Raises `UsageError` for a part that does not follow what is kept, and for too many sequences.
    """

    def __init__(
        self,
        *,
        max_length: int = 64,
        vocabulary: int = 32,
        max_sequences: int | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self.kept: dict[int, list[int]] = {}
        self._max_length = max_length
        self._vocabulary = vocabulary
        self._max_sequences = inf if max_sequences is None else max_sequences
        self._loop = loop

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def compute(self, step: Step) -> Computed:
        self.steps.append(step)
        together = len(self.kept.keys() | {part.sequence for part in step.parts})
        if together > self._max_sequences:
            raise UsageError(f"{together} sequences, and max_sequences is {self._max_sequences}")
        out = self._passed(step)
        logits = torch.zeros(len(step.parts), self._vocabulary)
        for number, part in enumerate(step.parts):
            before = self.kept.get(part.sequence, []) if part.start else []
            if len(before) != part.start:
                raise UsageError(f"{len(before)} tokens are kept, and {part.start} asked for")
            self.kept[part.sequence] = [*before, *part.tokens]
            id = None if part.handle is None else part.handle.id
            logits[number] = fake_logits(id, self.kept[part.sequence], self._vocabulary)
        for number in out:
            self.forget(step.parts[number].sequence)
        return Computed(logits, out)

    def forget(self, sequence: int) -> None:
        self.kept.pop(sequence, None)

    def _passed(self, step: Step) -> dict[int, LoraxError]:
        """Pass through all layers; return the parts left without their adapter, and why."""
        handles = [part.handle for part in step.parts]
        if self._loop is None:
            return {}
        gate = LayerGate(handles, self._loop, step.budget, step.others_wait)
        with ExitStack() as uses:
            for handle in dict.fromkeys(handles):
                if handle is not None:
                    _hold(handle, uses, gate)
            for layer in sorted({n for each in handles if each is not None for n in each.layers}):
                gate.enter(layer)
        return dict(gate.out)


def fake_logits(id: str | None, tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Return the logits `[vocabulary]` of the token after `tokens`, with the adapter `id`."""
    seed = crc32(repr((id, list(tokens))).encode())
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def _hold(handle: AdapterHandle, uses: ExitStack, gate: LayerGate) -> None:
    try:
        uses.enter_context(handle.use())
    except UsageError:
        raise
    except LoraxError as error:
        gate.leave_out(handle, error)
