"""The last cold request, drawn or as a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from lorax_async.adapter import AdapterId, AdapterRef, Ref, as_ref
from lorax_async.errors import LoraxError
from lorax_async.ids.parsing import parsed
from lorax_async.server.cold_requests import ColdRequest, ColdRequests
from lorax_async.server.names import Names
from lorax_async.tracing.hiding import ANOTHER
from lorax_async.tracing.names import name_of
from lorax_async.tracing.picture import picture_of
from lorax_async.tracing.svg import as_svg

REST = 3
"""Times as long as the last picture took, nothing is drawn: answers are computed beside it."""

T = TypeVar("T")
Called = Mapping[str, str] | None
Named = Sequence[tuple[str, AdapterId]]


class Timeline:
    """Of the last cold request that a viewer may see; None where there is none.

    Who is not the operator sees the operator's names for adapters, and no others.
    """

    def __init__(self, cold: ColdRequests, names: Names) -> None:
        self._cold = cold
        self._names = names
        self._making = asyncio.Lock()
        self._made: dict[object, tuple[object, Any]] = {}
        self._rests_until = 0.0

    async def svg(self, *, operator: bool) -> str | None:
        """As a picture."""
        return await self._once(_draw, operator=operator)

    async def trace(self, *, operator: bool) -> bytes | None:
        """In Chrome's format."""
        return await self._once(_written, operator=operator)

    async def _once(self, make: Callable[[ColdRequest, Called], T], *, operator: bool) -> T | None:
        """In a thread, and kept: strangers may ask as often as they like."""
        async with self._making:
            of, made = self._made.get((make, operator), (None, None))
            if of != self._state(operator=operator):
                await asyncio.sleep(max(0.0, self._rests_until - monotonic()))
                of = _, names = self._state(operator=operator)  # which may be another one since
                last = self._cold.last(named=not operator)
                if last is None:
                    return None
                began = monotonic()
                made = await asyncio.to_thread(_made, make, last, names)
                self._rests_until = monotonic() + REST * (monotonic() - began)
                self._made[make, operator] = of, made
            found: T = made
            return found

    def _state(self, *, operator: bool) -> tuple[int, Named | None]:
        """What there is to be made, by its number, and with which names."""
        last = self._cold.last(named=not operator)
        names = None if operator else tuple(self._names.adapters.items())
        return last.number if last is not None else 0, names


def _made(make: Callable[[ColdRequest, Called], T], request: ColdRequest, names: Named | None) -> T:
    return make(request, None if names is None else _called(request, names))


def _called(request: ColdRequest, names: Named) -> Mapping[str, str]:
    """The operator's names, by those in the trace; who shares one there with others has none."""
    called: dict[str, str] = {}
    of: dict[str, Ref] = {}
    for name, adapter in names:
        ref = as_ref(adapter)
        for said in _said(ref):
            if of.setdefault(said, ref) == ref:
                called.setdefault(said, name)
            else:
                called[said] = ANOTHER
    own = next(name for name, adapter in names if adapter == request.adapter)
    return called | dict.fromkeys(request.names, own)


def _said(ref: Ref) -> Iterator[str]:
    """What a trace may call it: as it was named, or without its revision."""
    yield name_of(ref)
    if isinstance(ref, AdapterRef):
        with suppress(LoraxError):
            yield name_of(parsed(ref))


def _draw(request: ColdRequest, called: Called) -> str:
    found: Any = request.trace.as_json(called=called)
    dropped = found["otherData"]["dropped"]
    return as_svg(picture_of(found["traceEvents"], 0.0, request.seconds * 1e3, dropped=dropped))


def _written(request: ColdRequest, called: Called) -> bytes:
    return request.trace.encoded(called)
