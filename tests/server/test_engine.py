"""Generations become tokens: beside each other what they would be alone, whatever ends some."""

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import tiny
import torch
from decode_world import GREEDY, VOCABULARY, ScriptedDecoder, all_of, alone, generate, generating
from event_loops import until
from gated_device import GatedDevice
from leaks import our_threads
from scheduler_world import opened, warm
from tiny_loaders import begin_copies, fails, gated
from tiny_sources import make_source

from lorax_async import AdapterLoader, errors
from lorax_async.devices.cpu import CpuDevice
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.server.engine import DecoderStep, Engine, Sampler, Sampling, TokenStream
from lorax_async.testing import FakeDecoder, FakeSource
from lorax_async.types import AdapterKey

Patch = pytest.MonkeyPatch


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return make_source(tmp_path, "a", "b", "c")


@pytest.mark.each_loop
async def test_adapters_share_a_step_and_each_answer_is_its_own(source: FakeSource) -> None:
    wanted = [(None, [1, 2]), ("a", [1, 2]), ("b", [1, 2, 3]), ("a", [7]), (None, [9, 8])]
    async with generating(source) as (engine, decoder, loader):
        await warm(loader, "a", "b")
        answers = [engine.submit(generate(prompt, 6, name)) for name, prompt in wanted]
        found = await asyncio.gather(*map(all_of, answers))
        assert found == [alone(prompt, 6, name) for name, prompt in wanted]
        assert [answer.finish for answer in answers] == ["length"] * 5
        handles = [{part.handle for part in step.parts} for step in decoder.steps]
        assert {None, "a", "b"} in [{each and each.id for each in row} for row in handles]
        assert len(decoder.steps) <= 8  # and not one by one, which would be 30
        first = engine.submit(generate([1], 30))
        got = [await anext(first) for _ in range(3)]
        assert await all_of(engine.submit(generate([2], 5))) == alone([2], 5)
        assert got + await all_of(first) == alone([1], 30)


async def test_a_stop_token_ends_it_and_does_not_come_out(source: FakeSource) -> None:
    expected = alone([3, 4], 10)
    stop = expected[4]
    assert stop not in expected[:4]
    async with generating(source) as (engine, decoder, _):
        stopped = engine.submit(generate([3, 4], 10, stop_tokens=frozenset({stop, 99})))
        finishes = [stopped.finish]
        assert await all_of(stopped) == expected[:4]
        assert [*finishes, stopped.finish] == [None, "stop"]
        last = engine.submit(generate([3, 4], 5, stop_tokens=frozenset({stop})))
        assert (await all_of(last), last.finish) == (expected[:4], "stop")
        assert len(decoder.steps) == 10


async def test_what_waits_is_counted_until_something_of_it_was_computed(source: FakeSource) -> None:
    source.hold("a")
    async with generating(source) as (engine, _, __):
        held = engine.submit(generate([1], 2, "a"))
        other = engine.submit(generate([1], 2))
        assert engine.waiting == 2
        await all_of(other)
        assert engine.waiting == 1
        source.allow("a")
        assert await all_of(held) == alone([1], 2, "a")
        assert engine.waiting == 0
        held = engine.submit(generate([1], 2, "missing"))
        await fails(all_of(held), errors.AdapterNotFoundError)
        assert engine.waiting == 0


@pytest.mark.each_loop
async def test_an_adapter_that_fails_or_is_late_fails_its_own_answers(source: FakeSource) -> None:
    source.fail(
        "fetch_groups", errors.FetchError("the line is down", retryable=False), id="a", at=1
    )
    source.hold("c")
    async with generating(source) as (engine, _, __):
        names = ("a", "missing", "b", None)
        lost, missing, good, base = (engine.submit(generate([1, 2], 6, name)) for name in names)
        late = engine.submit(generate([1], 2, "c", deadline=0.01))
        kinds = (errors.FetchError, errors.AdapterNotFoundError, errors.AdapterTimeoutError)
        for tokens, error in zip((lost, missing, late), kinds, strict=True):
            assert await all_of(tokens, error) == []
            assert tokens.finish is None
        assert await all_of(good) == alone([1, 2], 6, "b")
        assert await all_of(base) == alone([1, 2], 6)
        source.allow("c")


