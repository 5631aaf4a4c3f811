"""The lifecycle explored exhaustively in small worlds, and broken on purpose to see it noticed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest

from core.lifecycle.explorer import explore
from core.lifecycle.world import LARGER, SETTINGS, Violation
from lorax_async.adapter import AdapterKey
from lorax_async.core import holders, host_tier
from lorax_async.core.commands import Command, Fetch, Forget, Release, Serve
from lorax_async.core.decisions import Decisions
from lorax_async.core.holders import Holders
from lorax_async.core.host_tier import HostQueue, Images
from lorax_async.core.life import HostState, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import HostBudget, ImageBudget, Residency
from lorax_async.core.settling import Settling
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
from lorax_async.errors import InvalidTransitionError, LoraxError


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_reachable_state_is_sound(name: str) -> None:
    assert explore(SETTINGS[name], limit=60_000) > 50


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGER)
def test_larger_worlds_are_sound_too(name: str) -> None:
    assert explore(LARGER[name], limit=5_000_000) > 1000


@pytest.mark.parametrize("name", ["least often used", "host memory and unload"])
def test_two_small_worlds_are_sound(name: str) -> None:
    assert explore(SETTINGS[name], limit=60_000) > 50


def test_unknown_moves_raise_and_tell_both_words() -> None:
    for state, move in product(FileState, FileMove):
        if (state, move) not in FILE_MOVES:
            with pytest.raises(InvalidTransitionError, match=f"{state.value} met '{move.value}"):
                next_file_state(state, move)
    for slot_state, slot_move in product(SlotState, SlotMove):
        if (slot_state, slot_move) not in SLOT_MOVES:
            with pytest.raises(InvalidTransitionError, match=slot_move.value):
                next_slot_state(slot_state, slot_move)


# Rules broken on purpose, one at a time, each with a world in which that is noticed.


def always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def blind(owner: type | ModuleType, name: str, **fields: object) -> Callable[..., object]:
    """The rule, which sees these values of the adapter's fields for as long as it looks."""
    rule = getattr(owner, name)

    def broken(*args: Any) -> object:
        life = args[1] if isinstance(owner, type) else args[0]
        kept = {field: getattr(life, field) for field in fields}
        for field, value in fields.items():
            setattr(life, field, value)
        result = rule(*args)
        for field, value in kept.items():
            setattr(life, field, value)
        return result

    return broken


def _released_at_once(self: Decisions, life: Life, *, evicted: bool = False) -> None:
    self.host.pick(life.key, evicted=evicted)
    self.host.release(life.key)
    life.host = HostState.NONE
    self.command(Release(life.key, life.attempt))


def _pinned(self: Lifecycle, key: AdapterKey) -> bool:
    self.lives[key].pins += 1
    return True


def _is_idle(life: Life) -> bool:
    """Never, if it was read ahead."""
    return bool(_was_idle.__get__(life)) and life.host is HostState.NONE


def _forgets(self: Settling, key: AdapterKey) -> list[object]:
    if self.lives.pop(key, None):
        self.decisions.command(Forget(key))
    return [*self.decisions.take_commands()]


def _column_not_cleared(self: Decisions, life: Life) -> bool:
    ready = life.slot is SlotState.DRAINING and not (life.copying or life.uses or life.leases)
    if not ready or life.grant is None:
        return False
    life.slot = SlotState.NONE
    self.residency.release(life.key, life.grant, evicted=False)
    life.vacate()
    return True


def _fetches_while_ending(self: Decisions, life: Life) -> bool:
    if not life.waiters or life.file not in (FileState.ABSENT, FileState.ENDING):
        return False
    life.file, life.fetch_running = FileState.FETCHING, True
    life.attempt += 1
    self.command(Fetch(life.key, life.attempt))
    return True


def _evicts_the_leased(_: Decisions, life: Life) -> bool:
    if life.slot is not SlotState.RESIDENT or not life.leaving:
        return False
    life.slot, life.leases = SlotState.DRAINING, 0
    return True


def _zeroing_not_awaited(self: Decisions, life: Life) -> bool:
    quiesced = _slot_quiesced(self, life)
    life.broken, life.wiping = life.broken and not life.wiping, False
    return quiesced or _slot_quiesced(self, life)


def _distrusts_what_is_held(self: Decisions, life: Life, error: LoraxError) -> None:
    self.fail(life, error)
    self.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))


def _copies_unread(self: CopyQueue) -> None:
    for life in list(self._queue.values()):
        life.fetched = life.all_groups
    _submit(self)


