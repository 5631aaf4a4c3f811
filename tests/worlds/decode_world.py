"""Engines over fake decoders, and the tokens of a generation computed alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from leaks import our_threads
from scheduler_world import opened

from lorax_async.errors import LoraxError
from lorax_async.loader import AdapterLoader
from lorax_async.server.engine import (
    DecoderStep,
    Engine,
    Generation,
    Sampler,
    Sampling,
    StepResult,
    choose,
)
from lorax_async.testing import FakeDecoder, FakeSource, fake_logits
from lorax_async.types import AdapterId

GREEDY = Sampling(temperature=0)
VOCABULARY = 32
Prompt = Sequence[int]


class ScriptedDecoder(FakeDecoder):
    """Calls `before` with each step's number; `leave` says which sequences are out, and why."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.before: Callable[[int], None] = lambda number: None
        self.leave: Callable[[int, DecoderStep], dict[int, LoraxError]] = lambda number, step: {}

    def compute(self, step: DecoderStep) -> StepResult:
        number = len(self.steps)
        self.before(number)
        computed = super().compute(step)
        out = {**computed.out, **self.leave(number, step)}
        for row in out:
            self.forget(step.parts[row].sequence)
        return StepResult(computed.logits, out)


@asynccontextmanager
async def generating(
    source: FakeSource, *, scheduling: Any = None, decoder: Any = None, **settings: Any
) -> AsyncIterator[tuple[Engine, ScriptedDecoder, AdapterLoader]]:
    """Yield an engine; once it is closed, assert that the decoder, tasks and threads hold nothing."""
    scheduling, loop = scheduling or {}, asyncio.get_running_loop()
    room = {"max_sequences": scheduling.get("max_begun")} | (decoder or {})
    made = ScriptedDecoder(loop=loop, **room)
    async with opened(source, **scheduling) as (loading, scheduler):
        async with Engine(scheduler, made, **settings) as engine:
            yield engine, made, loading
        assert made.kept == {}
        assert "lorax-decoder_0" not in our_threads()
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert not [name for name in names if name.startswith("lorax engine")]


def generate(prompt: Prompt, new: int, adapter: AdapterId | None = None, **more: Any) -> Generation:
    return Generation(adapter, tuple(prompt), new, **{"sampling": GREEDY, **more})


def alone(
    prompt: Prompt, new: int, adapter: str | None = None, sampling: Sampling = GREEDY
) -> list[int]:
    tokens, sampler = list(prompt), Sampler(sampling)
    for _ in range(new):
        (token,) = choose(fake_logits(adapter, tokens, VOCABULARY)[None], [sampler])
        assert token is not None
        tokens.append(token)
    return tokens[len(prompt) :]


async def all_of(tokens: Any, error: type[LoraxError] | None = None) -> list[int]:
    got = list[int]()
    try:
        async for token in tokens:
            got.append(token)
    except LoraxError as raised:
        if error is None or not isinstance(raised, error):
            raise
    else:
        assert error is None, "it ended without an error"
    return got
