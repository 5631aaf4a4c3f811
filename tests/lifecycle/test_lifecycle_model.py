"""The lifecycle explored exhaustively in small worlds, and broken on purpose to see it noticed."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
from lifecycle_explorer import explore
from lifecycle_world import LARGER, SETTINGS, Violation

from lorax_async import AdapterKey, InvalidTransitionError, LoraxError
from lorax_async.lifecycle import adapter_state, commands, rules
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileState,
    HostState,
    SlotState,
    WantedTier,
)
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import CopyQueue, LifecycleRules, PinnedImages, SlotQueue
from lorax_async.runtime.host_tier import HostTier

SMALL = ["least often used", "host memory and unload"]  # some always


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.slow) for n in SETTINGS]
)
def test_every_reachable_state_is_sound(name: str) -> None:
    assert explore(SETTINGS[name], limit=60_000) > 50


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGER)
def test_larger_worlds_are_sound_too(name: str) -> None:
    assert explore(LARGER[name], limit=5_000_000) > 1000


def test_unknown_moves_raise_and_tell_both_words() -> None:
    tables: list[tuple[Any, Any, Any, Callable[..., object]]] = [
        (
            FileState,
            adapter_state.FileMove,
            adapter_state.FILE_MOVES,
            adapter_state.next_file_state,
        ),
        (
            SlotState,
            adapter_state.SlotMove,
            adapter_state.SLOT_MOVES,
            adapter_state.next_slot_state,
        ),
    ]
    for states, moves, known, step in tables:
        for state, move in set(product(states, moves)) - set(known):
            told = f"'{move.value}' .* {state.value}$"
            with pytest.raises(InvalidTransitionError, match=told):
                step(state, move)


# Rules broken on purpose, one at a time, each with a world in which that is noticed.

Broken = tuple[type | ModuleType, str, object]


def always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def blind(owner: type | ModuleType, name: str, **fields: object) -> Broken:
    """The rule, which sees these values of the adapter's fields for as long as it looks."""
    rule = getattr(owner, name)

    def broken(*args: Any) -> object:
        life = args[0] if owner is AdapterState or not isinstance(owner, type) else args[1]
        kept = {field: getattr(life, field) for field in fields}
        for field, value in fields.items():
            setattr(life, field, value)
        result = rule(*args)
        for field, value in kept.items():
            setattr(life, field, value)
        return result

    return owner, name, broken


def _released_at_once(self: LifecycleRules, life: AdapterState) -> None:
    life.host = HostState.NONE
    self.command(commands.ReleasePages(life.key, life.attempt))


_pin = Lifecycle.pin


def _pinned(self: Lifecycle, key: AdapterKey) -> list[Command]:
    self.states[key].pins += 1
    return []


def _is_idle(life: AdapterState) -> bool:
    """Never, if it was read ahead."""
    return bool(_was_idle.__get__(life)) and life.host is HostState.NONE


def _forgets(self: Lifecycle, key: AdapterKey) -> list[object]:
    if self.states.pop(key, None):
        self._rules.command(commands.ForgetAdapter(key))
    return [*self._rules.take_commands()]


def _column_not_cleared(self: LifecycleRules, life: AdapterState) -> bool:
    ready = life.slot is SlotState.DRAINING and not (life.copying or life.uses or life.leases)
    if not ready or life.grant is None:
        return False
    life.slot = SlotState.NONE
    self.residency.release(life.key, life.grant, evicted=False)
    life.vacate()
    return True


def _fetches_while_ending(self: LifecycleRules, life: AdapterState) -> bool:
    if not life.waiters or life.file not in (FileState.ABSENT, FileState.ENDING):
        return False
    life.file, life.fetch_running = FileState.FETCHING, True
    life.attempt += 1
    self.command(commands.StartFetch(life.key, life.attempt))
    return True


def _evicts_the_leased(_: LifecycleRules, life: AdapterState) -> bool:
    if life.slot is not SlotState.RESIDENT or not life.leaving:
        return False
    life.slot, life.leases = SlotState.DRAINING, 0
    return True


def _zeroing_not_awaited(self: LifecycleRules, life: AdapterState) -> bool:
    quiesced = _free_quiesced_slot(self, life)
    life.broken, life.wiping = life.broken and not life.wiping, False
    return quiesced or _free_quiesced_slot(self, life)


def _distrusts_what_is_held(self: LifecycleRules, life: AdapterState, error: LoraxError) -> None:
    self.fail(life, error)
    self.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))


def _copies_unread(self: CopyQueue) -> None:
    for life in [self._rules.states[key] for key in self._foreground]:
        life.fetched = life.all_groups
    _submit(self)


def _prefetch_wants_a_slot(life: AdapterState) -> bool:
    ready = life.needs is not None and life.file in (FileState.FETCHING, FileState.PRESENT)
    return ready and any(waiter.tier >= WantedTier.STREAM for waiter in life.waiters)


