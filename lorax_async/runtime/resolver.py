"""Resolve refs to adapter keys: one resolve at a time per ref, and the last answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.errors import AdapterTimeoutError, InternalError, LoraxError, exhausted
from lorax_async.sources.base import Source
from lorax_async.sources.local import is_unchanged
from lorax_async.telemetry import Telemetry
from lorax_async.types import AdapterKey, AdapterRef, Ref, RemoteKey, TensorsKey, is_stale, text_of


class AssignedIds:
    """Ids assigned to keys by `load_tensors` and `replace`. They hide the sources' ids.

    An id assigned without a token holds for every token; with a token, for that token only. The
    digest and `allow_stale` of a ref are ignored.
    """

    def __init__(self) -> None:
        self._keys: dict[AdapterRef, AdapterKey] = {}
        self._uses: Counter[AdapterKey] = Counter()

    def get(self, ref: object) -> AdapterKey | None:
        """Return the assigned key, or None; always None unless `ref` is an `AdapterRef`."""
        entry = self._entry(ref) if self._keys else None
        return None if entry is None else self._keys[entry]

    def assign(self, ref: AdapterRef, key: AdapterKey) -> None:
        """Let `ref` mean `key`."""
        ref = ref.name
        self._remove(ref)
        self._keys[ref] = key
        self._uses[key] += 1

    def unassign(self, ref: object, key: AdapterKey) -> None:
        """Remove the assignment of `ref` to `key`; if `ref` is the key, all assignments to it."""
        entry = self._entry(ref)
        if entry is not None and self._keys[entry] == key:
            self._remove(entry)
        elif ref == key:
            for name in [name for name, assigned in self._keys.items() if assigned == key]:
                self._remove(name)

    def ids(self) -> Iterator[tuple[str, AdapterKey]]:
        """Yield the text of each id, and its key."""
        return ((ref.text, key) for ref, key in self._keys.items())

    def has_id(self, key: AdapterKey) -> bool:
        """Return whether an id is assigned to the key."""
        return key in self._uses

    def covers(self, ref: AdapterRef, other: object) -> bool:
        """Return whether an assignment to `ref` holds for `other` too."""
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

    def _remove(self, ref: AdapterRef) -> None:
        key = self._keys.pop(ref, None)
        if key is not None:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]


MAX_REMEMBERED = 65_536
"""Answers kept for `known`; the oldest is dropped first."""


class _Answer(NamedTuple):
    """What a ref means: `key`, at the time `since`.

    `began` is when the look or the question for it began. `for_stale` is whether the caller that
    asked takes a stale version too.
    """

    key: AdapterKey
    since: float
    began: float
    for_stale: bool


@dataclass(eq=False)
class Resolver:
    """Lets equal refs share one running resolve, and remembers the last answer for each.

    A resolve is cancelled when its last waiting caller leaves. Assigned ids, `names`, hide the
    source's. A remote source's answer, which may be of a moving revision or a revoked permission,
    counts for `revalidate` seconds, a look at local files for `revalidate_files` seconds.
    `check_open` raises once the store or loader is closing.
    """

    source: Source
    telemetry: Telemetry
    check_open: Callable[[], None]
    revalidate: float
    revalidate_files: float

    def __post_init__(self) -> None:
        self.names = AssignedIds()
        self._running = SharedTasks(self._run, lambda ref: f"lorax resolve {ref.text}")
        # Not by `lru.remember`: an OrderedDict hashes the ref again with each look of a hit.
        self._answers: dict[AdapterRef, _Answer] = {}

    async def resolve(self, ref: Ref) -> AdapterKey:
        """Resolve `ref` by the source, or join the running resolve of an equal ref.

        Raise what the source raises, a copy per caller. Cancelling one caller does not affect the
        others. A key is returned as it is.
        """
        if isinstance(ref, AdapterKey):
            return ref
        began = monotonic()
        while (key := self.names.get(ref)) is None:
            with self._running.join(ref) as task:
                answer = await self._answer(ref, task, began)
            if not self.is_outdated(ref, answer.key):
                return answer.key
        return key

    async def resolve_within(self, ref: Ref, seconds: float) -> AdapterKey:
        """Resolve `ref`. Raise `AdapterTimeoutError` after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await self.resolve(ref)
        except TimeoutError:
            problem = f"it was not resolved within {seconds:g} s"
            raise AdapterTimeoutError(problem, id=text_of(ref), stage="resolve") from None

    async def _answer(self, ref: AdapterRef, task: asyncio.Task[_Answer], began: float) -> _Answer:
        """Return the task's answer, or a later one if it does not count for a call of `began`.

        A slow source may have chosen the task's answer long before the call joined it.
        """
        answer = await self._result(ref, task)
        while began > answer.began and began - answer.since >= self._seconds(answer.key):
            await asyncio.sleep(0)  # let the ended task leave the shared ones
            with self._running.join(ref) as again:
                answer = await self._result(ref, again)
        return answer

    async def _result(self, ref: AdapterRef, task: asyncio.Task[_Answer]) -> _Answer:
        try:
            return await result_of(task, "resolve", self.check_open)
        except LoraxError as error:
            raise error.located(id=ref.text, stage="resolve") from error.__cause__

    def known(self, ref: Ref) -> AdapterKey | None:
        """Return the key assigned to `ref`, or else the last answer, or None. No I/O."""
        if isinstance(ref, AdapterKey):
            return ref
        remembered = self._answers.get(ref.name)
        answer = self.names.get(ref) or (remembered and remembered.key)
        return None if answer is None or self.is_outdated(ref, answer) else answer

    def ids(self) -> Iterator[tuple[str, AdapterKey]]:
        """Yield ids as callers name them, with keys that they mean; the newest come last."""
        for ref, answer in self._answers.items():
            if not self.is_outdated(ref, answer.key):
                yield ref.text, answer.key
        yield from self.names.ids()

    def recent(self, ref: Ref, *, look: bool = False) -> AdapterKey | None:
        """Return the key of `ref`, or None if its source or its files have to be looked at again.

        With `look`, stat a path's files on the loop, soon after a thread has looked at them.
        """
        key = self.known(ref)
        if key is None or isinstance(ref, AdapterKey):
            return key
        name = ref.name
        remembered = self._answers.get(name)
        if remembered is None or remembered.key is not key:  # it was assigned
            return key
        if is_stale(key) and remembered.for_stale and not ref.allow_stale:
            return None  # its source may answer this caller, or be down for it
        now = monotonic()
        if now - remembered.since >= self._seconds(key):
            return None
        if look and key.files:
            if not (isinstance(ref.id, Path) and is_unchanged(str(ref.id), key)):
                return None
            self._answers[name] = remembered._replace(since=now)
        return key

    def _seconds(self, key: AdapterKey) -> float:
        """Return how long the answer that an id means `key` counts."""
        remote = self.revalidate if isinstance(key, RemoteKey) else inf
        return min(remote, self.revalidate_files) if key.files else remote

    def is_outdated(self, ref: Ref, answer: AdapterKey) -> bool:
        """Return whether an id was assigned, or unassigned, since this answer."""
        if not isinstance(ref, AdapterRef):
            return False
        key = self.names.get(ref)
        # An id that was unassigned means its source's adapter again.
        return isinstance(answer, TensorsKey) if key is None else key != answer

    async def stop(self) -> None:
        """Cancel running resolves; waiting callers get `LoaderClosedError`."""
        await self._running.stop()

    async def _run(self, ref: AdapterRef) -> _Answer:
        try:
            answer = await self._find(ref)
        except Exception:
            self._answers.pop(ref.name, None)
            raise
        return self._remember(ref, answer)

    async def _find(self, ref: AdapterRef) -> _Answer:
        began = monotonic()  # the source may answer at any time from now on
        key = await self._ask(ref)
        answered_at = key.answered_at if isinstance(key, RemoteKey) else None
        return _Answer(key, began if answered_at is None else answered_at, began, ref.allow_stale)

    async def _ask(self, ref: AdapterRef) -> AdapterKey:
        try:
            with self.telemetry.timed("resolve", ref, "resolve"):
                return await self.source.resolve(ref)
        except LoraxError:
            raise
        except Exception as error:
            name = type(error).__name__
            raise exhausted(error, "its version was not found out") or InternalError(
                f"{name}: {error}"
            ) from error

    def _remember(self, ref: AdapterRef, answer: _Answer) -> _Answer:
        name, key = ref.name, answer.key
        before = self._answers.pop(name, None)
        if before is not None and before.key == key and is_stale(before.key) == is_stale(key):
            answer = answer._replace(key=before.key)  # share one object
        self._answers[name] = answer
        if len(self._answers) > MAX_REMEMBERED:
            del self._answers[next(iter(self._answers))]
        return answer
