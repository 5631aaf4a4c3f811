"""Generations that are cancelled, begin again or fail, and engines that close: nothing is left."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest
import torch

from common import until
from lorax_async import (
    AdapterFormatError,
    AdapterTimeoutError,
    InternalError,
    LoaderClosedError,
    LoraxError,
)
from lorax_async.server.generation import Sampling
from lorax_async.server.ports import Computed, Step
from lorax_async.testing import FakeSource
from scheduling.serving import warm
from server.generating import ScriptedDecoder, all_of, alone, asked, generating
from tiny_sources import stocked

NAMES = (None, "a", "b", "c")


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return stocked(tmp_path, "a", "b", "c")


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_is_cancelled_at_any_time_disturbs_nobody(
    source: FakeSource, seed: int
) -> None:
    shuffled = random.Random(seed)
    async with generating(source, scheduling={"max_begun": 4}, max_tokens=12, max_sequences=4) as (
        engine,
        decoder,
        _,
    ):

        async def client() -> None:
            prompt = [shuffled.randrange(32) for _ in range(shuffled.randint(1, 20))]
            name, new = shuffled.choice(NAMES), shuffled.randint(1, 12)
            expected, got = alone(prompt, new, name), list[int]()
            patience = shuffled.choice([0, 1, 3, 99])
            answer = engine.submit(asked(prompt, new, name))
            for _ in range(shuffled.choice([0, 0, 3])):
                await asyncio.sleep(0)
            if patience:
                async for token in answer:
                    got.append(token)
                    if len(got) == patience:
                        break
            answer.cancel()
            answer.cancel()
            got += await all_of(answer)
            assert got == expected[: len(got)]
            assert len(got) >= min(patience, new)

        await asyncio.gather(*(client() for _ in range(25)))
        assert engine.waiting == 0
        await until(lambda: not engine._answers)
        assert await all_of(engine.submit(asked([1], 3))) == alone([1], 3)
        assert len(decoder.kept) <= 1


async def test_cancelled_while_it_is_computed(source: FakeSource) -> None:
    began, free = threading.Event(), threading.Event()

    def before(number: int) -> None:
        if number == 1:
            began.set()
            assert free.wait(20)

    async with generating(source) as (engine, decoder, _):
        decoder.before = before
        gone, stays = engine.submit(asked([1], 9)), engine.submit(asked([2], 9))
        first = await anext(gone)
        await until(began.is_set)
        gone.cancel()
        assert (await all_of(gone), gone.finish) == ([], None)
        assert [first] == alone([1], 1)
        free.set()
        assert await all_of(stays) == alone([2], 9)
        assert await all_of(gone) == []
        assert len(decoder.kept) == 1


async def test_who_has_gone_has_left_its_place_before_another_takes_it(source: FakeSource) -> None:
    """A reader that has enough says so in the very turn of the loop in which a batch is made."""
    kept = list[int]()
    async with generating(source, scheduling={"max_begun": 1}) as (engine, decoder, _):

        def count(number: int, step: Step) -> dict[int, LoraxError]:
            kept.append(len(decoder.kept))
            return {}

        decoder.leave = count
        gone, waits = engine.submit(asked([1], 9)), engine.submit(asked([2], 3))
        assert [await anext(gone)] == alone([1], 1)
        gone.cancel()
        assert await all_of(waits) == alone([2], 3)
    assert set(kept) == {1}


async def test_who_was_out_of_a_step_goes_on_and_says_nothing_twice(source: FakeSource) -> None:
    """With its random numbers where they were: it is as if nothing had happened."""
    late = AdapterTimeoutError("late", id="a")

    def leave(number: int, step: Step) -> dict[int, LoraxError]:
        ours = [n for n, part in enumerate(step.parts) if part.handle is not None]
        return dict.fromkeys(ours, late) if number in {0, 3, 4, 7} else {}

    for sampling in (Sampling(0), Sampling(1.0, 0.9, seed=3)):
        async with generating(source, max_tokens=4) as (engine, decoder, loader):
            await warm(loader, "a")
            request = asked([1, 2, 3, 4, 5], 8, "a", sampling=sampling)
            expected = await all_of(engine.submit(request))
            assert len(decoder.steps) == 9
            decoder.steps.clear()
            decoder.leave = leave
            answer, other = engine.submit(request), engine.submit(asked([7], 8))
            assert await all_of(other) == alone([7], 8)
            assert await all_of(answer) == expected
            assert answer.finish == "length"


async def test_a_decoder_that_raises_fails_those_of_the_step_and_goes_on(
    source: FakeSource,
) -> None:
    async with generating(source, max_sequences=2) as (engine, decoder, _):
        faults = [3]

        def before(number: int) -> None:
            if number in faults:
                faults.remove(number)
                raise MemoryError("no room for keys")

        decoder.before = before
        first, second = engine.submit(asked([1], 9)), engine.submit(asked([2], 9))
        third = engine.submit(asked([3], 4))
        for tokens in (first, second):
            got = list[int]()
            with pytest.raises(InternalError, match="no room for keys") as caught:
                async for token in tokens:
                    got.append(token)
            assert isinstance(caught.value.__cause__, MemoryError)
            assert got == alone([1 if tokens is first else 2], len(got))
            assert tokens.finish is None
        assert await all_of(third) == alone([3], 4)
        assert await all_of(engine.submit(asked([1], 9))) == alone([1], 9)


async def test_logits_that_are_no_numbers_fail_their_own_row(
    source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ScriptedDecoder.compute

    def compute(self: ScriptedDecoder, step: Step) -> Computed:
        computed = original(self, step)
        for number, part in enumerate(step.parts):
            if part.handle is not None and part.handle.id == "a":
                computed.logits[number] = torch.nan
        return computed

    monkeypatch.setattr(ScriptedDecoder, "compute", compute)
    async with generating(source) as (engine, _, loader):
        await warm(loader, "a", "b")
        broken, good, base = (engine.submit(asked([1], 5, name)) for name in ("a", "b", None))
        with pytest.raises(AdapterFormatError, match="'a'"):
            await all_of(broken)
        assert await all_of(good) == alone([1], 5, "b")
        assert await all_of(base) == alone([1], 5)


async def test_draining_ends_what_was_taken_and_takes_nothing_more(source: FakeSource) -> None:
    async with generating(source, max_sequences=1) as (engine, _, __):
        assert await engine.drain(0)
        with pytest.raises(LoaderClosedError):
            engine.submit(asked([1], 1))
    async with generating(source, max_sequences=1) as (engine, _, __):
        answers = [engine.submit(asked([n], 5, "a")) for n in range(3)]
        draining = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(LoaderClosedError):
            engine.submit(asked([1], 1))
        assert await draining
        assert [answer.finish for answer in answers] == ["length"] * 3
        for n, answer in enumerate(answers):
            assert await all_of(answer) == alone([n], 5, "a")


@pytest.mark.usefixtures("nothing_left")
async def test_closing_fails_the_rest_after_the_step_that_is_computed(source: FakeSource) -> None:
    source.hold("b")
    began, free = threading.Event(), threading.Event()

    def before(number: int) -> None:
        if number == 1:
            began.set()
            assert free.wait(20)

    async with generating(source) as (engine, decoder, _):
        decoder.before = before
        running, waiting = engine.submit(asked([1], 9, "a")), engine.submit(asked([1], 9, "b"))
        await until(began.is_set)
        assert not await engine.drain(0.01)
        closing = asyncio.create_task(engine.close())
        got = list[int]()
        with pytest.raises(LoaderClosedError):
            async for token in running:
                got.append(token)
        assert got == alone([1], 1, "a")
        with pytest.raises(LoaderClosedError):
            await all_of(waiting)
        assert not closing.done()
        assert [*decoder.kept.values()] == [[1]]
        free.set()
        await closing
        await engine.close()


async def test_a_scheduler_that_closes_first_ends_the_engine(source: FakeSource) -> None:
    async with generating(source) as (engine, _, __):
        answer = engine.submit(asked([1], 30))
        await anext(answer)
        await engine._scheduler.close()
        with pytest.raises(LoaderClosedError):
            await all_of(answer)
        assert engine._running is not None
        await engine._running
        with pytest.raises(LoaderClosedError):
            engine.submit(asked([1], 1))
