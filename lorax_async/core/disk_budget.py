"""The bytes of a disk cache: who holds them, and who goes first when others need them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lorax_async.adapter import AdapterKey
from lorax_async.core.policies import Policy

FETCH_FIXED_COST = 32 << 20
"""What a fetch costs besides its bytes, in bytes: three round trips of 30 ms at 16 x 20 MB/s."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What one folder of the cache takes, and when it was used (or, a partial, written to) last."""

    nbytes: int
    used_ns: int


class DiskBudget:
    """Entries and partials as the folder showed them last; every process of a cache has its own.

    What is on disk counts, whoever put it there: `observe` is to be called with a fresh look
    before anybody claims room. What other processes did with an entry is learned from its last
    use; how often, each process counts for itself.
    """

    def __init__(self, nbytes: int, policy: Policy) -> None:
        self.nbytes = nbytes
        self._policy = policy
        self._entries: dict[str, Stored] = {}
        self._partials: dict[str, Stored] = {}

    @property
    def used(self) -> int:
        every = (*self._entries.values(), *self._partials.values())
        return sum(stored.nbytes for stored in every)

    @property
    def free(self) -> int:
        return self.nbytes - self.used

    def observe(self, entries: Mapping[str, Stored], partials: Mapping[str, Stored]) -> None:
        """The folder holds these now, and no others."""
        for name in [name for name, known in self._entries.items() if _gone(known, name, entries)]:
            self.forget(name, evicted=False)
        for name, seen in sorted(entries.items(), key=lambda item: item[1].used_ns):
            known = self._entries.get(name)
            if known is None:
                self._admit(name, seen)
            elif seen.used_ns > known.used_ns:
                self._policy.use(_key(name))
            self._entries[name] = seen
        self._partials = dict(partials)

    def use(self, name: str, seen: Stored) -> None:
        """Somebody here used an entry, or put it there; its folder says this of it now."""
        if self._entries.get(name, seen).nbytes != seen.nbytes:
            self.forget(name, evicted=False)
        if name in self._entries:
            self._policy.use(_key(name))
        else:
            self._admit(name, seen)
        self._entries[name] = seen

    def _admit(self, name: str, seen: Stored) -> None:
        cost = float(FETCH_FIXED_COST + seen.nbytes)
        self._policy.admit(_key(name), max(1, seen.nbytes), cost)

    def forget(self, name: str, *, evicted: bool) -> None:
        """An entry or a partial is gone; `evicted` for the sake of others."""
        if self._entries.pop(name, None) is not None:
            self._policy.remove(_key(name), evicted=evicted)
        self._partials.pop(name, None)

    def fits_beside(self, nbytes: int, staying: Iterable[str]) -> bool:
        """Would there be room if nothing but `staying` were left?"""
        every = self._entries | self._partials
        held = sum(every[name].nbytes for name in set(staying) if name in every)
        return held + nbytes <= self.nbytes

    def victims(self) -> Iterator[str]:
        """Who may be asked to go, the first to go first: partials serve nobody yet, so they do.

        Some of them are in use; whoever asks knows, and passes them over.
        """
        partials = sorted(self._partials, key=lambda name: self._partials[name].used_ns)
        yield from partials
        yield from [key.location for key in self._policy.ranked()]


def _gone(known: Stored, name: str, entries: Mapping[str, Stored]) -> bool:
    """Is it there no more, or another one in its place?"""
    return name not in entries or entries[name].nbytes != known.nbytes


def _key(name: str) -> AdapterKey:
    return AdapterKey(name, ())