async def test_what_can_never_be_computed_is_refused(source: FakeSource) -> None:
    async with generating(source, decoder={"max_length": 10}) as (engine, decoder, _):
        assert engine.max_length == 10
        with pytest.raises(errors.UsageError, match=r"4 tokens .* max_new_tokens is 7.* 10 "):
            engine.submit(generate([1, 2, 3, 4], 7))
        assert await all_of(engine.submit(generate([1, 2, 3, 4], 6))) == alone([1, 2, 3, 4], 6)
        prompts: Any = ([], [VOCABULARY], [-1], [1.0])
        # With such penalties, finite logits become infinite or NaN, as if the adapter were broken.
        samplings = [Sampling(repetition_penalty=penalty) for penalty in (1e-300, 1e308)]
        samplings.append(Sampling(temperature=-1))
        wrong = [generate([1], 0), generate([1], 1, deadline=-1.0)]
        wrong += [generate([1], 1, sampling=sampling) for sampling in samplings]
        for each in (*wrong, *(generate(prompt, 1) for prompt in prompts)):
            with pytest.raises(errors.UsageError):
                engine.submit(each)
        assert engine.waiting == 0
        assert len(decoder.steps) == 6
    with pytest.raises(errors.LoaderClosedError):
        engine.submit(generate([1], 1))


@pytest.mark.parametrize("seed", range(4))
async def test_an_answer_cancelled_at_any_time_disturbs_none(source: FakeSource, seed: int) -> None:
    shuffled = random.Random(seed)
    places = {"scheduling": {"max_begun": 4}, "max_tokens": 12, "max_sequences": 4}
    async with generating(source, **places) as (engine, decoder, _):

        async def client() -> None:
            prompt = [shuffled.randrange(32) for _ in range(shuffled.randint(1, 20))]
            name, new = shuffled.choice((None, "a", "b", "c")), shuffled.randint(1, 12)
            got, patience = list[int](), shuffled.choice([0, 1, 3, 99])
            answer = engine.submit(generate(prompt, new, name))
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
            assert got == alone(prompt, new, name)[: len(got)]
            assert len(got) >= min(patience, new)

        await asyncio.gather(*(client() for _ in range(25)))
        assert engine.waiting == 0
        assert await all_of(engine.submit(generate([1], 3))) == alone([1], 3)
        assert len(decoder.kept) <= 1


async def test_an_answer_left_out_of_a_step_repeats_nothing(source: FakeSource) -> None:
    """With its random numbers where they were; left out of its first step, it still waits."""
    late, waiting = errors.AdapterTimeoutError("late", id="a"), list[int]()

    def leave(number: int, step: DecoderStep) -> dict[int, errors.LoraxError]:
        waiting.append(engine.waiting)
        ours = [n for n, part in enumerate(step.parts) if part.handle is not None]
        return dict.fromkeys(ours, late) if number in {0, 3, 4, 7} else {}

    for sampling in (GREEDY, Sampling(1.0, 0.9, seed=3)):
        async with generating(source, max_tokens=4) as (engine, decoder, loader):
            await warm(loader, "a")
            decoder.leave = leave
            request = generate([1, 2, 3, 4, 5], 8, "a", sampling=sampling)
            answer, other = engine.submit(request), engine.submit(generate([7], 8))
            assert await all_of(other) == alone([7], 8)
            assert await all_of(answer) == alone([1, 2, 3, 4, 5], 8, "a", sampling)
            assert answer.finish == "length"
        assert (waiting[0], waiting[1] >= 1, waiting[-1]) == (2, True, 0)
        waiting.clear()


async def test_a_decoder_that_raises_fails_its_step_and_goes_on(source: FakeSource) -> None:
    async with generating(source, max_sequences=2) as (engine, decoder, _):
        faults = [3]

        def before(number: int) -> None:
            if number in faults:
                faults.remove(number)
                raise MemoryError("no room for keys")

        decoder.before = before
        answers = [engine.submit(generate([1], 9)), engine.submit(generate([2], 9))]
        third = engine.submit(generate([3], 4))
        for number, answer in enumerate(answers, 1):
            got = await all_of(answer, errors.InternalError)
            assert got == alone([number], len(got))
            assert answer.finish is None
            error = await fails(anext(answer), errors.InternalError, "no room for keys")
            assert isinstance(error.__cause__, MemoryError)
        assert await all_of(third) == alone([3], 4)
        assert await all_of(engine.submit(generate([1], 9))) == alone([1], 9)


