"""One wait, event or order of the code, taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of one source file that must not go unnoticed.

    Attributes
    ----------
    file
        Below `lorax_async`.
    snippet
        Stands exactly once in it; `instead` takes its place.
    tests
        Nodes below `tests`, of which one at least must fail.
    """

    file: str
    snippet: str
    instead: str
    tests: tuple[str, ...]


Mutants = Mapping[str, Mutant]
"""By what was removed."""


def mutant(file: str, snippet: str, instead: str, *tests: str) -> Mutant:
    return Mutant(file, snippet, instead, tests)
