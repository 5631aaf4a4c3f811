"""Who may use how many connections: the more urgent first, then equal shares per origin."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """How many connections a download can use at one origin; smaller urgencies come first.

    Attributes
    ----------
    stalled
        The origin has sent nothing for a while.
    retried
        All that the download would use them for was tried before.
    """

    urgency: int
    wanted: int
    origin: Hashable = None
    stalled: bool = False
    retried: bool = False


def shares(claims: Sequence[Claim], connections: int, *, soon: int = 0) -> list[int]:
    """How many connections each of the claims gets, in their order.

    Within an urgency no origin gets less than another one that got more than it wanted less of, and
    within an origin no claim; what does not divide goes to what was not tried before, then to those
    who came first. A later urgency gets what the earlier ones left. An origin that is stalled gets
    one connection per urgency, and more only where nobody else has a use for them, now or `soon`.
    """
    given = [0] * len(claims)
    urgencies = sorted({claim.urgency for claim in claims})
    for rest in (False, True):  # at the end, what was kept from those that are stalled
        connections = max(0, connections - soon) if rest else connections
        for urgency in urgencies:
            origins = _by_origin(claims, urgency)
            wanted = [_wanted(claims, who, given, rest=rest) for who in origins]
            parts = _even(wanted, connections)
            connections -= sum(parts)
            for who, part in zip(origins, parts, strict=True):
                left = [claims[n].wanted - given[n] for n in who]
                for n, more in zip(who, _even(left, part), strict=True):
                    given[n] += more
    return given


def _by_origin(claims: Sequence[Claim], urgency: int) -> list[list[int]]:
    """The claims of each origin; the origins and the claims that come first have what is over."""
    found: dict[Hashable, list[int]] = {}
    for n, claim in enumerate(claims):
        if claim.urgency == urgency:
            found.setdefault(claim.origin, []).append(n)
    origins = [sorted(who, key=lambda n: claims[n].retried) for who in found.values()]
    return sorted(origins, key=lambda who: (claims[who[0]].stalled, claims[who[0]].retried))


def _wanted(
    claims: Sequence[Claim], who: Sequence[int], given: Sequence[int], *, rest: bool
) -> int:
    left = sum(claims[n].wanted - given[n] for n in who)
    return left if rest or not claims[who[0]].stalled else min(left, 1)


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