async def test_logits_that_are_no_numbers_fail_their_own_row(source: FakeSource) -> None:
    class Broken(ScriptedDecoder):
        def compute(self, step: DecoderStep) -> Any:
            computed = super().compute(step)
            for number, part in enumerate(step.parts):
                if part.handle is not None and part.handle.id == "a":
                    computed.logits[number] = torch.nan
            return computed

    decoder = Broken(loop=asyncio.get_running_loop())
    async with opened(source) as (loader, scheduler), Engine(scheduler, decoder) as engine:
        await warm(loader, "a", "b")
        broken, good, base = (engine.submit(generate([1], 5, name)) for name in ("a", "b", None))
        await fails(all_of(broken), errors.AdapterFormatError, "'a'")
        assert await all_of(good) == alone([1], 5, "b")
        assert await all_of(base) == alone([1], 5)


async def test_a_decoder_that_cannot_forget_leaves_no_thread(source: FakeSource) -> None:
    with pytest.raises(RuntimeError, match="it cannot"):
        async with generating(source) as (engine, decoder, _):
            await all_of(engine.submit(generate([1], 2)))
            decoder.forget = Mock(side_effect=RuntimeError("it cannot"))  # type: ignore[method-assign]
    assert "lorax-decoder_0" not in our_threads()
    assert not engine.alive


@pytest.mark.parametrize("ends", ["by a mistake", "closed"])
async def test_a_scheduler_that_ends_fails_all_answers(source: FakeSource, ends: str) -> None:
    source.hold("a")
    decoder = FakeDecoder(loop=asyncio.get_running_loop())
    async with opened(source) as (_, scheduler), Engine(scheduler, decoder) as engine:
        answers = [engine.submit(generate([1], 30)), engine.submit(generate([1], 9, "a"))]
        await anext(answers[0])
        if ends == "closed":
            await scheduler.close()
        else:
            mistake = AsyncMock(side_effect=ValueError("a mistake"))
            scheduler.next_batch = mistake  # type: ignore[method-assign]
        error = errors.LoaderClosedError if ends == "closed" else errors.InternalError
        for answer in answers:
            await all_of(answer, error)
            await fails(anext(answer), error, "closed|ValueError: a mistake")
        await until(lambda: not engine.alive)
        with pytest.raises(errors.LoaderClosedError, match="was closed|the engine has failed"):
            engine.submit(generate([1], 1))
        source.allow("a")


def hold_false_bytes(source: FakeSource) -> Callable[[], None]:
    """Let the bytes of "a" turn out to be false once the returned function is called."""
    source.hold_verification("a")
    source.fail("verify", errors.IntegrityError("it has other bytes"), id="a", times=9)
    return lambda: source.allow_verification("a")


async def test_no_token_of_an_adapter_that_was_false_comes_out(source: FakeSource) -> None:
    tell = hold_false_bytes(source)

    def leave(number: int, step: DecoderStep) -> dict[int, errors.LoraxError]:
        tell()
        handle = step.parts[0].handle
        assert handle is not None
        late = time.monotonic() + 20
        while time.monotonic() < late:
            try:
                handle.require_sound()
            except errors.IntegrityError:
                return {}
            time.sleep(0.001)
        raise AssertionError("it stayed sound")

    async with generating(source) as (engine, decoder, loader):
        await warm(loader, "a")
        decoder.leave = leave
        assert await all_of(engine.submit(generate([1], 9, "a")), errors.IntegrityError) == []


@pytest.mark.each_loop
@pytest.mark.usefixtures("nothing_left")
async def test_closing_fails_the_rest_after_the_step_that_is_computed(source: FakeSource) -> None:
    """Nothing is taken meanwhile, and cancelling the closing task does not stop it."""
    source.hold("b")
    began, free = threading.Event(), threading.Event()

    def before(number: int) -> None:
        if number == 1:
            began.set()
            assert free.wait(20)

    async with generating(source) as (engine, decoder, _):
        decoder.before = before
        running, waiting = (
            engine.submit(generate([1], 9, "a")),
            engine.submit(generate([1], 9, "b")),
        )
        await until(began.is_set)
        cancelled, closing = (asyncio.create_task(engine.close()) for _ in range(2))
        try:
            assert await all_of(running, errors.LoaderClosedError) == alone([1], 1, "a")
            await all_of(waiting, errors.LoaderClosedError)
            with pytest.raises(errors.LoaderClosedError, match="the engine was closed"):
                engine.submit(generate([1], 1))
            assert not engine.alive
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
            assert not closing.done()
            assert [*decoder.kept.values()] == [[1]]
        finally:
            free.set()
        await closing


