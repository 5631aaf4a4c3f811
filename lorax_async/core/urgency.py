"""Who of those that wait comes first, and how near its adapter is brought meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


def urgency(since: float, priority: int, deadline: float, level: float) -> float:
    """The less, the sooner: a moment, in seconds, that does not change while one waits.

    It is when the request came. A level of priority counts as `level` seconds of waiting, and so
    does a deadline (a moment, too) that is less than these away, by what is missing. Whoever comes
    later by more than the levels between two is behind the other, so that nobody waits for ever.
    """
    return min(since, deadline - level) - priority * level


class Reach(Enum):
    """How near an adapter is brought while its requests wait."""

    LOAD = "load"
    """Waited for in the foreground."""
    DEVICE = "device"
    """Hinted: onto the device, if there is room."""
    HOST = "host"
    """Hinted: into host memory."""


@dataclass(frozen=True, slots=True)
class LookAhead:
    """How far down the queue of adapters one looks.

    `loads` are waited for at a time; `slots` are on the device, these among them; `hints` more are
    brought into host memory.
    """

    loads: int
    slots: int
    hints: int

    def reaches(self, held: int) -> list[Reach]:
        """Of the first adapters of the queue, in order, while `held` others are on the device."""
        spare = max(0, self.slots - held - self.loads)
        return [
            *[Reach.LOAD] * self.loads,
            *[Reach.DEVICE] * spare,
            *[Reach.HOST] * self.hints,
        ]
