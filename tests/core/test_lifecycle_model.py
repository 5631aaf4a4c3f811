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
from lorax_async.core.commands import Forget, Release
from lorax_async.core.decisions import Decisions
from lorax_async.core.host_tier import HostQueue
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
from lorax_async.errors import InvalidTransitionError


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


_was_idle = Life.is_idle
NEVER = always(False)
BROKEN: dict[str, list[tuple[type | ModuleType, str, object]]] = {
    "two adapters, one slot": [
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
        (Decisions, "_fetch", blind(Decisions, "_fetch", file=FileState.ABSENT)),
        (Decisions, "_slot_unwanted", NEVER),
        (Decisions, "fail", always(None)),
        (SlotQueue, "_make_room", always(None)),
        (CopyQueue, "update", always(None)),
        (Lifecycle, "close", always([])),
        (Lifecycle, "withdraw", always([])),
    ],
    "lookups and ageing": [
        (Decisions, "reached", blind(Decisions, "reached", leaving=False)),
        (Decisions, "_evicted", blind(Decisions, "_evicted", leases=0)),
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
    "pins": [(Lifecycle, "unpin", always([])), (Lifecycle, "pin", _pinned)],
    "unload beside loads": [
        (Life, "departing", property(lambda life: life.leaving)),
        (Decisions, "_unloaded", NEVER),
        (Decisions, "_unloaded", blind(Decisions, "_unloaded", slot=SlotState.NONE)),
        (Decisions, "tell_leaving", always(None)),
        (Decisions, "tell_stays", always(None)),
        (Lifecycle, "withdraw_unload", always([])),
    ],
    "host memory and unload": [
        (Decisions, "_unloaded", blind(Decisions, "_unloaded", host=HostState.NONE)),
        (Decisions, "_host_unwanted", NEVER),
    ],
    "images, unload and failures": [
        (Decisions, "_host_unwanted", NEVER),
        (ImageBudget, "drop", always(None)),
    ],
    "forgotten on demand": [(Settling, "forget", _forgets)],
    "host memory for one of two": [
        (HostBudget, "claim", always(None)),
        (HostBudget, "release", always(None)),
        (Decisions, "release_host", _released_at_once),
        (HostQueue, "_make_room", always(None)),
    ],
    "no host memory": [(HostQueue, "_refuse", always(None))],
    "populated and forgotten": [(Life, "is_idle", property(_is_idle))],
    "an image between two slots": [(host_tier, "_is_idle", always(True))],
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