def _prefetch_wants_a_slot(life: Life) -> bool:
    ready = life.needs is not None and life.file in (FileState.FETCHING, FileState.PRESENT)
    return ready and any(waiter.tier >= Tier.STREAM for waiter in life.waiters)


def _leases_for_all(self: Decisions, life: Life) -> bool:
    tiers = {tier for tier, _ in life.waiters.kinds if self.reached(life, tier)}
    served = life.waiters.of_tiers(tiers)
    for waiter in served:
        life.waiters.remove(waiter.id)
        leases = waiter.tier >= Tier.STREAM
        life.leases += leases
        self.command(Serve(life.key, waiter.id, life.grant if leases else None))
    return bool(served)


def _drains_pinned(self: Decisions, life: Life, state: SlotState) -> None:
    self.tell_leaving(life)
    life.slot = state


def _pinned_after_close(self: Lifecycle, key: AdapterKey) -> bool:
    life = self.lives[key]
    pinned = not life.departing and life.slot is SlotState.RESIDENT
    life.pins += pinned
    return pinned


def _keeps_pins(rule: Callable[..., list[Command]]) -> Callable[..., list[Command]]:
    def kept(self: Lifecycle, *args: Any) -> list[Command]:
        pins = {key: life.pins for key, life in self.lives.items()}
        commands = rule(self, *args)
        for key, life in self.lives.items():
            life.pins = pins.get(key, 0)
        return commands

    return kept


def _unload_never_over(self: Decisions, life: Life) -> bool:
    """The caller is notified, and yet nothing may claim the adapter again."""
    if _unloaded(self, life):
        life.unloads, life.told = 1, True
    return False


def _lift_without_a_decision(self: Lifecycle, key: AdapterKey) -> list[Command]:
    life = self.lives.get(key)
    if life is not None and life.unloads:
        life.unloads -= 1
        if not life.departing:
            self._decisions.tell_stays(life)
    return self._decisions.take_commands()


def _demotion_never_served(life: Life) -> bool:
    ready = life.file is FileState.PRESENT and life.host is HostState.NONE and not life.unloads
    return ready and life.waiters.has_tier(Tier.HOST)


def _demotes_the_held(self: Decisions, life: Life) -> bool:
    evicted = _evicted(self, life)
    if evicted and not (life.unloads or self.closing) and life.needs is not None:
        life.demoted = life.needs.holdable
    return evicted


def _several_populated(self: HostQueue) -> Life | None:
    self._budget.populating = None
    return _settle_head(self)


def _uses_what_leaves(self: HostBudget, key: AdapterKey) -> None:
    if key in self.held:
        self.policy.use(key)


def _warm_without_bytes(self: Images, life: Life) -> None:
    _claim_image(self, life)
    if life.image is not None:
        life.imaged = life.all_groups


def _losers_unsettled(self: Settling) -> Life | None:
    self.decisions.touched.clear()
    return self.slots.settle_head() or self.host_queue.settle_head()


