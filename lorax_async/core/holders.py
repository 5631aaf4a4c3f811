"""Who holds a slot, and what stands in the way of taking it: kept, for thousands may hold one."""

from __future__ import annotations

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Life
from lorax_async.core.transitions import SlotState


class Holders:
    """As they were when they were last noted.

    Attributes
    ----------
    pinned
        Whoever asks for room must fit beside them.
    going
        Told to leave, unloaded, or DRAINING.
    spare
        Could be told to leave, and would be gone at once.
    """

    def __init__(self) -> None:
        self.pinned: dict[AdapterKey, Life] = {}
        self.going: dict[AdapterKey, Life] = {}
        self.spare: dict[AdapterKey, Life] = {}
        self._seen: dict[AdapterKey, tuple[SlotState, bool, bool, bool]] = {}

    def note(self, life: Life) -> bool:
        """Look at `life` again; whether anything changed that matters to who waits for a slot."""
        if life.grant is None:
            changed = self._seen.pop(life.key, None) is not None
            for kept in (self.pinned, self.going, self.spare):
                kept.pop(life.key, None)
            return changed
        now = (life.slot, life.departing, life.pins > 0, life.leases > 0)
        if self._seen.get(life.key) == now:
            return False
        self._seen[life.key] = now
        _keep(self.pinned, life, wanted=life.pins > 0)
        _keep(self.going, life, wanted=is_going(life))
        _keep(self.spare, life, wanted=may_go(life) and not life.leases)
        return True


def is_going(life: Life) -> bool:
    return life.departing or life.slot is SlotState.DRAINING


def may_go(life: Life) -> bool:
    return life.slot is SlotState.RESIDENT and not (life.departing or life.pins)


def _keep(kept: dict[AdapterKey, Life], life: Life, *, wanted: bool) -> None:
    if wanted:
        kept[life.key] = life
    else:
        kept.pop(life.key, None)
