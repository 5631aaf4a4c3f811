"""The lifecycle explored exhaustively in small worlds, and broken on purpose to see it noticed."""

from __future__ import annotations

import pytest

from core.lifecycle_explorer import explore
from core.lifecycle_mutants import MUTANTS
from core.lifecycle_settings import LARGER, SETTINGS
from core.lifecycle_world import Violation
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

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SETTINGS)
def test_every_reachable_state_is_sound(name: str) -> None:
    assert explore(SETTINGS[name], limit=60_000) > 50


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGER)
def test_larger_worlds_are_sound_too(name: str) -> None:
    assert explore(LARGER[name], limit=5_000_000) > 1000


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, owner, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Violation):
        explore((SETTINGS | LARGER)[world], limit=60_000)


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
