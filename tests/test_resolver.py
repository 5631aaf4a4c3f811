"""Equal requests ask a source once, and no caller can hurt another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

import tiny
from common import until
from lorax_async import (
    AccessDeniedError,
    AdapterKey,
    AdapterLoader,
    AdapterNotFoundError,
    AdapterRef,
    InternalError,
    LoaderClosedError,
    LoraxError,
    Merge,
)
from lorax_async.adapter import Ref
from lorax_async.testing import FakeSource
from sweeping import our_tasks
from tiny_sources import over, state

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

ONE = AdapterRef("one")


class SlowSource(FakeSource):
    """Answers once it is told to, and ends a question that is cancelled once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.cancelled = 0

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.may_end.wait()
            raise
        return await super().resolve(ref)


def slow(tmp_path: Path, *, answers: bool = False) -> tuple[SlowSource, AdapterLoader]:
    source = SlowSource()
    for seed, name in enumerate(("one", "two")):
        source.put(name, *tiny.files(tiny.write(tmp_path / name, seed)))
    if answers:
        source.answer.set()
    return source, over(source)


async def asked(loader: AdapterLoader, ref: Ref, times: int) -> list[asyncio.Task[Any]]:
    """Calls whose question is under way."""
    tasks = [asyncio.create_task(loader.load(ref)) for _ in range(times)]
    for _ in range(4):
        await asyncio.sleep(0)
    return tasks


