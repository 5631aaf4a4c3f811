"""The lifecycle explored exhaustively in small worlds, and broken on purpose to see it noticed."""

from __future__ import annotations

from itertools import product

import pytest

from core.lifecycle.explorer import explore
from core.lifecycle.mutants import MUTANTS
from core.lifecycle.world import Violation
from core.lifecycle.worlds import LARGER, SETTINGS
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, owner, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Violation):
        explore((SETTINGS | LARGER)[world], limit=60_000)


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
