"""From what a caller asks for to which bytes that is: one question at a time per request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from typing import NamedTuple

from lorax_async.errors import InternalError, LoaderClosedError, LoraxError
from lorax_async.runtime.telemetry import Telemetry
from lorax_async.sources.base import Source
from lorax_async.types import (
    AdapterKey,
    AdapterRef,
    Merge,
    MergedKey,
    Ref,
    RemoteKey,
    TensorsKey,
    is_stale,
)


class AssignedIds:
    """Which key such an id means. They come before every source.

    A name that was given without a token is the same for every token; with one, for that one only.
    What a caller knows of the bytes, and whether old ones will do, makes no other name.
    """

    def __init__(self) -> None:
        self._keys: dict[AdapterRef, AdapterKey] = {}
        self._uses: Counter[AdapterKey] = Counter()

    def get(self, ref: object) -> AdapterKey | None:
        """None for what has no name here, as everything but an `AdapterRef`."""
        entry = self._entry(ref) if self._keys else None
        return None if entry is None else self._keys[entry]

    def give(self, ref: AdapterRef, key: AdapterKey) -> None:
        """From here on `ref` means `key`."""
        ref = ref.name
        self._end(ref)
        self._keys[ref] = key
        self._uses[key] += 1

    def take_back(self, ref: object, key: AdapterKey) -> None:
        """Let `ref` mean `key` no longer, if it does; for the key itself, let no name mean it."""
        entry = self._entry(ref)
        if entry is not None and self._keys[entry] == key:
            self._end(entry)
        elif ref == key:
            for name in [name for name, meant in self._keys.items() if meant == key]:
                self._end(name)

    def mean(self, key: AdapterKey) -> bool:
        """Whether some name means it."""
        return key in self._uses

    def covers(self, ref: AdapterRef, other: object) -> bool:
        """Whether `other` means, or would mean, what is given to `ref`."""
        if not isinstance(other, AdapterRef):
            return False
        ref, other = ref.name, other.name
        return other == ref or (other not in self._keys and replace(other, token=None) == ref)

    def _entry(self, ref: object) -> AdapterRef | None:
        if not isinstance(ref, AdapterRef):
            return None
        ref = ref.name
        if ref in self._keys or ref.token is None:
            return ref if ref in self._keys else None
        bare = replace(ref, token=None)
        return bare if bare in self._keys else None

    def _end(self, ref: AdapterRef) -> None:
        key = self._keys.pop(ref, None)
        if key is not None:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]


MAX_REMEMBERED = 65_536
"""Answers kept for `known`; the one that was asked for longest ago goes first."""


Question = AdapterRef | Merge


class _RememberedKey(NamedTuple):
    key: AdapterKey
    since: float


@dataclass(slots=True, eq=False)
class _Resolution:
    """A resolve in flight, and how many callers wait for it."""

    task: asyncio.Task[AdapterKey]
    waiters: int = 0


class Resolver:
    """Joins equal requests that are under way, and remembers the last answer to each.

    A resolve is cancelled when the last caller that waits for it leaves.

    Its `names` come before the source. For `fresh` seconds it counts what one said that lies
    elsewhere: of a moving revision, and of who may have it.
    """

    def __init__(self, source: Source, telemetry: Telemetry, fresh: float) -> None:
        self._source = source
        self._telemetry = telemetry
        self._fresh = fresh
        self.names = AssignedIds()
        self._asking: dict[Question, _Resolution] = {}
        self._tasks: set[asyncio.Task[AdapterKey]] = set()
        self._answers: dict[Question, _RememberedKey] = {}

    async def resolve(self, ref: Question) -> AdapterKey:
        """Ask the source, or join whoever asks already. Cancelling leaves the others their answer.

        Raises what the source raises, each caller a copy of its own.
        """
        while (key := self.names.get(ref)) is None:
            with self._joined(ref) as task:
                answer = await self._answer(ref, task)
            if not self.outdated(ref, answer):
                return answer
        return key

    @contextmanager
    def _joined(self, ref: Question) -> Iterator[asyncio.Task[AdapterKey]]:
        """Start the resolve of `ref` or join it; cancel it when the last caller leaves early."""
        resolution = self._asking.get(ref)
        if resolution is None:
            resolution = self._asking[ref] = _Resolution(self._start(ref))
            resolution.task.add_done_callback(lambda _: self._answered(ref, resolution))
        resolution.waiters += 1
        try:
            yield resolution.task
        finally:
            resolution.waiters -= 1
            if not resolution.waiters and not resolution.task.done():
                # The next caller starts another one: this one may take a moment to end.
                del self._asking[ref]
                resolution.task.cancel()

    def _start(self, ref: Question) -> asyncio.Task[AdapterKey]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._ask(ref), name=f"lorax resolve {ref.text}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, ref: Question, task: asyncio.Task[AdapterKey]) -> AdapterKey:
        try:
            return await asyncio.shield(task)
        except LoraxError as error:
            raise error.located(id=ref.text, stage="resolve") from error.__cause__
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if task.cancelled() and waiter is not None and not waiter.cancelling():
                raise LoaderClosedError("the loader was closed", stage="resolve") from None
            raise

    def known(self, ref: Question) -> AdapterKey | None:
        """What `ref` means by name, else the last answer; touches no file."""
        named = self.names.get(ref)
        told = self._answers.get(_name(ref))
        answer = named or (None if told is None else told.key)
        return None if answer is None or self.outdated(ref, answer) else answer

    def recent(self, ref: Question) -> AdapterKey | None:
        """`known`, unless a source that is elsewhere has to be asked again."""
        key, told = self.known(ref), self._answers.get(_name(ref))
        if key is None or told is None or told.key != key or not _is_elsewhere(key):
            return key
        return key if self._is_fresh(told) else None

    def outdated(self, ref: Ref, answer: AdapterKey) -> bool:
        """Whether an id in `ref` was given another meaning since this was the answer."""
        if isinstance(ref, Merge) and isinstance(answer, MergedKey):
            pairs = zip(ref.parts, answer.merge.parts, strict=True)
            return any(
                isinstance(key, AdapterKey) and self._is_old(part, key) for part, key in pairs
            )
        return self._is_old(ref, answer)

    def _is_old(self, ref: Ref, answer: AdapterKey) -> bool:
        if not isinstance(ref, AdapterRef):
            return False
        key = self.names.get(ref)
        # An id whose name was taken back means what its source says.
        return isinstance(answer, TensorsKey) if key is None else key != answer

    def _is_fresh(self, answer: _RememberedKey) -> bool:
        return monotonic() - answer.since < self._fresh

    async def stop(self) -> None:
        """Cancel what is asked; whoever waits gets `LoaderClosedError`."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, ref: Question) -> AdapterKey:
        if isinstance(ref, Merge):
            return MergedKey.of(ref, await self._ask_parts(ref))
        started = perf_counter()
        try:
            return await self._source.resolve(ref)
        except LoraxError:
            raise
        except Exception as error:
            raise InternalError(f"{type(error).__name__}: {error}") from error
        finally:
            self._telemetry.spent("resolve", perf_counter() - started)
            self._telemetry.took(ref, "resolve", started)

    async def _ask_parts(self, merge: Merge) -> list[AdapterKey]:
        """Side by side, and each is a question that others may join."""
        with ExitStack() as joined:
            asked = [
                part
                if isinstance(part, AdapterKey)
                else self.names.get(part) or (part, joined.enter_context(self._joined(part)))
                for part in merge.parts
            ]
            keys: list[AdapterKey] = []
            for number, part in enumerate(asked, 1):
                if isinstance(part, AdapterKey):
                    keys.append(part)
                    continue
                try:
                    keys.append(await self._answer(*part))
                except LoraxError as error:
                    words = f"part {number} ({part[0].text!r}): "
                    raise error.prefixed(words) from error.__cause__
            return keys

    def _answered(self, ref: Question, resolution: _Resolution) -> None:
        task = resolution.task
        failed = task.cancelled() or task.exception() is not None
        if self._asking.get(ref) is not resolution:
            return  # its callers left: it says nothing of what the source has now
        del self._asking[ref]
        name = _name(ref)
        before = self._answers.pop(name, None)
        if failed:
            return
        key = task.result()
        same = before is not None and before.key == key and is_stale(before.key) == is_stale(key)
        # Of equal keys the first is kept, which others keep too; and the time, for the source may
        # have been spared the question.
        if before is not None and same:
            self._answers[name] = before if self._is_fresh(before) else _now(before.key)
        else:
            self._answers[name] = _now(key)
        if len(self._answers) > MAX_REMEMBERED:
            del self._answers[next(iter(self._answers))]


def _now(key: AdapterKey) -> _RememberedKey:
    return _RememberedKey(key, monotonic())


def _is_elsewhere(key: AdapterKey) -> bool:
    if isinstance(key, MergedKey):
        return any(isinstance(part, RemoteKey) for part in key.merge.parts)
    return isinstance(key, RemoteKey)


def _name(ref: Question) -> Question:
    return ref.name if isinstance(ref, AdapterRef) else ref
