"""What becomes of requests that come one after the other: a loader's budgets, without bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant, Needs
from lorax_async.core.residency import Residency


@dataclass(frozen=True, slots=True)
class Outcome:
    """How often an adapter was on the device when it was asked for, and what moved where not.

    `refused` requests ask for what does not fit an empty device. `first_loads` are the loads of
    adapters that were not loaded before. `device_bytes` are copied by all loads, `file_bytes` are
    those of the files they come from.
    """

    requests: int = 0
    hits: int = 0
    refused: int = 0
    loads: int = 0
    first_loads: int = 0
    evictions: int = 0
    device_bytes: int = 0
    file_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


def simulate(requests: Iterable[int], needs: Sequence[Needs], residency: Residency) -> Outcome:
    """Let each request find its adapter on the device, or make room and load it.

    Parameters
    ----------
    requests
        Positions in `needs`, in the order in which they come; each is through before the next.
    residency
        An empty one, which is full of the last of them afterwards.
    """
    held: dict[int, Grant] = {}
    keys: dict[int, AdapterKey] = {}
    positions: dict[AdapterKey, int] = {}
    hits = refused = loads = evictions = device_bytes = file_bytes = 0
    for position in requests:
        key = keys.get(position)
        if position in held:
            assert key is not None
            residency.policy.use(key)
            hits += 1
            continue
        wanted = needs[position]
        if not residency.fits_beside((), wanted.group_nbytes):
            refused += 1
            continue
        if key is None:
            key = keys[position] = AdapterKey(str(position), ())
            positions[key] = position
        while (grant := residency.claim(key, wanted)) is None:
            victim = next(residency.ranked())
            residency.release(victim, held.pop(positions[victim]), evicted=True)
            evictions += 1
        held[position] = grant
        loads += 1
        device_bytes += grant.nbytes
        file_bytes += wanted.file_nbytes
    count = hits + refused + loads
    return Outcome(count, hits, refused, loads, len(keys), evictions, device_bytes, file_bytes)


def simplified(needs: Sequence[Needs]) -> Sequence[Needs]:
    """The same outcome in less time, where that is certain.

    If all groups of all adapters have one size, and all adapters as many of them, no hole is ever
    too small: as many adapters fit as their sums do, and each may stand for one group.
    """
    kinds = {id(need): need for need in needs}
    groups = {need.group_nbytes for need in kinds.values()}
    if len(groups) != 1 or len(set(next(iter(groups)))) != 1:
        return needs
    simple = {
        number: replace(need, group_nbytes=(sum(need.group_nbytes),))
        for number, need in kinds.items()
    }
    return [simple[id(need)] for need in needs]


def fitting(needs: Needs, residency: Residency) -> int:
    """How many adapters of this kind an empty device holds. Leaves them in it."""
    count = 0
    while residency.claim(AdapterKey(str(count), ()), needs) is not None:
        count += 1
    return count