def _leases_for_all(self: LifecycleRules, life: AdapterState) -> bool:
    tiers = {tier for tier, _ in life.waiters.kinds if self.has_reached(life, tier)}
    served = life.waiters.of_tiers(tiers)
    for waiter in served:
        life.waiters.remove(waiter.id)
        leases = waiter.tier >= WantedTier.STREAM
        life.leases += leases
        self.command(commands.ServeWaiter(life.key, waiter.id, life.grant if leases else None))
    return bool(served)


def _drains_pinned(self: LifecycleRules, life: AdapterState, state: SlotState) -> None:
    self.notify_leaving(life)
    life.slot = state


def _pinned_after_close(self: Lifecycle, key: AdapterKey) -> list[Command] | None:
    closing, self._rules.closing = self._rules.closing, False
    try:
        return _pin(self, key)
    finally:
        self._rules.closing = closing


def _pinned_unless_leaving(self: Lifecycle, key: AdapterKey) -> list[Command] | None:
    return None if self.states[key].leaving else _pin(self, key)


def _pinned_but_leaving(self: Lifecycle, key: AdapterKey) -> list[Command] | None:
    life = self.states[key]
    leaving, ordered = life.leaving, _pin(self, key)
    life.leaving = leaving
    return ordered


def _keeps_pins(rule: Callable[..., list[Command]]) -> Callable[..., list[Command]]:
    def kept(self: Lifecycle, *args: Any) -> list[Command]:
        pins = {key: life.pins for key, life in self.states.items()}
        commands = rule(self, *args)
        for key, life in self.states.items():
            life.pins = pins.get(key, 0)
        return commands

    return kept


def _unload_never_over(self: LifecycleRules, life: AdapterState) -> bool:
    """The caller is notified, and yet nothing may claim the adapter again."""
    if _finish_unload(self, life):
        life.unloads, life.leave_notified = 1, True
    return False


def _lift_without_a_decision(self: Lifecycle, key: AdapterKey) -> list[Command]:
    life = self.states.get(key)
    if life is not None and life.unloads:
        life.unloads -= 1
        if not life.departing:
            self._rules.notify_stays(life)
    return self._rules.take_commands()


def _demotion_never_served(self: LifecycleRules, life: AdapterState) -> bool:
    return life.host is not HostState.WANTED and _populate(self, life)


def _demotes_the_held(self: LifecycleRules, life: AdapterState) -> bool:
    evicted = _evict(self, life)
    if evicted and not (life.unloads or self.closing) and life.needs is not None:
        life.host = HostState.WANTED if life.needs.holdable else life.host
    return evicted


def _several_populated(self: HostTier) -> None:
    self.populating = None
    _advance(self)


def _never_free(self: HostTier, key: AdapterKey) -> None:
    nbytes = self.sizes[key]
    _unmapped(self, key)
    self.sizes[key] = nbytes


def _warm_without_bytes(self: PinnedImages, life: AdapterState) -> None:
    _claim_image(self, life)
    if life.image is not None:
        life.imaged = life.all_groups


def _dropped_until_close(self: LifecycleRules, life: AdapterState) -> bool:
    return not self.closing and _drop_unwanted_host(self, life)


def _only_residents_stay(self: LifecycleRules, life: AdapterState) -> None:
    if life.slot is SlotState.RESIDENT:
        _notify_stays(self, life)


def _losers_unsettled(self: Lifecycle) -> AdapterState | None:
    self._rules.touched.clear()
    return self._slots.settle_head()


def _only_the_first_is_done(
    self: Lifecycle, first: commands.CopyGroups, *rest: commands.CopyGroups, fast: bool
) -> list[Command]:
    none = [replace(copy, groups=()) for copy in rest]
    return _copy_done(self, replace(first, groups=first.groups[:1]), *none, fast=fast)


