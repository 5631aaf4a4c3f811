"""Generations become tokens: beside each other what they would be alone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from common import until
from lorax_async import (
    AdapterNotFoundError,
    AdapterTimeoutError,
    FetchError,
    LoaderClosedError,
    UsageError,
)
from lorax_async.server.generation import Generating, Generation, Sampling
from lorax_async.testing import FakeSource
from scheduling.serving import warm
from server.generating import VOCABULARY, all_of, alone, asked, generating
from tiny_sources import stocked

pytestmark = pytest.mark.each_loop


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return stocked(tmp_path, "a", "b", "c")


async def test_adapters_are_mixed_in_one_step_and_each_answer_is_its_own(
    source: FakeSource,
) -> None:
    wanted = [(None, [1, 2]), ("a", [1, 2]), ("b", [1, 2, 3]), ("a", [7]), (None, [9, 8])]
    async with generating(source) as (engine, decoder, loader):
        served: Generating = engine
        await warm(loader, "a", "b")
        answers = [served.submit(asked(prompt, 6, name)) for name, prompt in wanted]
        found = await asyncio.gather(*map(all_of, answers))
        assert found == [alone(prompt, 6, name) for name, prompt in wanted]
        assert [answer.finish for answer in answers] == ["length"] * 5
        names = [
            {part.handle.id if part.handle else None for part in step.parts}
            for step in decoder.steps
        ]
        assert {None, "a", "b"} in names
        assert len(decoder.steps) <= 8  # and not one by one, which would be 30


async def test_who_comes_later_joins_those_under_way(source: FakeSource) -> None:
    async with generating(source) as (engine, decoder, _):
        first = engine.submit(asked([1], 30))
        got = [await anext(first) for _ in range(3)]
        second = engine.submit(asked([2], 5))
        assert await all_of(second) == alone([2], 5)
        assert got + await all_of(first) == alone([1], 30)
        assert max(len(step.parts) for step in decoder.steps) == 2


async def test_a_stop_token_ends_it_and_does_not_come_out(source: FakeSource) -> None:
    expected = alone([3, 4], 10)
    stop = expected[4]
    assert stop not in expected[:4]
    async with generating(source) as (engine, decoder, _):
        stopped = engine.submit(asked([3, 4], 10, stop_tokens=frozenset({stop, 99})))
        finishes = [stopped.finish]
        assert await all_of(stopped) == expected[:4]
        assert [*finishes, stopped.finish] == [None, "stop"]
        last = engine.submit(asked([3, 4], 5, stop_tokens=frozenset({stop})))
        assert (await all_of(last), last.finish) == (expected[:4], "stop")
        assert len(decoder.steps) == 10


async def test_a_long_prompt_comes_in_parts(source: FakeSource) -> None:
    prompt = [n % VOCABULARY for n in range(20)]
    async with generating(source, max_tokens=8, max_sequences=2) as (engine, decoder, _):
        assert await all_of(engine.submit(asked(prompt, 3))) == alone(prompt, 3)
        assert [len(step.parts[0].tokens) for step in decoder.steps] == [8, 8, 4, 1, 1]
        assert [step.parts[0].start for step in decoder.steps] == [0, 8, 16, 20, 21]


async def test_what_waits_is_counted_until_something_of_it_was_computed(source: FakeSource) -> None:
    source.hold("a")
    async with generating(source) as (engine, _, __):
        held = engine.submit(asked([1], 2, "a"))
        other = engine.submit(asked([1], 2))
        assert engine.waiting == 2
        await all_of(other)
        assert engine.waiting == 1
        source.allow("a")
        assert await all_of(held) == alone([1], 2, "a")
        assert engine.waiting == 0
        held = engine.submit(asked([1], 2, "missing"))
        with pytest.raises(AdapterNotFoundError):
            await all_of(held)
        assert engine.waiting == 0


async def test_an_adapter_that_fails_fails_its_own(source: FakeSource) -> None:
    source.fail("bring", FetchError("the line is down", retryable=False), id="a", at=1)
    async with generating(source) as (engine, _, __):
        lost, missing, good, base = (
            engine.submit(asked([1, 2], 6, name)) for name in ("a", "missing", "b", None)
        )
        for tokens, error in ((lost, FetchError), (missing, AdapterNotFoundError)):
            with pytest.raises(error) as caught:
                await all_of(tokens)
            assert caught.value.id in {"a", "missing"}
            assert tokens.finish is None
        assert await all_of(good) == alone([1, 2], 6, "b")
        assert await all_of(base) == alone([1, 2], 6)


async def test_a_deadline_is_for_the_first_step(source: FakeSource) -> None:
    source.hold("a")
    async with generating(source) as (engine, _, __):
        with pytest.raises(AdapterTimeoutError):
            await all_of(engine.submit(asked([1], 2, "a", deadline=0.01)))
        source.allow("a")


async def test_the_loop_is_free_while_a_step_is_computed(source: FakeSource) -> None:
    threads = list[str]()
    free = threading.Event()

    def before(number: int) -> None:
        threads.append(threading.current_thread().name)
        assert free.wait(20)  # set by the loop

    async with generating(source) as (engine, decoder, _):
        decoder.before = before
        answer = engine.submit(asked([1], 3))
        await until(lambda: threads)
        free.set()
        assert await all_of(answer) == alone([1], 3)
    assert set(threads) == {"lorax-decoder_0"}


async def test_seeds_give_the_same_tokens_beside_anybody(source: FakeSource) -> None:
    """And sequences of one request are others by their seeds."""
    state = torch.get_rng_state()

    def sampled(seed: int | None) -> Generation:
        return asked([5, 6], 12, "a", sampling=Sampling(1.0, 0.9, seed))

    async with generating(source) as (engine, decoder, _):
        solo = [await all_of(engine.submit(sampled(seed))) for seed in range(3)]
        assert max(len(step.parts) for step in decoder.steps) == 1
        others = [engine.submit(sampled(None)) for _ in range(3)]
        beside = [engine.submit(sampled(seed)) for seed in (2, 0, 1, 0)]
        found = await asyncio.gather(*map(all_of, beside))
        assert found == [solo[2], solo[0], solo[1], solo[0]]
        assert len({tuple(tokens) for tokens in solo}) == 3
        await asyncio.gather(*map(all_of, others))
    assert torch.equal(state, torch.get_rng_state())


async def test_what_can_never_be_computed_is_refused(source: FakeSource) -> None:
    async with generating(source, decoder={"max_length": 10}) as (engine, decoder, _):
        assert engine.max_length == 10
        with pytest.raises(UsageError, match=r"4 tokens .* max_new_tokens is 7.* 10 "):
            engine.submit(asked([1, 2, 3, 4], 7))
        assert await all_of(engine.submit(asked([1, 2, 3, 4], 6))) == alone([1, 2, 3, 4], 6)
        for wrong in (
            asked([], 1),
            asked([1], 0),
            asked([VOCABULARY], 1),
            asked([-1], 1),
            asked([1.0], 1),  # type: ignore[list-item]
            asked([1], 1, deadline=-1.0),
            asked([1], 1, sampling=Sampling(temperature=-1)),
        ):
            with pytest.raises(UsageError):
                engine.submit(wrong)
        assert engine.waiting == 0
        engine_, steps = engine, len(decoder.steps)
    with pytest.raises(LoaderClosedError):
        engine_.submit(asked([1], 1))
    assert steps == 6
