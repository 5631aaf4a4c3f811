"""Draw the state diagrams of architecture.md from the tables of moves.

python docs/draw_states.py            # print them
python docs/draw_states.py --write    # put them into architecture.md, between its marks
python docs/draw_states.py --check    # fail if architecture.md is outdated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from lorax_async.lifecycle.adapter_state import (
    FILE_MOVES,
    SLOT_MOVES,
    FileMove,
    FileState,
    SlotMove,
    SlotState,
)

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- states: drawn by docs/draw_states.py -->", "<!-- end of states -->"

DECISIONS: frozenset[Enum] = frozenset(
    {
        *(FileMove.FETCH, FileMove.UNWANTED, FileMove.DROPPED, FileMove.QUIESCED),
        *(SlotMove.SLOT_GRANTED, SlotMove.UNWANTED, SlotMove.EVICTED, SlotMove.QUIESCED),
    }
)
"""Moves that `Lifecycle` decides; the others are outcomes, which the driver reports."""

State = TypeVar("State", bound=Enum)
Move = TypeVar("Move", bound=Enum)


def diagram(moves: Mapping[tuple[State, Move], State], start: State) -> str:
    """Return a Mermaid diagram with one arrow per pair of states; decisions are in «»."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, move), after in moves.items():
        word = f"«{move.value}»" if move in DECISIONS else str(move.value)
        arrows.setdefault((state.name, after.name), []).append(word)
    lines = [
        f"    {before} --> {after} : {', '.join(words)}"
        for (before, after), words in arrows.items()
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {start.name}", *lines, "```"])


def section() -> str:
    """Return the marks and the diagrams between them."""
    file = diagram(FILE_MOVES, FileState.ABSENT)
    slot = diagram(SLOT_MOVES, SlotState.NONE)
    return f"{BEGIN}\n\nThe file:\n\n{file}\n\nThe slot:\n\n{slot}\n\n{END}"


def redrawn(page: str) -> str:
    """Return the page with new diagrams; raise ValueError unless it has both marks once."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end or BEGIN in after or END in after:
        raise ValueError(f"the page must have {BEGIN!r} and {END!r} once, in this order")
    return f"{before}{section()}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite architecture.md")
    parser.add_argument("--check", action="store_true", help="fail if architecture.md is outdated")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(redrawn(PAGE.read_text()))
    elif arguments.check:
        if redrawn(PAGE.read_text()) != PAGE.read_text():
            sys.exit("the diagrams are outdated; run: python docs/draw_states.py --write")
    else:
        sys.stdout.write(f"{section()}\n")


if __name__ == "__main__":
    main()