_copy_done = Lifecycle.copy_done
_claim_image, _submit = PinnedImages.claim, CopyQueue.submit
_update_holders = rules.SlotHolders.update
_evict, _free_quiesced_slot = LifecycleRules._evict, LifecycleRules._free_quiesced_slot
_drop_unwanted_host, _notify_stays = LifecycleRules._drop_unwanted_host, LifecycleRules.notify_stays
_populate, _finish_unload = LifecycleRules._populate, LifecycleRules._finish_unload
_advance, _unmapped = HostTier._advance, HostTier.unmapped
_fits_beside, _was_idle = Residency.fits_beside, AdapterState.is_idle
NEVER = always(False)
BROKEN: dict[str, list[Broken]] = {
    "two adapters, one slot": [
        (LifecycleRules, "_free_quiesced_slot", _column_not_cleared),
        (LifecycleRules, "_free_quiesced_slot", _zeroing_not_awaited),
        (LifecycleRules, "reject_fetched", _distrusts_what_is_held),
        (
            rules.SlotHolders,
            "update",
            lambda self, life: bool(_update_holders(self, life) and False),
        ),
        (CopyQueue, "submit", _copies_unread),
        (LifecycleRules, "_free_quiesced_slot", NEVER),
        *(
            blind(LifecycleRules, "_free_quiesced_slot", **{field: 0})
            for field in ("copying", "leases", "uses", "broken")
        ),
        (LifecycleRules, "free_quiesced_file", NEVER),
        blind(LifecycleRules, "free_quiesced_file", fetch_running=False),
        blind(LifecycleRules, "has_reached", slot=SlotState.RESIDENT),
        (LifecycleRules, "_serve", NEVER),
        (LifecycleRules, "_evict", NEVER),
        (LifecycleRules, "_fetch", NEVER),
        (LifecycleRules, "_fetch", _fetches_while_ending),
        (LifecycleRules, "_drain_unwanted_slot", NEVER),
        (LifecycleRules, "fail", always(None)),
        (SlotQueue, "_make_room", always(None)),
        (CopyQueue, "update", always(None)),
        (Lifecycle, "close", always([])),
        (Lifecycle, "withdraw", always([])),
    ],
    "lookups and ageing": [
        blind(LifecycleRules, "has_reached", leaving=False),
        (LifecycleRules, "_evict", _evicts_the_leased),
        (SlotQueue, "_starves_at", always(0.0)),
        (SlotQueue, "_starves_at", always(float("inf"))),
    ],
    "one copy at a time": [(CopyQueue, "copied", lambda _, life, nbytes: life.done)],
    "runs of groups": [
        (CopyQueue, "_next_run", lambda _, life: life.next_copies(3, 192)),
        (Lifecycle, "copy_done", _only_the_first_is_done),
        blind(AdapterState, "next_copies", submitted=0),
    ],
    "runs that arrive": [
        (AdapterState, "streams", False),
        blind(AdapterState, "next_copies", fetched=7),
    ],
    "too large": [(Residency, "fits_beside", always(True))],
    "minimum residency": [
        (SlotQueue, "_evictable_at", always(0.0)),
        (SlotQueue, "_evictable_at", always(float("inf"))),
    ],
    "pins of one of three": [blind(rules, "is_evictable", pins=0)],
    "pins": [
        (Residency, "fits_beside", lambda self, _, sizes: _fits_beside(self, (), sizes)),
        (Lifecycle, "pin", _pinned_after_close),
        (Lifecycle, "close", _keeps_pins(Lifecycle.close)),
        (Lifecycle, "unpin", always([])),
        (Lifecycle, "pin", _pinned),
    ],
    "unload beside loads": [
        (LifecycleRules, "_finish_unload", _unload_never_over),
        (AdapterState, "departing", property(lambda life: life.leaving)),
        (LifecycleRules, "_finish_unload", NEVER),
        blind(LifecycleRules, "_finish_unload", slot=SlotState.NONE),
        (LifecycleRules, "notify_leaving", always(None)),
        (LifecycleRules, "notify_stays", always(None)),
        (Lifecycle, "withdraw_unload", always([])),
    ],
    "host memory and unload": [
        (LifecycleRules, "_drop_unwanted_host", _dropped_until_close),
        blind(LifecycleRules, "_finish_unload", host=HostState.NONE),
        (LifecycleRules, "_drop_unwanted_host", NEVER),
    ],
    "images, unload and failures": [
        (LifecycleRules, "_drop_unwanted_host", NEVER),
        (ImageBudget, "drop", always(None)),
    ],
    "forgotten on demand": [(Lifecycle, "forget", _forgets)],
    "host memory for one of two": [
        (LifecycleRules, "_populate", _demotion_never_served),
        (LifecycleRules, "_evict", _demotes_the_held),
        (AdapterState, "is_held", property(lambda life: life.host is not HostState.NONE)),
        (HostTier, "used", 0),
        (HostTier, "unmapped", _never_free),
        (LifecycleRules, "release_host", _released_at_once),
        (HostTier, "_make_room", NEVER),
    ],
    "no host memory": [(HostTier, "_give_up", lambda self, key, error=None: self.waiting.pop(key))],
    "populated and forgotten": [(AdapterState, "is_idle", property(_is_idle))],
    "an image between two slots": [(rules, "_is_idle", always(True))],
    "prefetch beside foreground": [
        (AdapterState, "wants_slot", property(_prefetch_wants_a_slot)),
        (LifecycleRules, "_serve", _leases_for_all),
    ],
    "pins and streams": [(LifecycleRules, "drain", _drains_pinned)],
    "pins and ageing": [
        (Lifecycle, "pin", _pinned),
        (Lifecycle, "pin", _pinned_unless_leaving),
        (Lifecycle, "pin", _pinned_but_leaving),
    ],
    "pins and unload": [(Lifecycle, "unload", _keeps_pins(Lifecycle.unload))],
    "unload beside streams": [
        (Lifecycle, "withdraw_unload", _lift_without_a_decision),
        (LifecycleRules, "notify_stays", _only_residents_stay),
    ],
    "some can be held": [(HostTier, "_advance", _several_populated)],
    "images for one of two": [
        (PinnedImages, "claim", _warm_without_bytes),
        (Lifecycle, "_next_touched", _losers_unsettled),
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
