"""The whole way: generations for adapters that are still coming, as transformers and PEFT say."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engines.variants import PEFT_WARNING, active, serving
from lorax_async import AdapterLoader, AdapterScheduler, FetchError
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.engine import Engine
from lorax_async.testing import FakeSource
from server.generating import all_of, asked

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


def generated(peft_model: Any, name: str | None, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    if name is not None:
        peft_model.set_adapter(name)
        found = peft_model.generate(input_ids=ids, max_new_tokens=new, **given)
    else:
        with peft_model.disable_adapter():
            found = peft_model.generate(input_ids=ids, max_new_tokens=new, **given)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture
def source(adapters: list[Path]) -> FakeSource:
    source = FakeSource()
    for name, folder in (("most", adapters[0]), ("some", adapters[1]), ("lost", adapters[1])):
        source.put(name, *tiny.files(folder))
    return source


@asynccontextmanager
async def engine_of(
    small: Any, source: FakeSource, max_tokens: int
) -> AsyncIterator[tuple[AdapterLoader, Engine]]:
    async with (
        serving(small, source=source, max_slots=4) as (loader, attached),
        AdapterScheduler(loader, max_begun=4) as scheduler,
    ):
        decoder = TransformersDecoder(small, attached, 4)
        limits = {"max_tokens": max_tokens, "max_sequences": 4}
        async with Engine(scheduler, decoder, **limits) as engine:
            yield loader, engine
        assert decoder.sequences == 0


async def test_preempted_answers_are_what_generate_says(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        expected = [generated(peft_model, "most", [n, 2, 3], 24) for n in range(4)]
        expected_short = generated(peft_model, "some", [5], 2)
    async with engine_of(small, source, 64) as (loader, engine):
        for name in ("most", "some"):
            (await loader.load(name)).release()
        answers = [engine.submit(asked([n, 2, 3], 24, "most")) for n in range(4)]
        firsts = [[await anext(answer) for _ in range(3)] for answer in answers]
        assert await all_of(engine.submit(asked([5], 2, "some"))) == expected_short
        assert all(len(answer.known) < 3 + 24 for answer in answers)
        found = [first + await all_of(a) for first, a in zip(firsts, answers, strict=True)]
        assert found == expected


async def test_answers_are_what_generate_says_while_adapters_come_and_one_fails(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    wanted: list[tuple[str | None, list[int]]] = [
        *((None, [1, 2, 3]), ("most", [1, 2, 3]), ("some", [4, 5])),
        *(("most", list(range(1, 30))), (None, [9]), ("some", [4, 5])),
    ]
    source.hold("most")
    source.fail("bring", FetchError("the line is down", retryable=False), id="lost", at=1)
    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        expected = [generated(peft_model, name, prompt, 8) for name, prompt in wanted]
    async with engine_of(small, source, 16) as (_, engine):
        lost = engine.submit(asked([1, 2], 8, "lost"))
        answers = [engine.submit(asked(prompt, 8, name)) for name, prompt in wanted]
        assert await all_of(answers[0]) == expected[0]  # nobody waits for "most"
        source.allow("most")
        assert await asyncio.gather(*map(all_of, answers[1:])) == expected[1:]
        assert await all_of(lost, FetchError) == []
