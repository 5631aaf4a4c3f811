"""Engines that end in the very turn of the loop in which something else does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common import our_threads, until
from lorax_async import (
    AdapterKey,
    AdapterRef,
    AdapterTimeoutError,
    IntegrityError,
    InternalError,
    LoaderClosedError,
    LoraxError,
)
from lorax_async.server.decoding.answer import Answer
from lorax_async.server.engine import Engine
from lorax_async.server.ports import Step
from lorax_async.testing import FakeSource
from scheduling.serving import turns, warm
from server.generating import all_of, alone, asked, generating
from tiny_sources import stocked


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return stocked(tmp_path, "a")


@asynccontextmanager
async def in_a_step(source: FakeSource) -> AsyncIterator[tuple[Engine, Answer, threading.Event]]:
    """An engine whose step is computed until the event is set, and whose it is."""
    began, free = threading.Event(), threading.Event()

    def before(number: int) -> None:
        del number
        began.set()
        assert free.wait(20)

    async with generating(source) as (engine, decoder, _):
        decoder.before = before
        answer = engine.submit(asked([1], 9))
        await until(began.is_set)
        yield engine, answer, free


async def test_who_had_ended_when_it_closes_is_not_broken_off(source: FakeSource) -> None:
    """It has, and nobody was told yet."""
    async with generating(source) as (engine, _, __):
        computed, done, gate = engine._in_thread, asyncio.Event(), asyncio.Event()

        async def held(work: Any, *given: object) -> Any:
            found = await computed(work, *given)
            done.set()
            await gate.wait()
            return found

        async def close() -> None:
            await gate.wait()
            await engine.close()

        closing = asyncio.create_task(close())  # it goes on before the step does
        await asyncio.sleep(0)
        engine._in_thread = held  # type: ignore[method-assign]
        answer = engine.submit(asked([1], 1))
        await done.wait()
        gate.set()
        assert await all_of(answer) == alone([1], 1)
        assert answer.finish == "length"
        await closing


async def test_cancelling_who_closes_it_does_not_stop_it(source: FakeSource) -> None:
    async with in_a_step(source) as (engine, answer, free):
        closing = asyncio.create_task(engine.close())
        with pytest.raises(LoaderClosedError):
            await all_of(answer)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        free.set()
        await engine.close()


async def test_nobody_is_taken_while_it_closes(source: FakeSource) -> None:
    async with in_a_step(source) as (engine, _, free):
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        try:
            with pytest.raises(LoaderClosedError, match="the engine was closed"):
                engine.submit(asked([1], 1))
            assert not engine.alive
        finally:
            free.set()
        await closing


async def test_a_step_that_is_not_begun_with_forgets_who_has_gone(source: FakeSource) -> None:
    """As the engine closes before its thread has come to it."""
    asked_for, free = list[Any](), threading.Event()
    async with generating(source) as (engine, decoder, _):
        assert await all_of(engine.submit(asked([1], 2))) == alone([1], 2)
        assert len(decoder.kept) == 1
        compute = engine._in_thread

        async def noted(work: Any, *given: object) -> Any:
            asked_for.append(given)
            return await compute(work, *given)

        engine._in_thread = noted  # type: ignore[method-assign]
        engine._thread.submit(free.wait, 20)
        engine.submit(asked([2], 2))
        await until(lambda: asked_for)
        closing = asyncio.create_task(engine.close())
        await until(lambda: len(asked_for) == 2)
        await turns()
        free.set()
        await closing
        assert decoder.kept == {}


async def test_a_decoder_that_cannot_forget_leaves_no_thread(source: FakeSource) -> None:
    with pytest.raises(RuntimeError, match="it cannot"):
        async with generating(source) as (engine, decoder, _):
            await all_of(engine.submit(asked([1], 2)))

            def forget(sequence: int) -> None:
                raise RuntimeError("it cannot")

            decoder.forget = forget  # type: ignore[method-assign]
    assert "lorax-decoder_0" not in our_threads()
    assert not engine.alive


async def test_an_engine_that_fails_tells_everybody(source: FakeSource) -> None:
    source.hold("a")
    async with generating(source) as (engine, _, __):
        next_batch, batches = engine._scheduler.next_batch, [1]

        async def failing(*limits: int) -> Any:
            if not batches:
                raise ValueError("a mistake")
            batches.pop()
            return await next_batch(*limits)

        engine._scheduler.next_batch = failing  # type: ignore[method-assign, assignment]
        answers = [engine.submit(asked([1], 9)), engine.submit(asked([1], 9, "a"))]
        for answer in answers:
            with pytest.raises(InternalError, match="ValueError: a mistake"):
                await all_of(answer)
        with pytest.raises(LoaderClosedError, match="the engine has failed"):
            engine.submit(asked([1], 1))
        assert not engine.alive
        assert await engine.drain(20)
        source.allow("a")


async def test_no_token_of_an_adapter_that_was_false_comes_out(source: FakeSource) -> None:
    """It is found out while the step is computed, and no event tells."""
    async with generating(source) as (engine, decoder, loader):
        computed, digest, gate = engine._in_thread, source.digest, asyncio.Event()

        async def gated(key: AdapterKey) -> str:
            await gate.wait()
            return await digest(key)

        def is_false() -> bool:
            handle = decoder.steps[0].parts[0].handle
            assert handle is not None
            try:
                handle.require_sound()
            except IntegrityError:
                return True
            return False

        async def held(work: Any, *given: object) -> Any:
            found = await computed(work, *given)
            gate.set()
            await until(is_false)
            engine._in_thread = computed  # type: ignore[method-assign]
            return found

        source.digest = gated  # type: ignore[method-assign]
        await warm(loader, "a")
        engine._in_thread = held  # type: ignore[method-assign]
        false = AdapterRef("a", digest="0" * 64)
        answer, got = engine.submit(asked([1], 9, false)), list[int]()
        with pytest.raises(IntegrityError):
            async for token in answer:
                got.append(token)
        assert got == []


async def test_who_was_out_of_its_first_step_still_waits(source: FakeSource) -> None:
    waiting = list[int]()
    async with generating(source) as (engine, decoder, loader):

        def leave(number: int, step: Step) -> dict[int, LoraxError]:
            waiting.append(engine.waiting)
            return {0: AdapterTimeoutError("late", id="a")} if number == 0 else {}

        decoder.leave = leave
        await warm(loader, "a")
        assert await all_of(engine.submit(asked([1], 2, "a"))) == alone([1], 2, "a")
    assert waiting == [1, 1, 0]
