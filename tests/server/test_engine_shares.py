"""One adapter, or one client, fills all places of an engine, and others ask for something short."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import IntegrityError, LoaderClosedError
from lorax_async.server.decoding.answer import Answer
from lorax_async.server.decoding.sampling import Sampler
from lorax_async.server.engine import Engine
from lorax_async.server.generation import Sampling
from lorax_async.testing import FakeSource, fake_logits
from scheduling.serving import warm
from server.generating import GREEDY, VOCABULARY, ScriptedDecoder, all_of, alone, asked, generating
from tiny_sources import stocked

PLACES = 16
LONG = 50
ROOM: dict[str, Any] = {"scheduling": {"max_begun": PLACES}, "max_sequences": PLACES}
SEEDED = Sampling(temperature=0.8, top_p=0.9, seed=7)


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return stocked(tmp_path, "a", "b", "c")


def undisturbed(
    prompt: Sequence[int], new: int, adapter: str | None, sampling: Sampling
) -> list[int]:
    """What comes out when nothing comes between the tokens."""
    if sampling == GREEDY:
        return alone(prompt, new, adapter)
    tokens, sampler = list(prompt), Sampler(sampling)
    for _ in range(new):
        tokens.append(sampler.choose(fake_logits(adapter, tokens, VOCABULARY)))
    return tokens[len(prompt) :]


async def fill(engine: Engine, adapter: str = "a", **more: Any) -> list[Answer]:
    """Long answers, each with its first tokens."""
    answers = [engine.submit(asked([n, 1, 2], LONG, adapter, **more)) for n in range(PLACES)]
    await until(lambda: all(len(answer.known) > 4 for answer in answers))
    return answers


def began_after(decoder: ScriptedDecoder, answer: Answer, steps: int) -> int:
    """How many steps passed until it was in one."""
    for number, step in enumerate(decoder.steps):
        if any(part.sequence == answer.number for part in step.parts):
            return number - steps
    raise AssertionError("it was in no step")


def steps_with(decoder: ScriptedDecoder, answer: Answer) -> list[int]:
    return [
        number
        for number, step in enumerate(decoder.steps)
        if any(part.sequence == answer.number for part in step.parts)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
async def test_a_short_answer_does_not_wait_for_the_long_ones_of_another_adapter(
    source: FakeSource, sampling: Sampling
) -> None:
    """And those lose no token, get none twice, and are what they would have been."""
    async with generating(source, **ROOM) as (engine, decoder, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine, sampling=sampling)
        before = len(decoder.steps)
        short = engine.submit(asked([5], 3, "b"))
        assert await all_of(short) == alone([5], 3, "b")
        assert began_after(decoder, short, before) <= 2
        assert sum(len(answer.known) - 3 == LONG for answer in answers) == 0
        for number, answer in enumerate(answers):
            assert await all_of(answer) == undisturbed([number, 1, 2], LONG, "a", sampling)
            assert answer.finish == "length"


async def test_the_youngest_gives_way_and_goes_on_when_there_is_room(source: FakeSource) -> None:
    async with generating(source, **ROOM) as (engine, decoder, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine)
        short = engine.submit(asked([5], 3, "b"))
        await all_of(short)
        for answer in answers:
            await all_of(answer)
        during = steps_with(decoder, short)
        kept = [steps_with(decoder, answer) for answer in answers[:-1]]
        assert all(set(during) <= set(steps) for steps in kept)
        last = steps_with(decoder, answers[-1])
        assert not set(during) & set(last)
        assert max(during) + 1 in last  # at once
        again = [
            part.start
            for step in decoder.steps
            for part in step.parts
            if part.sequence == answers[-1].number
        ]
        assert again.count(0) == 2  # it was computed again once, and not at every step


async def test_while_others_wait_an_adapter_has_its_share(source: FakeSource) -> None:
    """Of sixteen places both have eight, whoever came first; alone, one has all of them."""
    async with generating(source, **ROOM) as (engine, decoder, loader):
        await warm(loader, "a", "b")
        first = await fill(engine)
        second = [engine.submit(asked([n, 3], LONG, "b")) for n in range(PLACES)]
        await until(lambda: len(second[7].known) > 10)
        rows = [[part.handle.id for part in s.parts if part.handle] for s in decoder.steps[-5:]]
        assert all((each.count("a"), each.count("b")) == (8, 8) for each in rows)
        for answer in (*first, *second):
            await all_of(answer)
        ids = [[p.handle.id for p in s.parts if p.handle] for s in decoder.steps]
        assert ["b"] * PLACES not in ids[: ids.index(["a"] * PLACES) + 1]
        parts = [part for step in decoder.steps for part in step.parts if not part.start]
        assert len(parts) == 2 * PLACES + 8  # eight were preempted, once each


@pytest.mark.parametrize("share", [0.25, 1.0])
async def test_the_share_is_a_setting(source: FakeSource, share: float) -> None:
    room = {"max_begun": PLACES, "max_share": share}
    async with generating(source, scheduling=room, max_sequences=PLACES) as (engine, dec, it):
        await warm(it, "a", "b")
        first = await fill(engine)
        second = [engine.submit(asked([n, 3], 5, "b")) for n in range(2 * PLACES)]
        for answer in (*first, *second):
            await all_of(answer)
        most = max(
            sum(part.handle is not None and part.handle.id == "b" for part in step.parts)
            for step in dec.steps
            if any(part.handle is not None and part.handle.id == "a" for part in step.parts)
        )
        begun = [step for step in dec.steps for part in step.parts if not part.start]
        preempted = len(begun) - 3 * PLACES
        assert (most, preempted) == ((8, 8) if share == 0.25 else (0, 0))


async def test_one_client_does_not_fill_the_places_of_an_adapter(source: FakeSource) -> None:
    async with generating(source, **ROOM) as (engine, decoder, loader):
        await warm(loader, "a")
        answers = await fill(engine, client="one")
        before = len(decoder.steps)
        short = engine.submit(asked([5], 3, "a", client="two"))
        assert await all_of(short) == alone([5], 3, "a")
        assert began_after(decoder, short, before) <= 2
        for number, answer in enumerate(answers):
            assert await all_of(answer) == alone([number, 1, 2], LONG, "a")


async def test_one_client_does_not_fill_the_places_with_many_adapters(source: FakeSource) -> None:
    async with generating(source, **ROOM) as (engine, decoder, loader):
        await warm(loader, "a", "b", "c")
        answers = [
            engine.submit(asked([n], LONG, "ab"[n % 2], client="one")) for n in range(PLACES)
        ]
        await until(lambda: all(len(answer.known) > 4 for answer in answers))
        before = len(decoder.steps)
        short = engine.submit(asked([5], 3, "c", client="two"))
        assert await all_of(short) == alone([5], 3, "c")
        assert began_after(decoder, short, before) <= 2
        for number, answer in enumerate(answers):
            assert await all_of(answer) == alone([number], LONG, "ab"[number % 2])


async def test_a_preempted_answer_can_be_cancelled(source: FakeSource) -> None:
    async with generating(source, **ROOM) as (engine, _, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine)
        others = [engine.submit(asked([n, 3], LONG, "b")) for n in range(8)]
        await until(lambda: len(others[-1].known) > 3)
        had = len(answers[-1].known)
        answers[-1].cancel()
        answers[0].cancel()  # its place is for one that was preempted
        for number, answer in enumerate(answers[1:-1], 1):
            assert await all_of(answer) == alone([number, 1, 2], LONG, "a")
        for number, answer in enumerate(others):
            assert await all_of(answer) == alone([number, 3], LONG, "b")
        assert len(answers[-1].known) == had
        assert engine.waiting == 0


async def test_preempted_answers_end_with_their_adapter(source: FakeSource) -> None:
    """After the tokens that came before."""
    async with generating(source, **ROOM) as (engine, _, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine)
        others = [engine.submit(asked([n, 3], LONG, "b")) for n in range(8)]
        await until(lambda: len(others[-1].known) > 3)
        scheduler = engine._scheduler
        guest = scheduler._book.guest_of(answers[0].ticket)
        scheduler._book.fail(guest, IntegrityError("the bytes are others"))
        for number, answer in enumerate(answers):
            got = list[int]()
            with pytest.raises(IntegrityError):
                async for token in answer:
                    got.append(token)
            assert got == alone([number, 1, 2], LONG, "a")[: len(got)]
            assert got
        for number, answer in enumerate(others):
            assert await all_of(answer) == alone([number, 3], LONG, "b")


async def test_preempted_answers_end_with_the_engine(source: FakeSource) -> None:
    async with generating(source, **ROOM) as (engine, _, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine)
        others = [engine.submit(asked([n, 3], LONG, "b")) for n in range(8)]
        await until(lambda: len(others[-1].known) > 3)
        await engine.close()
        for answer in (*answers, *others):
            with pytest.raises(LoaderClosedError):
                await all_of(answer)


async def test_preempted_answers_are_not_among_those_that_wait(source: FakeSource) -> None:
    """Something of them was computed, so that the limit of the queue does not count them."""
    async with generating(source, **ROOM) as (engine, _, loader):
        await warm(loader, "a", "b")
        answers = await fill(engine)
        others = [engine.submit(asked([n, 3], LONG, "b")) for n in range(10)]
        await until(lambda: len(others[7].known) > 3)
        assert engine.waiting == 2
        for answer in (*answers, *others):
            answer.cancel()
        await asyncio.sleep(0)
        assert engine.waiting == 0
