"""The last cold request, drawn or as a trace."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from lorax_async.adapter import as_ref
from lorax_async.server.calls.names import Names
from lorax_async.server.cold_requests import ColdRequest, ColdRequests
from lorax_async.tracing.names import name_of
from lorax_async.tracing.picture import picture_of
from lorax_async.tracing.svg import as_svg


class Timeline:
    """Of the last cold request that a viewer may see; None where there is none.

    Who is not the operator sees no name of an adapter that has none of the operator's.
    """

    def __init__(self, cold: ColdRequests, names: Names) -> None:
        self._cold = cold
        self._names = names
        self._drawing = asyncio.Lock()
        self._drawn: dict[bool, tuple[int, str]] = {}

    async def svg(self, *, operator: bool) -> str | None:
        """As a picture, which is drawn once."""
        async with self._drawing:
            last = self._cold.last(named=not operator)
            if last is None:
                return None
            number, svg = self._drawn.get(operator, (0, ""))
            if number != last.number:
                svg = await asyncio.to_thread(_draw, last, self._shown(operator=operator))
                self._drawn[operator] = last.number, svg
            return svg

    async def trace(self, *, operator: bool) -> bytes | None:
        """In Chrome's format."""
        async with self._drawing:
            last = self._cold.last(named=not operator)
            if last is None:
                return None
            return await asyncio.to_thread(_written, last, self._shown(operator=operator))

    def _shown(self, *, operator: bool) -> frozenset[str] | None:
        if operator:
            return None
        return frozenset(name_of(as_ref(each)) for each in self._names.adapters.values())


def _draw(request: ColdRequest, shown: frozenset[str] | None) -> str:
    found: Any = request.trace.as_json(shown=shown)
    dropped = found["otherData"]["dropped"]
    return as_svg(picture_of(found["traceEvents"], 0.0, request.seconds * 1e3, dropped=dropped))


def _written(request: ColdRequest, shown: frozenset[str] | None) -> bytes:
    return json.dumps(request.trace.as_json(shown=shown), separators=(",", ":")).encode()
