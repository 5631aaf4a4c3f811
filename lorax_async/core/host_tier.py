"""Host memory below the device: whose file pages are held, and whose image is page-locked."""

from __future__ import annotations

from collections.abc import Mapping

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Arena
from lorax_async.core.commands import Populate
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import HostState, Life
from lorax_async.core.line import Line
from lorax_async.core.residency import reload_cost
from lorax_async.core.transitions import SlotState
from lorax_async.core.waiters import Tier, Urgency
from lorax_async.errors import CapacityError

_LAST: Urgency = (True, float("inf"))
"""What was demoted makes way for every wish."""


class HostQueue:
    """Adapters that want the host tier; rule 7. Only the head is served, and one at a time.

    `lives` are all adapters by key; `level` is what a level of priority is worth, in seconds.
    """

    def __init__(
        self, decisions: Decisions, lives: Mapping[AdapterKey, Life], *, level: float
    ) -> None:
        self._decisions = decisions
        self._budget = decisions.host
        self._lives = lives
        self._level = level
        self.line: Line[Urgency] = Line()

    def update(self, life: Life) -> None:
        """Let the queue see that `life` has changed."""
        waits = life.wants_host and not self._decisions.closing
        named = waits and life.waiters.has_tier(Tier.HOST)
        urgency = life.waiters.urgency(self._level) if named else _LAST
        self.line.update(life.key, urgency if waits else None)

    def settle_head(self) -> Life | None:
        """Populate, refuse or make room for the head; returns the adapter that changed, if any."""
        key = self.line.head
        if key is None or self._budget.populating is not None:
            return None
        head = self._lives[key]
        assert head.needs is not None
        nbytes = head.needs.held_nbytes
        if nbytes > self._budget.nbytes:
            return self._refuse(head, nbytes)
        if nbytes > self._budget.free:
            return self._make_room(nbytes)
        self._budget.claim(key, nbytes, reload_cost(head.needs))
        head.host = HostState.POPULATING
        self._budget.populating = key
        head.demoted = False
        self._decisions.command(Populate(key, head.attempt))
        return head

    def _refuse(self, head: Life, nbytes: int) -> Life:
        head.demoted = False
        waiting = [waiter.id for waiter in head.waiters.of_tiers({Tier.HOST})]
        problem = f"it needs {nbytes:,} bytes of a host tier of {self._budget.nbytes:,}"
        error = CapacityError(f"{problem}; raise host_bytes", retryable=False)
        self._decisions.fail(head, error, waiting)
        return head

    def _make_room(self, nbytes: int) -> Life | None:
        """Wait for what is being released, else let the next one go."""
        leaving = sum(self._budget.held[key] for key in self._budget.leaving)
        if self._budget.free + leaving >= nbytes:
            return None
        for key in self._budget.policy.ranked():
            life = self._lives[key]
            if life.host is HostState.HELD and self._budget.held[key]:
                self._decisions.release_host(life, evicted=True)
                return life
        return None


class Images:
    """Page-locked memory with adapters as they lie on the device, so that a reload reads no file.

    An image is given to whoever is given a slot, and stays when the slot goes.
    """

    def __init__(self, decisions: Decisions, lives: Mapping[AdapterKey, Life]) -> None:
        self._decisions = decisions
        self._budget = decisions.images
        self._lives = lives

    def claim(self, life: Life) -> None:
        """An image for `life`, if those that nothing is copied from or to can make room for it."""
        assert life.needs is not None
        if life.image is not None:
            self._budget.policy.use(life.key)
            return
        if not self._budget.arena.nbytes:
            return
        sizes = life.needs.group_nbytes
        staying = [other for other in self._holders() if not _is_idle(other)]
        taken = [extent for other in staying for extent in other.image or ()]
        arena = Arena(self._budget.arena.nbytes, self._budget.alignment)
        if not arena.reserve(taken).can_allocate(sizes):
            return
        while (extents := self._budget.arena.allocate(sizes)) is None:
            oldest = next(other for other in self._holders() if _is_idle(other))
            self._budget.drop(oldest, evicted=True)
            self._decisions.touched.append(oldest)
        self._budget.give(life, extents, reload_cost(life.needs))

    def _holders(self) -> list[Life]:
        return [self._lives[key] for key in self._budget.policy.ranked()]


def _is_idle(life: Life) -> bool:
    return life.slot is not SlotState.FILLING and not life.copying