async def ends(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """The keys or errors; every handle is released."""
    found = []
    for each in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(each, BaseException):
            each.release()
        found.append(each if isinstance(each, BaseException) else each.key)
    return found


async def test_equal_requests_are_one_question(tmp_path: Path) -> None:
    """Which has a name without a secret, and whose time is counted once."""
    source, loader = slow(tmp_path)
    ref = AdapterRef("one", revision="main", token="hf_secret")
    async with loader:
        started = perf_counter()
        tasks = await asked(loader, ref, 50) + await asked(loader, ref, 50)
        assert our_tasks() == ["lorax resolve one"]
        await asyncio.sleep(0.02)  # a loop's clock may be a millisecond ahead
        source.answer.set()
        keys = await ends(tasks)
        assert source.counts.resolves == 1
        assert {key.location for key in keys} == {"memory:one"}
        assert len(keys) == 100
        seconds = loader.statistics().seconds["resolve"]
        assert 0.018 <= seconds <= perf_counter() - started


@pytest.mark.parametrize(
    "other",
    [
        AdapterRef("one", token="theirs"),
        AdapterRef("one", revision="main"),
        AdapterRef("one", source="s3"),
        AdapterRef(Path("one")),
    ],
    ids=["token", "revision", "source", "path"],
)
async def test_another_scope_asks_for_itself(tmp_path: Path, other: AdapterRef) -> None:
    """One caller's answer says nothing about what another may see."""
    source, loader = slow(tmp_path)
    async with loader:
        tasks = await asked(loader, ONE, 2) + await asked(loader, other, 2)
        source.answer.set()
        await ends(tasks)
        assert source.counts.resolves == 2


async def test_a_cancelled_caller_leaves_the_others_their_answer(tmp_path: Path) -> None:
    """The last one's end is the question's, and the next caller begins another one."""
    source, loader = slow(tmp_path)
    async with loader:
        tasks = await asked(loader, ONE, 3)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert (tasks[0].cancelled(), source.cancelled) == (True, 0)
        for task in tasks[1:]:
            assert source.cancelled == 0
            task.cancel()
            await asyncio.wait([task])
        await until(lambda: source.cancelled == 1)
        assert loader.whereabouts(ONE) is None
        await until(lambda: not our_tasks())
        tasks = await asked(loader, ONE, 3)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        source.answer.set()
        _, second, third = await ends(tasks)
        assert isinstance(second, AdapterKey)
        assert second == third
        assert (source.counts.resolves, source.cancelled) == (1, 1)


async def test_a_caller_does_not_join_a_question_that_ends(tmp_path: Path) -> None:
    source, loader = slow(tmp_path)
    async with loader:
        source.may_end.clear()
        (first,) = await asked(loader, ONE, 1)
        first.cancel()
        await ends([first])
        (second,) = await asked(loader, ONE, 1)
        source.answer.set()
        (key,) = await ends([second])
        source.may_end.set()
        await until(lambda: not our_tasks())
        assert loader.whereabouts(key) == loader.whereabouts(ONE) is not None


async def test_parts_of_a_merge_are_resolved_as_long_as_the_merge_is(tmp_path: Path) -> None:
    """Who asks for a part alone and leaves ends nothing; the merge's last caller ends both."""
    source, loader = slow(tmp_path)
    async with loader:
        merge = Merge("linear", [ONE, AdapterRef("two")], [1.0, 1.0])
        (merging,) = await asked(loader, merge, 1)
        (alone,) = await asked(loader, ONE, 1)
        alone.cancel()
        await ends([alone])
        assert source.cancelled == 0
        merging.cancel()
        await ends([merging])
        await until(lambda: source.cancelled == 2)
        await until(lambda: not our_tasks())


async def test_each_caller_has_an_error_of_its_own(tmp_path: Path) -> None:
    """With a stage if it names none; a foreign one is a fault of ours, and says which."""
    source, loader = slow(tmp_path)
    order = AccessDeniedError("not yours")
    order.__cause__ = cause = OSError("403")
    async with loader:
        source.fail("resolve", order)
        tasks = await asked(loader, ONE, 3)
        source.answer.set()
        errors = await ends(tasks)
        assert len(set(map(id, errors))) == 3
        for error in errors:
            assert isinstance(error, AccessDeniedError)
            assert (error.id, error.stage, error.retryable) == ("one", "resolve", False)
            assert (error.problem, error.__cause__) == ("not yours", cause)
        source.fail("resolve", LoraxError("something", stage="verify"))
        with pytest.raises(LoraxError, match="adapter 'one', stage verify: something"):
            await loader.load(ONE)
        source.fail("resolve", foreign := ZeroDivisionError("oops"))
        with pytest.raises(InternalError, match="ZeroDivisionError: oops") as caught:
            await loader.load(ONE)
        assert caught.value.__cause__ is foreign
        (await loader.load(ONE)).release()  # and the next question is a new one


async def test_the_last_answer_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To looks that ask nobody; a refusal takes it back, and the oldest is forgotten first."""
    source, loader = slow(tmp_path, answers=True)
    async with loader:
        await ends(await asked(loader, ONE, 1))
        assert state(loader, "one") == "resident"
        assert loader.whereabouts(AdapterRef("one", token="theirs")) is None
        assert source.counts.resolves == 1
        source.put("one", *tiny.files(tiny.write(tmp_path / "one", 7)))
        assert state(loader, "one") == "resident"
        async with await loader.load("one") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        source.remove("one")
        with pytest.raises(AdapterNotFoundError):
            await loader.load("one")
        assert state(loader, "one") == "nowhere"
        assert loader.try_acquire("one") is None
        monkeypatch.setattr("lorax_async.runtime.resolver.MAX_REMEMBERED", 3)
        for name in "abcad":
            source.put(name, *tiny.files(tmp_path / "two"))
            await loader.prefetch(name, tier="disk")
        assert [state(loader, name) for name in "abcd"] == ["present", "nowhere", *["present"] * 2]


@pytest.mark.parametrize("steps", range(8))
async def test_the_loader_closes_and_a_caller_is_cancelled(tmp_path: Path, steps: int) -> None:
    """Who was cancelled hears that; the others hear of the end, and nothing is left."""
    source, loader = slow(tmp_path)
    await loader.__aenter__()
    first, *others = await asked(loader, ONE, 3)
    closing = asyncio.create_task(loader.close())
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = first.cancel()
    end, *errors = await ends([first, *others])
    assert type(end) is (asyncio.CancelledError if cancelled else LoaderClosedError)
    for error in errors:
        assert isinstance(error, LoaderClosedError)
    await closing
    assert source.cancelled == 1
    assert our_tasks() == []
