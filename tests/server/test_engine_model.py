"""The whole way: generations for adapters that are still coming, as transformers and PEFT say."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engines.variants import PEFT_WARNING, active, serving
from lorax_async import AdapterScheduler, FetchError
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.engine import Engine
from lorax_async.testing import FakeSource
from server.generating import all_of, asked

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]

NEW = 8
WANTED = [
    ("most", [1, 2, 3]),
    (None, [1, 2, 3]),
    ("some", [4, 5]),
    ("most", list(range(1, 30))),
    (None, [9]),
    ("some", [4, 5]),
]


def generated(peft_model: Any, name: str | None, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    if name is None:
        with peft_model.disable_adapter():
            found = peft_model.generate(input_ids=ids, max_new_tokens=new, **given)
    else:
        peft_model.set_adapter(name)
        found = peft_model.generate(input_ids=ids, max_new_tokens=new, **given)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


async def test_preempted_answers_are_what_generate_says(small: Any, adapters: list[Path]) -> None:
    source, new = FakeSource(), 24
    for name, folder in zip(("most", "some"), adapters, strict=True):
        source.put(name, *tiny.files(folder))

    async def main() -> list[list[int]]:
        async with (
            serving(small, source=source, max_slots=2) as (loader, attached),
            AdapterScheduler(loader, max_begun=4) as scheduler,
        ):
            for name in ("most", "some"):
                (await loader.load(name)).release()
            decoder = TransformersDecoder(small, attached, 4)
            async with Engine(scheduler, decoder, max_tokens=64, max_sequences=4) as engine:
                answers = [engine.submit(asked([n, 2, 3], new, "most")) for n in range(4)]
                firsts = [[await anext(answer) for _ in range(3)] for answer in answers]
                short = engine.submit(asked([5], 2, "some"))
                found = [await all_of(short)]
                assert all(len(answer.known) < 3 + new for answer in answers)
                found += [first + await all_of(a) for first, a in zip(firsts, answers, strict=True)]
            assert decoder.sequences == 0
            return found

    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        expected = [generated(peft_model, "some", [5], 2)]
        expected += [generated(peft_model, "most", [n, 2, 3], new) for n in range(4)]
    assert await main() == expected


async def test_answers_are_what_generate_says_while_adapters_come_and_one_fails(
    small: Any, adapters: list[Path]
) -> None:
    source = FakeSource()
    for name, folder in (("most", adapters[0]), ("some", adapters[1]), ("lost", adapters[1])):
        source.put(name, *tiny.files(folder))
    source.hold("most")
    source.fail("bring", FetchError("the line is down", retryable=False), id="lost", at=1)
    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        expected = [generated(peft_model, name, prompt) for name, prompt in WANTED]
    async with (
        serving(small, source=source, max_slots=4) as (loader, attached),
        AdapterScheduler(loader, max_begun=4) as scheduler,
    ):
        decoder = TransformersDecoder(small, attached, 4)
        async with Engine(scheduler, decoder, max_tokens=16, max_sequences=4) as engine:
            lost = engine.submit(asked([1, 2], NEW, "lost"))
            answers = [engine.submit(asked(prompt, NEW, name)) for name, prompt in WANTED]
            assert await all_of(answers[1]) == expected[1]  # nobody waits for "most"
            source.allow("most")
            assert await asyncio.gather(*map(all_of, answers[:1] + answers[2:])) == [
                expected[0],
                *expected[2:],
            ]
            with pytest.raises(FetchError):
                await all_of(lost)
        assert decoder.sequences == 0