@pytest.mark.parametrize("turns", range(10))
async def test_closing_in_any_turn_cuts_or_ends_an_answer(source: FakeSource, turns: int) -> None:
    """As its last step ends, and as a step begins; the decoder forgets all in either case."""
    loop, closing = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    async def close() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await engine.close()

    def leave(number: int, step: DecoderStep) -> dict[int, errors.LoraxError]:
        loop.call_soon_threadsafe(lambda: closing.append(asyncio.create_task(close())))
        return {}

    async with generating(source) as (engine, decoder, _):
        assert await all_of(engine.submit(generate([2], 1))) == alone([2], 1)
        decoder.leave = leave
        answer = engine.submit(generate([1], 1))
        await until(lambda: closing)
        await closing[0]
        whole = answer.finish == "length"
        got = await all_of(answer, None if whole else errors.LoaderClosedError)
        assert got == (alone([1], 1) if whole else [])
    async with generating(source) as (engine, decoder, _):
        assert await all_of(engine.submit(generate([2], 1))) == alone([2], 1)
        engine.submit(generate([1], 9))
        await close()


PLACES, LONG = 16, 50
SEEDED = Sampling(temperature=0.8, top_p=0.9, seed=7)


@asynccontextmanager
async def full(
    source: FakeSource, *, adapter: Any = "a", share: float = 0.5, **more: Any
) -> AsyncIterator[tuple[Engine, ScriptedDecoder, list[TokenStream]]]:
    places = {"max_begun": PLACES, "max_share": share}
    room: Any = {"scheduling": places, "max_sequences": PLACES}
    async with generating(source, **room) as (engine, decoder, loader):
        await warm(loader, "a", "b")
        asking = [generate([n, 1, 2], LONG, adapter, **more) for n in range(PLACES)]
        answers = [engine.submit(each) for each in asking]
        await until(lambda: all(len(answer.known) > 4 for answer in answers))
        yield engine, decoder, answers


def steps_with(decoder: ScriptedDecoder, answer: TokenStream) -> list[int]:
    rows = [[part.sequence for part in step.parts] for step in decoder.steps]
    return [number for number, row in enumerate(rows) if answer.number in row]


async def require_whole(answers: Any, adapter: str = "a", sampling: Sampling = GREEDY) -> None:
    for number, answer in enumerate(answers):
        assert await all_of(answer) == alone([number, 1, 2], LONG, adapter, sampling)
        assert answer.finish == "length"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_the_youngest_gives_way_to_another(source: FakeSource, sampling: Sampling) -> None:
    """It goes on at once when there is room, and no answer loses a token or gets one twice."""
    async with full(source, sampling=sampling) as (engine, decoder, answers):
        before = len(decoder.steps)
        short = engine.submit(generate([5], 3, "b"))
        assert await all_of(short) == alone([5], 3, "b")
        during = steps_with(decoder, short)
        assert during[0] - before <= 2
        assert sum(len(answer.known) - 3 == LONG for answer in answers) == 0
        await require_whole(answers, sampling=sampling)
        assert all(set(during) <= set(steps_with(decoder, each)) for each in answers[:-1])
        last = steps_with(decoder, answers[-1])
        assert not set(during) & set(last)
        assert max(during) + 1 in last
        parts = [part for step in decoder.steps for part in step.parts]
        again = [part.start for part in parts if part.sequence == answers[-1].number]
        assert again.count(0) == 2  # it was computed again once, and not at every step


async def test_one_client_does_not_fill_the_places(source: FakeSource) -> None:
    async with full(source, client="one") as (engine, decoder, answers):
        before = len(decoder.steps)
        short = engine.submit(generate([5], 3, "a", client="two"))
        assert await all_of(short) == alone([5], 3, "a")
        assert steps_with(decoder, short)[0] - before <= 2
        await require_whole(answers)


def used_by(decoder: ScriptedDecoder) -> list[tuple[int, int]]:
    ids = [[p.handle.id for p in step.parts if p.handle] for step in decoder.steps]
    return [(row.count("a"), row.count("b")) for row in ids]


async def test_while_others_wait_an_adapter_has_its_share(source: FakeSource) -> None:
    """Of sixteen places both have eight, whichever came first; alone, one has all of them."""
    async with full(source) as (engine, decoder, first):
        second = [engine.submit(generate([n, 1, 2], LONG, "b")) for n in range(PLACES)]
        await until(lambda: len(second[7].known) > 10)
        assert used_by(decoder)[-5:] == [(8, 8)] * 5
        assert engine.waiting == 8, "the preempted were computed before, and do not wait"
        await require_whole(first)
        await require_whole(second, "b")
        used = used_by(decoder)
        assert (0, PLACES) not in used[: used.index((PLACES, 0)) + 1]
        parts = [part for step in decoder.steps for part in step.parts if not part.start]
        assert len(parts) == 2 * PLACES + 8  # eight were preempted, once each


