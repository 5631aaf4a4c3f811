"""A source whose groups come when a virtual clock says so, or fail, or never come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from contention.adapters import IDS, Made, made
from lorax_async import FetchError
from lorax_async.adapter import AdapterKey
from lorax_async.io.ports import Demand
from lorax_async.testing import FakeSource, Version
from scheduling.clock import VirtualClock

TOLD = "the link was told to fail"


@dataclass(frozen=True, slots=True)
class Conduct:
    """How an adapter's bytes come: the first group after `delay`, the others every `interval`.

    From group `at` on they come no more ("stalls"), or their coming fails.
    """

    delay: float
    interval: float
    fate: Literal["comes", "stalls", "fails"] = "comes"
    at: int = 0


class TimedSource(FakeSource):
    """The adapters of the contention tests, each with its conduct."""

    def __init__(self, clock: VirtualClock, conducts: Mapping[str, Conduct]) -> None:
        super().__init__(holdable=True)
        self.versions: dict[AdapterKey, Made] = {}
        self._clock = clock
        self._conducts = conducts
        self._begun: dict[str, float] = {}
        for id in IDS:
            files = made(id, 0)
            self.versions[self.put(id, files.config, files.content)] = files

    async def _group(self, version: Version, group: int, demand: Demand) -> None:
        conduct = self._conducts[version.id]
        if group == 0:
            self._begun[version.id] = self._clock.time()
        due = self._begun[version.id] + conduct.delay + group * conduct.interval
        if conduct.fate != "comes" and group >= conduct.at:
            if conduct.fate == "fails":
                raise FetchError(TOLD)
            due = inf
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if not came.done() and (demand.ended or self._clock.time() >= due):
                came.set_result(None)

        alarm = None if due == inf else self._clock.call_at(due, look)
        with demand.watched(look):
            try:
                await came
            finally:
                if alarm is not None:
                    alarm.cancel()
        if demand.ended:
            raise FetchError("nobody waits for the adapter any more")
