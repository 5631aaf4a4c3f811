"""What callers met, counted, and which errors they may see where the source does what it does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from lorax_async import (
    AdapterTimeoutError,
    Event,
    EvictedError,
    Failed,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    LoraxError,
    SlotId,
)
from lorax_async.adapter import AdapterKey
from soak.library import Stored


class SoakError(AssertionError):
    """Something was not as it must be: what, and the story of the adapter."""

    def __init__(self, problem: str, story: Sequence[object] = ()) -> None:
        super().__init__("\n  ".join([problem, *map(str, story)]))


@dataclass
class Tally:
    """What came of it, in numbers that take no more room the longer it lasts."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    """Bytes, each second."""

    def failed(self, error: LoraxError) -> None:
        self.errors[f"{type(error).__name__} ({error.stage})"] += 1

    def peak(self, what: str, value: int) -> None:
        self.peaks[what] = max(self.peaks[what], value)

    def lines(self) -> list[str]:
        step = -(-len(self.rss) // 8) or 1
        grown = [max(self.rss[at : at + step]) for at in range(0, len(self.rss), step)]
        return [
            f"outcomes: {_told(self.outcomes)}",
            f"errors: {_told(self.errors)}",
            f"at most: {_told(self.peaks)}",
            f"RSS, in eighths of the time: {[round(value / 1e6) for value in grown]} MB",
        ]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) or "none"


EVERYWHERE = {"queue", "resolve", "fetch", "verify", "stage", "copy", "ready"}
ALLOWED: dict[type[LoraxError], set[str]] = {
    FetchError: {"resolve", "fetch"},
    FetchTimeoutError: {"resolve", "fetch"},
    EvictedError: {"fetch"},
    IntegrityError: {"resolve", "fetch"},
    AdapterTimeoutError: EVERYWHERE,
}
"""By stage. All of them may pass, and say so."""


@dataclass
class Judge:
    """Hears what the loader tells, and what callers met."""

    broken: dict[tuple[AdapterKey, SlotId], type[LoraxError]] = field(default_factory=dict)
    """Stays in a slot that ended with an error, and of which kind."""
    doubted: set[Stored] = field(default_factory=set)
    """Adapters about which the loader said that their bytes are not what they should be."""

    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def heard(self, event: Event) -> None:
        if isinstance(event, Failed) and event.slot is not None:
            self.broken[event.key, event.slot] = type(event.error)
            self._news.set()
            self._news = asyncio.Event()

    async def verdict(
        self, key: AdapterKey, slot: SlotId, seconds: float
    ) -> type[LoraxError] | None:
        """What that stay ended with, or will soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (key, slot) not in self.broken:
                    await self._news.wait()
        return self.broken.get((key, slot))

    def require_allowed(self, stored: Stored, error: BaseException | None) -> None:
        """Raises `SoakError` for what must not come to a caller."""
        if not isinstance(error, LoraxError):
            raise SoakError(f"{stored.name}: {error!r}") from error
        stages = ALLOWED.get(type(error), set())
        if error.stage not in stages or not error.retryable or error.id is None:
            told = f"{type(error).__name__}, retryable {error.retryable}: {error}"
            raise SoakError(told, error.story) from error
        if "status 503" in error.problem and error.retry_after is None:
            raise SoakError(f"it does not say when to come back: {error}", error.story)
        if isinstance(error, EvictedError) and _evictions(error) < 2:
            raise SoakError(f"it could have been fetched again: {error}", error.story)
        if isinstance(error, IntegrityError):
            self.doubted.add(stored)

    def require_reasons(self, damaged: dict[str, list[str]]) -> None:
        """Nobody is doubted whose bytes and ETags were always right."""
        guilty = {name for names in damaged.values() for name in names}
        innocent = sorted(stored.name for stored in self.doubted if stored.name not in guilty)
        if innocent:
            raise SoakError(f"they were sent right, and refused all the same: {innocent}")


def _evictions(error: LoraxError) -> int:
    """How often the file went before it was read, as far as the story, which is cut, goes back."""
    failed = [event.error for event in error.story if isinstance(event, Failed)]
    return sum(isinstance(each, EvictedError) for each in failed)
