"""The two tables of moves: every legal step of an adapter's file and of its slot.

The driver reports outcomes; `Lifecycle` alone makes decisions. A move without a row raises and
changes nothing. The state diagrams in docs/architecture.md are generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from lorax_async.errors import InvalidTransitionError


class FileState(Enum):
    ABSENT = "absent"
    FETCHING = "fetching"
    PRESENT = "present"
    ENDING = "ending"


class SlotState(Enum):
    NONE = "none"
    FILLING = "filling"
    RESIDENT = "resident"
    DRAINING = "draining"


class FileMove(Enum):
    # outcomes
    HEADER_CHECKED = "header checked"
    SPAN_FETCHED = "span fetched"
    PUBLISHED = "published"
    FETCH_FAILED = "fetch failed"
    POPULATED = "populated"
    RELEASED = "released"
    LOST = "lost"
    # decisions
    FETCH = "fetch"
    UNWANTED = "unwanted"
    DROPPED = "dropped"
    QUIESCED = "quiesced"


class SlotMove(Enum):
    # outcomes
    COPY_DONE = "copy done"
    LAST_COPY_DONE = "last copy done"
    COPY_FAILED = "copy failed"
    FILE_FAILED = "file failed"
    WIPED = "wiped"
    # decisions
    SLOT_GRANTED = "slot granted"
    UNWANTED = "unwanted"
    EVICTED = "evicted"
    QUIESCED = "quiesced"


FILE_MOVES: Mapping[tuple[FileState, FileMove], FileState] = {
    (FileState.ABSENT, FileMove.FETCH): FileState.FETCHING,
    (FileState.ABSENT, FileMove.DROPPED): FileState.ABSENT,
    (FileState.FETCHING, FileMove.HEADER_CHECKED): FileState.FETCHING,
    (FileState.FETCHING, FileMove.SPAN_FETCHED): FileState.FETCHING,
    (FileState.FETCHING, FileMove.PUBLISHED): FileState.PRESENT,
    (FileState.FETCHING, FileMove.FETCH_FAILED): FileState.ENDING,
    (FileState.FETCHING, FileMove.UNWANTED): FileState.ENDING,
    (FileState.PRESENT, FileMove.POPULATED): FileState.PRESENT,
    (FileState.PRESENT, FileMove.RELEASED): FileState.PRESENT,
    (FileState.PRESENT, FileMove.LOST): FileState.ENDING,
    (FileState.PRESENT, FileMove.DROPPED): FileState.ENDING,
    (FileState.ENDING, FileMove.HEADER_CHECKED): FileState.ENDING,
    (FileState.ENDING, FileMove.SPAN_FETCHED): FileState.ENDING,
    (FileState.ENDING, FileMove.PUBLISHED): FileState.ENDING,
    (FileState.ENDING, FileMove.FETCH_FAILED): FileState.ENDING,
    (FileState.ENDING, FileMove.POPULATED): FileState.ENDING,
    (FileState.ENDING, FileMove.RELEASED): FileState.ENDING,
    (FileState.ENDING, FileMove.LOST): FileState.ENDING,
    (FileState.ENDING, FileMove.QUIESCED): FileState.ABSENT,
}

SLOT_MOVES: Mapping[tuple[SlotState, SlotMove], SlotState] = {
    (SlotState.NONE, SlotMove.SLOT_GRANTED): SlotState.FILLING,
    (SlotState.FILLING, SlotMove.COPY_DONE): SlotState.FILLING,
    (SlotState.FILLING, SlotMove.LAST_COPY_DONE): SlotState.RESIDENT,
    (SlotState.FILLING, SlotMove.COPY_FAILED): SlotState.DRAINING,
    (SlotState.FILLING, SlotMove.FILE_FAILED): SlotState.DRAINING,
    (SlotState.FILLING, SlotMove.UNWANTED): SlotState.DRAINING,
    (SlotState.RESIDENT, SlotMove.FILE_FAILED): SlotState.DRAINING,
    (SlotState.RESIDENT, SlotMove.EVICTED): SlotState.DRAINING,
    (SlotState.DRAINING, SlotMove.COPY_DONE): SlotState.DRAINING,
    (SlotState.DRAINING, SlotMove.LAST_COPY_DONE): SlotState.DRAINING,
    (SlotState.DRAINING, SlotMove.COPY_FAILED): SlotState.DRAINING,
    (SlotState.DRAINING, SlotMove.WIPED): SlotState.DRAINING,
    (SlotState.DRAINING, SlotMove.QUIESCED): SlotState.NONE,
}


def next_file_state(state: FileState, move: FileMove) -> FileState:
    """Return the file state after `move`. Raises `InvalidTransitionError` if there is none."""
    try:
        return FILE_MOVES[state, move]
    except KeyError:
        raise InvalidTransitionError(
            f"no move {move.value!r} for a file that is {state.value}"
        ) from None


def next_slot_state(state: SlotState, move: SlotMove) -> SlotState:
    """Return the slot state after `move`. Raises `InvalidTransitionError` if there is none."""
    try:
        return SLOT_MOVES[state, move]
    except KeyError:
        raise InvalidTransitionError(
            f"no move {move.value!r} for a slot that is {state.value}"
        ) from None
