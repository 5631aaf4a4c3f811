"""The lifecycle explored exhaustively in small worlds, and broken on purpose to see it noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.lifecycle_explorer import explore
from core.lifecycle_world import Setting, Violation
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import Fetch, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import Residency
from lorax_async.core.transitions import (
    FILE_MOVES,
    SLOT_MOVES,
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.core.waiters import Tier
from lorax_async.errors import InvalidTransitionError

DEVICE = (Tier.DEVICE, True)
STREAM = (Tier.STREAM, True)
PREFETCH = (Tier.DEVICE, False)
HOST = (Tier.HOST, True)
DISK = (Tier.DISK, True)
UNEVEN = ((64, 64), (64,))

SETTINGS = {
    "little is remembered": Setting((DEVICE,), sizes=UNEVEN, streaming=False, max_idle=0),
    "populated and forgotten": Setting((HOST, DISK), sizes=((64,), (64,)), max_idle=0),
    "one copy at a time": Setting((DEVICE,), sizes=UNEVEN, copies=1, streaming=False),
    "two slots, bytes for one": Setting((DEVICE,), sizes=UNEVEN, slots=2, streaming=False),
    "host and disk tiers": Setting((HOST, DISK, DEVICE), sizes=((64, 64),), kernels=False),
    "lookups and ageing": Setting(
        (DEVICE,), sizes=UNEVEN, streaming=False, lookups=True, ageing=True, leases=2
    ),
    "too large": Setting((DEVICE, HOST), sizes=UNEVEN, device_bytes=64, streaming=False),
    "prefetch beside foreground": Setting(
        (DEVICE, PREFETCH), sizes=((64,), (64,)), kernels=False, closing=False
    ),
    "two adapters, streaming leases": Setting((STREAM,), sizes=UNEVEN),
    "two adapters, one slot": Setting((DEVICE,), sizes=UNEVEN),
    "whole and streaming wishes": Setting(
        (DEVICE, STREAM), sizes=UNEVEN, streaming=False, kernels=False, closing=False
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_reachable_state_is_sound(name: str) -> None:
    assert explore(SETTINGS[name], limit=60_000) > 50


@pytest.mark.soak
@pytest.mark.parametrize(
    "setting",
    [
        Setting((DEVICE, STREAM), sizes=UNEVEN),
        Setting((DEVICE, PREFETCH), sizes=UNEVEN),
        Setting((DEVICE,), sizes=((64,), (64,), (64,)), streaming=False, ageing=True),
    ],
    ids=["streaming and whole", "prefetch", "three adapters"],
)
def test_larger_worlds_are_sound_too(setting: Setting) -> None:
    assert explore(setting, limit=5_000_000) > 1000


def _never(*_: object) -> bool:
    return False


def _unsettled_withdraw(self: Lifecycle, key: object, waiter: int) -> list[object]:
    self.lives[key].waiters.remove(waiter)  # type: ignore[index]
    return []


def _without(*counters: str) -> Callable[[Decisions, Life], bool]:
    """Rule 4 for slots, blind to some of what must be over first."""
    original = Decisions._slot_quiesced

    def blind(self: Decisions, life: Life) -> bool:
        kept = {name: getattr(life, name) for name in counters}
        for name in counters:
            setattr(life, name, 0)
        try:
            return original(self, life)
        finally:
            for name, value in kept.items():
                setattr(life, name, value)

    return blind


def _file_gone_under_fetch(self: Decisions, life: Life) -> bool:
    if life.file is not FileState.ENDING:
        return False
    life.file = FileState.ABSENT
    life.fetched.clear()
    return True


def _early(self: Decisions, life: Life, tier: Tier) -> bool:
    return life.slot in (SlotState.FILLING, SlotState.RESIDENT) and not self.closing


def _blind_to_leaving(self: Decisions, life: Life, tier: Tier) -> bool:
    if life.slot is SlotState.RESIDENT:
        return not self.closing
    return tier is Tier.STREAM and life.slot is SlotState.FILLING


def _served_after_close(self: Lifecycle, error: object) -> list[object]:
    return []


def _evicts_the_leased(self: Decisions, life: Life) -> bool:
    if life.slot is not SlotState.RESIDENT or not life.leaving:
        return False
    life.slot = SlotState.DRAINING
    life.leases = 0
    return True


def _column_not_cleared(self: Decisions, life: Life) -> bool:
    ready = life.slot is SlotState.DRAINING and not (life.copying or life.uses or life.leases)
    if not ready or life.grant is None:
        return False
    life.slot = SlotState.NONE
    self.residency.release(life.key, life.grant)
    life.grant = None
    life.submitted.clear()
    life.done.clear()
    life.watermark, life.leaving = 0, False
    return True


def _keeps_waiters(self: Decisions, life: Life, error: object, waiters: object = None) -> None:
    return


def _copies_unread(self: CopyQueue) -> None:
    residency = self._decisions.residency
    for life in list(self._queue.values()):
        life.fetched.update(range(life.groups))
    _submit(self)
    assert residency.copies_free >= 0


def _forgets_the_place(self: Lifecycle, life: Life) -> None:
    life.copying -= 1


def _prefetch_is_foreground(self: Life) -> bool:
    ready = self.needs is not None and self.file in (FileState.FETCHING, FileState.PRESENT)
    return ready and any(w.tier >= Tier.STREAM for w in self.waiters)


def _fetch_twice(self: Decisions, life: Life) -> bool:
    if not life.waiters or life.file not in (FileState.ABSENT, FileState.ENDING):
        return False
    life.file = FileState.FETCHING
    life.attempt += 1
    life.fetch_running = True
    self.command(Fetch(life.key, life.attempt))
    return True


def _waits_for_nobody(self: SlotQueue, head: Life, sizes: tuple[int, ...]) -> None:
    return None


_submit = CopyQueue.submit

MUTANTS: dict[str, tuple[type, str, object]] = {
    "slot freed under a copy": (Decisions, "_slot_quiesced", _without("copying")),
    "slot freed under a lease": (Decisions, "_slot_quiesced", _without("leases")),
    "slot freed under a kernel": (Decisions, "_slot_quiesced", _without("uses")),
    "column not cleared": (Decisions, "_slot_quiesced", _column_not_cleared),
    "slot never freed": (Decisions, "_slot_quiesced", _never),
    "file gone while it is fetched": (Decisions, "file_quiesced", _file_gone_under_fetch),
    "file never ends": (Decisions, "file_quiesced", _never),
    "served before the last byte": (Decisions, "reached", _early),
    "leased while leaving": (Decisions, "reached", _blind_to_leaving),
    "nobody is served": (Decisions, "_serve", _never),
    "the leased are evicted": (Decisions, "_evicted", _evicts_the_leased),
    "nobody is evicted": (Decisions, "_evicted", _never),
    "no room is made": (SlotQueue, "_make_room", _waits_for_nobody),
    "failed fetches fail nobody": (Decisions, "fail", _keeps_waiters),
    "copies of bytes not here": (CopyQueue, "submit", _copies_unread),
    "a copy's place is not given back": (Lifecycle, "_count_copy", _forgets_the_place),
    "a prefetch takes a slot early": (Life, "wants_slot", property(_prefetch_is_foreground)),
    "fetched while ending": (Decisions, "_fetch", _fetch_twice),
    "fetched never": (Decisions, "_fetch", _never),
    "close fails nobody": (Lifecycle, "close", _served_after_close),
    "a withdrawal decides nothing": (Lifecycle, "withdraw", _unsettled_withdraw),
    "an unwanted slot stays": (Decisions, "_slot_unwanted", _never),
    "any slot fits": (Residency, "fits_empty", lambda *_: True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Violation):
        for setting in SETTINGS.values():
            explore(setting, limit=60_000)


def test_unknown_moves_raise_and_tell_both_words() -> None:
    for state in FileState:
        for move in FileMove:
            if (state, move) not in FILE_MOVES:
                with pytest.raises(
                    InvalidTransitionError, match=f"{state.value} met '{move.value}"
                ):
                    next_file_state(state, move)
    for slot_state in SlotState:
        for slot_move in SlotMove:
            if (slot_state, slot_move) not in SLOT_MOVES:
                with pytest.raises(InvalidTransitionError, match=slot_move.value):
                    next_slot_state(slot_state, slot_move)
