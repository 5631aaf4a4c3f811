"""Who may use how many connections: the more urgent first, then equal shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """How many connections a download can use; smaller urgencies come first."""

    urgency: int
    wanted: int


def shares(claims: Sequence[Claim], connections: int) -> list[int]:
    """How many connections each of the claims gets, in their order.

    Within an urgency nobody gets less than another who got more than it wanted less of; what does
    not divide goes to those who came first. A later urgency gets what the earlier ones left.
    """
    given = [0] * len(claims)
    for urgency in sorted({claim.urgency for claim in claims}):
        who = [n for n, claim in enumerate(claims) if claim.urgency == urgency]
        for n, part in zip(who, _even([claims[n].wanted for n in who], connections), strict=True):
            given[n] = part
        connections -= sum(given[n] for n in who)
    return given


def _even(wanted: Sequence[int], connections: int) -> list[int]:
    """Those who want little first: what they leave raises the others' part."""
    given = list(wanted)
    modest = sorted(range(len(wanted)), key=lambda n: wanted[n])
    for place, n in enumerate(modest):
        level, more = divmod(connections, len(modest) - place)
        if wanted[n] > level:
            for rank, hungry in enumerate(sorted(modest[place:])):
                given[hungry] = level + (rank < more)
            break
        connections -= wanted[n]
    return given