_claim_image, _evicted, _fits_beside = Images.claim, Decisions._evicted, Residency.fits_beside
_host_unwanted, _note = Decisions._host_unwanted, Holders.note
_settle_head, _slot_quiesced = HostQueue.settle_head, Decisions._slot_quiesced
_submit, _tell_stays, _unloaded = CopyQueue.submit, Decisions.tell_stays, Decisions._unloaded
_was_idle = Life.is_idle
NEVER = always(False)
BROKEN: dict[str, list[tuple[type | ModuleType, str, object]]] = {
    "two adapters, one slot": [
        (Decisions, "_slot_quiesced", _column_not_cleared),
        (Decisions, "_slot_quiesced", _zeroing_not_awaited),
        (Decisions, "distrust", _distrusts_what_is_held),
        (Holders, "note", lambda self, life: bool(_note(self, life) and False)),
        (CopyQueue, "submit", _copies_unread),
        (Decisions, "_slot_quiesced", NEVER),
        *(
            (Decisions, "_slot_quiesced", blind(Decisions, "_slot_quiesced", **{field: 0}))
            for field in ("copying", "leases", "uses", "broken")
        ),
        (Decisions, "file_quiesced", NEVER),
        (Decisions, "file_quiesced", blind(Decisions, "file_quiesced", fetch_running=False)),
        (Decisions, "reached", blind(Decisions, "reached", slot=SlotState.RESIDENT)),
        (Decisions, "_serve", NEVER),
        (Decisions, "_evicted", NEVER),
        (Decisions, "_fetch", NEVER),
        (Decisions, "_fetch", _fetches_while_ending),
        (Decisions, "_slot_unwanted", NEVER),
        (Decisions, "fail", always(None)),
        (SlotQueue, "_make_room", always(None)),
        (CopyQueue, "update", always(None)),
        (Lifecycle, "close", always([])),
        (Lifecycle, "withdraw", always([])),
    ],
    "lookups and ageing": [
        (Decisions, "reached", blind(Decisions, "reached", leaving=False)),
        (Decisions, "_evicted", _evicts_the_leased),
        (SlotQueue, "_starves_at", always(0.0)),
        (SlotQueue, "_starves_at", always(float("inf"))),
    ],
    "one copy at a time": [(CopyQueue, "copied", lambda _, life: life.done)],
    "too large": [(Residency, "fits_beside", always(True))],
    "minimum residency": [
        (SlotQueue, "_evictable_at", always(0.0)),
        (SlotQueue, "_evictable_at", always(float("inf"))),
    ],
    "pins of one of three": [(holders, "may_go", blind(holders, "may_go", pins=0))],
    "pins": [
        (Residency, "fits_beside", lambda self, _, sizes: _fits_beside(self, (), sizes)),
        (Lifecycle, "pin", _pinned_after_close),
        (Lifecycle, "close", _keeps_pins(Lifecycle.close)),
        (Lifecycle, "unpin", always([])),
        (Lifecycle, "pin", _pinned),
    ],
    "unload beside loads": [
        (Decisions, "_unloaded", _unload_never_over),
        (Life, "departing", property(lambda life: life.leaving)),
        (Decisions, "_unloaded", NEVER),
        (Decisions, "_unloaded", blind(Decisions, "_unloaded", slot=SlotState.NONE)),
        (Decisions, "tell_leaving", always(None)),
        (Decisions, "tell_stays", always(None)),
        (Lifecycle, "withdraw_unload", always([])),
    ],
    "host memory and unload": [
        (
            Decisions,
            "_host_unwanted",
            lambda self, life: not self.closing and _host_unwanted(self, life),
        ),
        (Decisions, "_unloaded", blind(Decisions, "_unloaded", host=HostState.NONE)),
        (Decisions, "_host_unwanted", NEVER),
    ],
    "images, unload and failures": [
        (Decisions, "_host_unwanted", NEVER),
        (ImageBudget, "drop", always(None)),
    ],
    "forgotten on demand": [(Settling, "forget", _forgets)],
    "host memory for one of two": [
        (Life, "wants_host", property(_demotion_never_served)),
        (Decisions, "_evicted", _demotes_the_held),
        (HostBudget, "use", _uses_what_leaves),
        (HostBudget, "claim", always(None)),
        (HostBudget, "release", always(None)),
        (Decisions, "release_host", _released_at_once),
        (HostQueue, "_make_room", always(None)),
    ],
    "no host memory": [(HostQueue, "_refuse", always(None))],
    "populated and forgotten": [(Life, "is_idle", property(_is_idle))],
    "an image between two slots": [(host_tier, "_is_idle", always(True))],
    "prefetch beside foreground": [
        (Life, "wants_slot", property(_prefetch_wants_a_slot)),
        (Decisions, "_serve", _leases_for_all),
    ],
    "pins and streams": [
        (Decisions, "drain", _drains_pinned),
    ],
    "pins and ageing": [
        (Lifecycle, "pin", _pinned),
    ],
    "pins and unload": [
        (Lifecycle, "unload", _keeps_pins(Lifecycle.unload)),
    ],
    "unload beside streams": [
        (Lifecycle, "withdraw_unload", _lift_without_a_decision),
        (
            Decisions,
            "tell_stays",
            lambda self, life: life.slot is SlotState.RESIDENT and _tell_stays(self, life),
        ),
    ],
    "some can be held": [
        (HostQueue, "settle_head", _several_populated),
    ],
    "images for one of two": [
        (Images, "claim", _warm_without_bytes),
        (Settling, "_next_touched", _losers_unsettled),
    ],
}
MUTANTS = [(world, *mutant) for world, mutants in BROKEN.items() for mutant in mutants]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "owner", "rule", "broken"), MUTANTS)
def test_a_broken_rule_is_noticed(
    world: str, owner: type | ModuleType, rule: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, rule, broken)
    with pytest.raises(Violation):
        explore((SETTINGS | LARGER)[world], limit=60_000)
