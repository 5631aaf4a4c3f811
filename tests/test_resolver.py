"""The first of the two joins: equal requests ask once, and no caller can hurt another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter

import pytest

from common import until
from lorax_async.adapter import AdapterKey, AdapterRef, Merge
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    InternalError,
    LoaderClosedError,
    LoraxError,
)
from lorax_async.runtime import resolver as resolver_module
from lorax_async.runtime.journal import Journal
from lorax_async.runtime.resolver import Resolver
from lorax_async.testing import FakeSource

pytestmark = pytest.mark.each_loop

ONE = AdapterRef("one")


class SlowSource(FakeSource):
    """Answers once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()
        self.cancelled = 0

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().resolve(ref)


def slow() -> tuple[SlowSource, Resolver]:
    source = SlowSource()
    source.put("one", b"", b"")
    return source, Resolver(source, Journal(), 60)


async def asked(
    resolver: Resolver, ref: AdapterRef | Merge, times: int
) -> list[asyncio.Task[AdapterKey]]:
    """And the question is under way: a caller's step begins it, and its own is the next one."""
    tasks = [asyncio.create_task(resolver.resolve(ref)) for _ in range(times)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def ends(tasks: list[asyncio.Task[AdapterKey]]) -> list[AdapterKey | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_equal_requests_are_one_question() -> None:
    source, resolver = slow()
    tasks = await asked(resolver, AdapterRef("one", revision="main", token="mine"), 50)
    tasks += await asked(resolver, AdapterRef("one", revision="main", token="mine"), 50)
    source.answer.set()
    keys = await ends(tasks)
    assert source.counts.resolves == 1
    assert {key.location for key in keys if isinstance(key, AdapterKey)} == {"memory:one"}
    assert len(keys) == 100
    await resolver.resolve(AdapterRef("one", revision="main", token="mine"))
    assert source.counts.resolves == 2, "an answer is remembered for `known`, not for `resolve`"


@pytest.mark.parametrize(
    "other",
    [
        AdapterRef("one", token="theirs"),
        AdapterRef("one", revision="main"),
        AdapterRef("one", source="s3"),
        AdapterRef(Path("one")),
    ],
    ids=lambda ref: repr(ref.__class__),
)
async def test_another_scope_asks_for_itself(other: AdapterRef) -> None:
    """One caller's answer says nothing about what another may see."""
    source, resolver = slow()
    tasks = await asked(resolver, ONE, 2) + await asked(resolver, other, 2)
    source.answer.set()
    await ends(tasks)
    assert source.counts.resolves == 2
    await resolver.resolve(ONE)
    await resolver.stop()


async def test_a_cancelled_caller_leaves_the_others_their_answer() -> None:
    source, resolver = slow()
    tasks = await asked(resolver, ONE, 3)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert tasks[0].cancelled()
    source.answer.set()
    _, second, third = await ends(tasks)
    assert isinstance(second, AdapterKey)
    assert second == third
    assert (source.counts.resolves, source.cancelled) == (1, 0)


async def test_a_resolve_ends_with_its_last_caller() -> None:
    source, resolver = slow()
    tasks = await asked(resolver, ONE, 3)
    for task in tasks:
        assert source.cancelled == 0
        task.cancel()
        await asyncio.wait([task])
    await until(lambda: source.cancelled == 1)
    assert resolver.known(ONE) is None
    assert [task for task in asyncio.all_tasks() if "lorax" in task.get_name()] == []
    (task,) = await asked(resolver, ONE, 1)  # and the next caller starts another one
    source.answer.set()
    assert await task == resolver.known(ONE)


class Lingering(SlowSource):
    """Takes a while to end when it is cancelled, as a call in a thread does."""

    def __init__(self) -> None:
        super().__init__()
        self.end = asyncio.Event()

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        try:
            return await super().resolve(ref)
        except asyncio.CancelledError:
            await self.end.wait()
            raise


async def test_a_caller_does_not_join_a_resolve_that_ends() -> None:
    source = Lingering()
    source.put("one", b"", b"")
    resolver = Resolver(source, Journal(), 60)
    (first,) = await asked(resolver, ONE, 1)
    first.cancel()
    await ends([first])
    (second,) = await asked(resolver, ONE, 1)
    source.answer.set()
    key = await second
    source.end.set()
    await until(lambda: not [t for t in asyncio.all_tasks() if "lorax" in t.get_name()])
    assert resolver.known(ONE) == key, "the one that was cancelled takes no answer back"


async def test_parts_of_a_merge_are_resolved_as_long_as_the_merge_is() -> None:
    """Who asks for a part alone and leaves ends nothing; the merge's last caller ends both."""
    source, resolver = slow()
    source.put("two", b"", b"")
    both = Merge("linear", [ONE, AdapterRef("two")], [1.0, 1.0])
    (merging,) = await asked(resolver, both, 1)
    (alone,) = await asked(resolver, ONE, 1)
    alone.cancel()
    await ends([alone])
    assert source.cancelled == 0
    merging.cancel()
    await ends([merging])
    await until(lambda: source.cancelled == 2)
    await until(lambda: not [t for t in asyncio.all_tasks() if "lorax" in t.get_name()])


async def test_each_caller_has_an_error_of_its_own() -> None:
    source, resolver = slow()
    order = AccessDeniedError("not yours")
    order.__cause__ = cause = OSError("403")
    source.fail("resolve", order)
    tasks = await asked(resolver, ONE, 3)
    source.answer.set()
    errors = await ends(tasks)
    assert len(set(map(id, errors))) == 3
    for error in errors:
        assert isinstance(error, AccessDeniedError)
        assert (error.id, error.stage, error.retryable) == ("one", "resolve", False)
        assert error.problem == "not yours"
        assert error.__cause__ is cause


async def test_a_stage_is_added_where_the_error_names_none() -> None:
    source, resolver = slow()
    source.answer.set()
    source.fail("resolve", LoraxError("something"))
    with pytest.raises(LoraxError, match="adapter 'one', stage resolve: something"):
        await resolver.resolve(ONE)
    source.fail("resolve", LoraxError("something", stage="verify"))
    with pytest.raises(LoraxError, match="adapter 'one', stage verify: something"):
        await resolver.resolve(ONE)


async def test_a_foreign_exception_becomes_internal() -> None:
    source, resolver = slow()
    source.answer.set()
    cause = ZeroDivisionError("oops")
    source.fail("resolve", cause)
    with pytest.raises(InternalError, match="ZeroDivisionError: oops") as caught:
        await resolver.resolve(ONE)
    assert caught.value.__cause__ is cause
    await resolver.resolve(ONE)  # and the next question is a new one


async def test_the_last_answer_is_known() -> None:
    """A refusal takes the answer back: it must not be served from memory after that."""
    source, resolver = slow()
    source.answer.set()
    assert resolver.known(ONE) is None
    first = await resolver.resolve(ONE)
    assert resolver.known(ONE) == first
    assert resolver.known(AdapterRef("one", token="theirs")) is None
    second = source.put("one", b"", b"new")
    assert resolver.known(ONE) == first != second
    assert await resolver.resolve(ONE) == second
    assert resolver.known(ONE) == second
    source.remove("one")
    with pytest.raises(AdapterNotFoundError):
        await resolver.resolve(ONE)
    assert resolver.known(ONE) is None


async def test_the_oldest_answer_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_REMEMBERED", 3)
    source, resolver = slow()
    source.answer.set()
    refs = [AdapterRef(str(n)) for n in range(4)]
    for ref in refs:
        source.put(ref.text, b"", b"")
    for ref in (*refs[:3], refs[0], refs[3]):
        await resolver.resolve(ref)
    assert [resolver.known(ref) is not None for ref in refs] == [True, False, True, True]


async def test_the_time_is_counted_once() -> None:
    source, journal = SlowSource(), Journal()
    source.put("one", b"", b"")
    started = perf_counter()
    tasks = await asked(Resolver(source, journal, 60), ONE, 10)
    await asyncio.sleep(0.02)  # a loop's clock may be a millisecond ahead
    source.answer.set()
    await ends(tasks)
    assert 0.018 <= journal.statistics().seconds["resolve"] <= perf_counter() - started


async def test_a_stopped_resolver_tells_who_waits() -> None:
    """A caller that was cancelled itself hears that, not of the loader's end."""
    source, resolver = slow()
    tasks = await asked(resolver, ONE, 3)
    tasks[0].cancel()
    await resolver.stop()
    first, *others = await ends(tasks)
    assert isinstance(first, asyncio.CancelledError)
    for error in others:
        assert isinstance(error, LoaderClosedError)
        assert error.stage == "resolve"
    assert source.cancelled == 1
    assert resolver.known(ONE) is None
    assert [task for task in asyncio.all_tasks() if "lorax" in task.get_name()] == []
    await resolver.stop()


@pytest.mark.parametrize("steps", range(6))
async def test_a_caller_cancelled_while_it_stops(steps: int) -> None:
    """At whichever step: who was cancelled hears that, and who was not hears of the end."""
    _, resolver = slow()
    (task,) = await asked(resolver, ONE, 1)
    stopping = asyncio.create_task(resolver.stop())
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = task.cancel()
    (end,) = await ends([task])
    assert type(end) is (asyncio.CancelledError if cancelled else LoaderClosedError)
    await stopping


async def test_a_question_has_a_name() -> None:
    _, resolver = slow()
    tasks = await asked(resolver, AdapterRef("one", token="hf_secret"), 1)
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert "lorax resolve one" in names
    assert not any("hf_secret" in name for name in names)
    await resolver.stop()
    await ends(tasks)
