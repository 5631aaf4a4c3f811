"""Rules of slots, files and copies broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

from core.lifecycle_broken import Mutant, never, no_commands, nothing
from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Fetch, Serve
from lorax_async.core.decisions import Decisions
from lorax_async.core.holders import Holders
from lorax_async.core.life import Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import Residency
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier
from lorax_async.errors import LoraxError


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


def _unsettled_withdraw(self: Lifecycle, key: AdapterKey, waiter: int) -> list[object]:
    self.lives[key].waiters.remove(waiter)
    return []


def _notes_in_silence(self: Holders, life: Life) -> bool:
    _note(self, life)
    return False


def _file_gone_under_fetch(_: Decisions, life: Life) -> bool:
    if life.file is not FileState.ENDING:
        return False
    life.file = FileState.ABSENT
    life.fetched = 0
    return True


def _early(self: Decisions, life: Life, _: Tier) -> bool:
    return life.slot in (SlotState.FILLING, SlotState.RESIDENT) and not self.closing


def _blind_to_leaving(self: Decisions, life: Life, tier: Tier) -> bool:
    if life.slot is SlotState.RESIDENT:
        return not self.closing
    return tier is Tier.STREAM and life.slot is SlotState.FILLING


def _evicts_the_leased(_: Decisions, life: Life) -> bool:
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
    self.residency.release(life.key, life.grant, evicted=False)
    life.vacate()
    return True


def _not_zeroed(self: Decisions, life: Life) -> bool:
    life.broken = False
    return _slot_quiesced(self, life)


def _zeroing_is_not_waited_for(self: Decisions, life: Life) -> bool:
    quiesced = _slot_quiesced(self, life)
    life.broken = life.broken and not life.wiping
    life.wiping = False
    return quiesced or _slot_quiesced(self, life)


def _distrusts_what_is_held(self: Decisions, life: Life, error: LoraxError) -> None:
    self.fail(life, error)
    self.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))


def _copies_unread(self: CopyQueue) -> None:
    for life in list(self._queue.values()):
        life.fetched = life.all_groups
    _submit(self)


def _forgets_the_place(_: CopyQueue, life: Life) -> None:
    life.copying -= 1


def _prefetch_is_foreground(self: Life) -> bool:
    ready = self.needs is not None and self.file in (FileState.FETCHING, FileState.PRESENT)
    return ready and any(waiter.tier >= Tier.STREAM for waiter in self.waiters)


def _fetch_twice(self: Decisions, life: Life) -> bool:
    if not life.waiters or life.file not in (FileState.ABSENT, FileState.ENDING):
        return False
    life.file = FileState.FETCHING
    life.attempt += 1
    life.fetch_running = True
    self.command(Fetch(life.key, life.attempt))
    return True


def _leases_for_all(self: Decisions, life: Life) -> bool:
    tiers = {tier for tier, _ in life.waiters.kinds if self.reached(life, tier)}
    served = life.waiters.of_tiers(tiers)
    for waiter in served:
        life.waiters.remove(waiter.id)
        leases = waiter.tier >= Tier.STREAM
        life.leases += leases
        self.command(Serve(life.key, waiter.id, life.grant if leases else None))
    return bool(served)


_note = Holders.note
_slot_quiesced = Decisions._slot_quiesced
_submit = CopyQueue.submit

SLOTS_AND_FILES: dict[str, Mutant] = {
    "slot freed under a copy": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _without("copying"),
    ),
    "slot freed under a lease": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _without("leases"),
    ),
    "slot freed under a kernel": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _without("uses"),
    ),
    "column not cleared": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _column_not_cleared,
    ),
    "what broke is not zeroed": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _not_zeroed,
    ),
    "zeroing is not waited for": (
        *("two adapters, one slot", Decisions, "_slot_quiesced"),
        _zeroing_is_not_waited_for,
    ),
    "what drains is trusted": (
        *("two adapters, one slot", Decisions, "distrust"),
        _distrusts_what_is_held,
    ),
    "slot never freed": ("two adapters, one slot", Decisions, "_slot_quiesced", never),
    "file gone while it is fetched": (
        *("two adapters, one slot", Decisions, "file_quiesced"),
        _file_gone_under_fetch,
    ),
    "file never ends": ("two adapters, one slot", Decisions, "file_quiesced", never),
    "served before the last byte": ("two adapters, one slot", Decisions, "reached", _early),
    "leased while leaving": ("lookups and ageing", Decisions, "reached", _blind_to_leaving),
    "nobody is served": ("two adapters, one slot", Decisions, "_serve", never),
    "the leased are evicted": ("lookups and ageing", Decisions, "_evicted", _evicts_the_leased),
    "nobody is evicted": ("two adapters, one slot", Decisions, "_evicted", never),
    "no room is made": ("two adapters, one slot", SlotQueue, "_make_room", nothing),
    "no change of a holder is noticed": (
        *("two adapters, one slot", Holders, "note"),
        _notes_in_silence,
    ),
    "failed fetches fail nobody": ("two adapters, one slot", Decisions, "fail", nothing),
    "copies of bytes not here": ("two adapters, one slot", CopyQueue, "submit", _copies_unread),
    "a copy's place is not given back": (
        *("one copy at a time", CopyQueue, "copied"),
        _forgets_the_place,
    ),
    "a prefetch takes a slot early": (
        *("prefetch beside foreground", Life, "wants_slot"),
        property(_prefetch_is_foreground),
    ),
    "fetched while ending": ("two adapters, one slot", Decisions, "_fetch", _fetch_twice),
    "fetched never": ("two adapters, one slot", Decisions, "_fetch", never),
    "close fails nobody": ("two adapters, one slot", Lifecycle, "close", no_commands),
    "a withdrawal decides nothing": (
        *("two adapters, one slot", Lifecycle, "withdraw"),
        _unsettled_withdraw,
    ),
    "an unwanted slot stays": ("two adapters, one slot", Decisions, "_slot_unwanted", never),
    "any slot fits": ("too large", Residency, "fits_beside", lambda *_: True),
    "a prefetch gets a lease": ("prefetch beside foreground", Decisions, "_serve", _leases_for_all),
    "minimum residency ignored": (
        *("minimum residency", SlotQueue, "_evictable_at"),
        lambda *_: 0.0,
    ),
    "minimum residency has no end": (
        *("minimum residency", SlotQueue, "_evictable_at"),
        lambda *_: float("inf"),
    ),
    "the leased leave for nobody": ("lookups and ageing", SlotQueue, "_starves_at", lambda *_: 0.0),
    "the starving wait on": (
        *("lookups and ageing", SlotQueue, "_starves_at"),
        lambda *_: float("inf"),
    ),
    "turns of copies never come": ("two adapters, one slot", CopyQueue, "update", nothing),
}