@pytest.mark.parametrize(("share", "most"), [(0.25, 8), (1.0, 0)])
async def test_shares_are_set(source: FakeSource, share: float, most: int) -> None:
    async with full(source, share=share) as (engine, decoder, first):
        second = [engine.submit(generate([n, 3], 5, "b")) for n in range(2 * PLACES)]
        for answer in (*first, *second):
            await all_of(answer)
        assert max(b for a, b in used_by(decoder) if a) == most
        begun = [part for step in decoder.steps for part in step.parts if not part.start]
        assert len(begun) - 3 * PLACES == most  # as many were preempted, once each


@pytest.mark.parametrize("ends", ["adapter", "engine"])
async def test_preempted_answers_end_after_their_tokens(source: FakeSource, ends: str) -> None:
    tell = hold_false_bytes(source)
    async with full(source) as (engine, _, answers):
        others = [engine.submit(generate([n, 1, 2], LONG, "b")) for n in range(8)]
        await until(lambda: len(others[-1].known) > 3)
        if ends == "engine":
            await engine.close()
        tell()
        error = errors.LoaderClosedError if ends == "engine" else errors.IntegrityError
        for number, answer in enumerate(answers):
            got = await all_of(answer, error)
            assert got == alone([number, 1, 2], LONG, "a")[: len(got)]
            assert got
        if ends == "adapter":
            await require_whole(others, "b")


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    """Its token comes in the very turn, and is the next one's. The first end counts."""
    ticket: Any = None
    answer = TokenStream(1, generate([1], 9), Sampler(GREEDY), ticket)
    for token in (5, 6):
        task = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        task.cancel()
        answer.add(token)
        await asyncio.wait([task])
        assert await anext(answer) == token
    answer.add(7)
    answer.end(errors.LoaderClosedError("closed"))
    answer.end(errors.InternalError("another"))
    answer.end()
    assert await all_of(answer, errors.LoaderClosedError) == [7]


@asynccontextmanager
async def over_files() -> AsyncIterator[tuple[Engine, AdapterLoader, GatedDevice]]:
    loader, device = gated(slots=2)
    decoder = FakeDecoder(max_sequences=4, loop=asyncio.get_running_loop())
    async with (
        loader,
        AdapterScheduler(loader, max_begun=4) as scheduler,
        Engine(scheduler, decoder, max_sequences=4) as engine,
    ):
        yield engine, loader, device
    assert decoder.kept == {}


async def test_an_answer_is_cancelled_while_its_files_are_loaded_again(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with over_files() as (engine, _, device):
        device.gate.clear()
        answer = engine.submit(generate([1], 5, folder))
        await until(lambda: device.copies)
        tiny.write(folder, 2)
        device.gate.set()
        answer.cancel()
        assert await all_of(answer) == []


async def test_false_bytes_of_files_that_did_not_change(tmp_path: Path, monkeypatch: Patch) -> None:
    false = Mock(side_effect=errors.IntegrityError("the disk gave other bytes"))
    monkeypatch.setattr(CpuDevice, "copy", false)
    async with over_files() as (engine, *_):
        answer = engine.submit(generate([1], 5, tiny.write(tmp_path / "a", 1)))
        await fails(all_of(answer), errors.IntegrityError, "other bytes")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("saves", "error"),
    [([2], None), ([0], errors.AdapterFormatError), ([2, 3], errors.IntegrityError)],
)
async def test_answers_without_a_token_get_the_version_that_is_saved_meanwhile(
    tmp_path: Path, saves: list[int], error: type[errors.LoraxError] | None
) -> None:
    """A version in pieces (0) is told, and so is a second one."""
    folder, samplings = tiny.write(tmp_path / "a", 1), [GREEDY] * 6 + [SEEDED]
    async with over_files() as (engine, loader, device):
        device.gate.clear()
        asking = [generate([n], 5, folder, sampling=how) for n, how in enumerate(samplings)]
        answers = [engine.submit(each) for each in asking]
        tries = set[AdapterKey]()
        for seed in saves:
            await begin_copies(loader, device, tries)
            if seed:
                tiny.write(folder, seed)
            else:
                os.truncate(folder / "adapter_model.safetensors", 1000)
        device.gate.set()
        for n, (answer, sampling) in enumerate(zip(answers, samplings, strict=True)):
            got = await all_of(answer, error)
            assert got == ([] if error else alone([n], 5, str(folder), sampling))
