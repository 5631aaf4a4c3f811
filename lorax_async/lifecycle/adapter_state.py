"""The state of one adapter, and the waiters that want it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TypeVar

from lorax_async.errors import Stage
from lorax_async.events import SlotId
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.transitions import FileState, SlotState
from lorax_async.types import AdapterKey

_K = TypeVar("_K")

Urgency = tuple[bool, float]
"""Sorts queues: foreground first, then the oldest wish, where priority counts as age (seconds)."""


class WantedTier(IntEnum):
    """How far an adapter has to come before a waiter is served."""

    DISK = 0
    HOST = 1
    STREAM = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody who wants an adapter; `since` in seconds of the loop's clock."""

    id: int
    tier: WantedTier
    since: float
    foreground: bool = True
    priority: int = 0


_NOBODY: dict[int, Waiter] = {}
_NO_KINDS: dict[tuple[WantedTier, bool], int] = {}
_NO_PRIORITIES: dict[tuple[bool, int], int] = {}


class WaiterSet:
    """Waiters in the order in which they came, and how many there are of each kind."""

    __slots__ = ("_ahead", "_by_id", "_kinds", "_priorities")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Nobody waits for most adapters: they share what is empty, and is not written to."""
        self._by_id: dict[int, Waiter] = _NOBODY
        self._ahead: dict[int, Waiter] = _NOBODY
        self._kinds: dict[tuple[WantedTier, bool], int] = _NO_KINDS
        self._priorities: dict[tuple[bool, int], int] = _NO_PRIORITIES

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._by_id.values())

    def add(self, waiter: Waiter) -> None:
        if not self._by_id:
            self._by_id, self._ahead, self._kinds, self._priorities = {}, {}, {}, {}
        self._by_id[waiter.id] = waiter
        if waiter.foreground:
            self._ahead[waiter.id] = waiter
        _count(self._kinds, (waiter.tier, waiter.foreground), 1)
        _count(self._priorities, (waiter.foreground, waiter.priority), 1)

    def remove(self, waiter_id: int) -> bool:
        """Whether there was such a waiter."""
        waiter = self._by_id.pop(waiter_id, None)
        if waiter is None:
            return False
        if not self._by_id:
            self._clear()
            return True
        self._ahead.pop(waiter_id, None)
        _count(self._kinds, (waiter.tier, waiter.foreground), -1)
        _count(self._priorities, (waiter.foreground, waiter.priority), -1)
        return True

    @property
    def kinds(self) -> tuple[tuple[WantedTier, bool], ...]:
        """The (tier, foreground) that somebody waits for."""
        return tuple(self._kinds)

    def of_tiers(self, tiers: set[WantedTier]) -> list[Waiter]:
        return [waiter for waiter in self if waiter.tier in tiers]

    @property
    def for_slot(self) -> list[int]:
        """Ids of those who wait for the slot."""
        return [waiter.id for waiter in self.of_tiers({WantedTier.STREAM, WantedTier.DEVICE})]

    @property
    def has_foreground(self) -> bool:
        return bool(self._ahead)

    def has_tier(self, tier: WantedTier) -> bool:
        return (tier, True) in self._kinds or (tier, False) in self._kinds

    @property
    def oldest(self) -> float:
        """Since when somebody has been waiting, in the foreground if anybody is there.

        There must be a waiter.
        """
        return next(iter((self._ahead or self._by_id).values())).since

    def urgency(self, level: float) -> Urgency:
        """Of the adapter as a whole; each level of priority counts as `level` seconds of waiting.

        So a low priority waits longer, and not for ever.
        """
        foreground = self.has_foreground
        highest = max((p for ahead, p in self._priorities if ahead or not foreground), default=0)
        return not foreground, self.oldest - highest * level


def _count(counts: dict[_K, int], key: _K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]


RESTING = (FileState.ABSENT, FileState.PRESENT)
"""File states in which nothing is under way."""


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """What the checked header says of the layer groups, in layer order.

    `group_nbytes` the device must have room for; `file_order` are the groups as they come in the
    file, empty if that is layer order. `file_nbytes` a reload reads; `holdable` says
    whether the host tier would hold these bytes. `weight` is what remembering all this costs.
    """

    group_nbytes: tuple[int, ...]
    file_order: tuple[int, ...] = ()
    file_nbytes: int = 0
    holdable: bool = False
    weight: int = 1
    largest: int = field(init=False)
    """Bytes of the largest group."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest", max(self.group_nbytes, default=1))

    @property
    def held_nbytes(self) -> int:
        """What the host tier takes of its budget."""
        return self.file_nbytes if self.holdable else 0


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """A slot with its arena extents, one for each layer group, until the slot is free again."""

    slot: SlotId
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)


class HostState(Enum):
    """Of the file's bytes in host memory: an attribute of PRESENT, and of ENDING until it ends."""

    NONE = "none"
    POPULATING = "populating"
    HELD = "held"
    RELEASING = "releasing"


@dataclass(slots=True)
class AdapterState:
    """One adapter's file and slot.

    Sets of groups are bits: thousands of adapters are remembered, and a set would take kilobytes.
    `attempt` counts fetches. `fetched` are the groups whose bytes can be read; `submitted`,
    `copying` and `done` belong to the present grant, and `copy_turn` is its place among those that
    copy. A lease that ended under a running kernel is one of `uses` until the kernel is done.
    `image` are extents of page-locked host memory in which the groups in `imaged` lie as they do on
    the device. The slot is `broken` if its bytes must not be used, and `wiping` while they are
    zeroed. `leaving` was picked to make room; `unloads` callers wait for it to be gone; `told` says
    that its departure was told. `demoted` would go on in the host tier.
    """

    key: AdapterKey
    file: FileState = FileState.ABSENT
    host: HostState = HostState.NONE
    slot: SlotState = SlotState.NONE
    attempt: int = 0
    needs: GroupSizes | None = None
    fetch_running: bool = False
    fetched: int = 0
    grant: SlotGrant | None = None
    submitted: int = 0
    copying: int = 0
    copy_turn: int = 0
    done: int = 0
    watermark: int = 0
    resident_since: float = 0.0
    image: tuple[Extent, ...] | None = None
    imaged: int = 0
    leases: int = 0
    uses: int = 0
    pins: int = 0
    broken: bool = False
    wiping: bool = False
    leaving: bool = False
    unloads: int = 0
    told: bool = False
    demoted: bool = False
    waiters: WaiterSet = field(default_factory=WaiterSet)

    @property
    def groups(self) -> int:
        return len(self.needs.group_nbytes) if self.needs else 0

    @property
    def all_groups(self) -> int:
        """The bits of all groups."""
        return (1 << self.groups) - 1

    @property
    def has_arrived(self) -> bool:
        """All groups can be read."""
        return self.needs is not None and self.fetched == self.all_groups

    @property
    def departing(self) -> bool:
        """The slot takes no new lease and claims nothing."""
        return self.leaving or self.unloads > 0

    @property
    def has_interest(self) -> bool:
        """Somebody would miss the file if it went."""
        held = self.leases > 0 or self.pins > 0
        return bool(self.waiters) or (held and self.slot is not SlotState.DRAINING)

    @property
    def has_whole_image(self) -> bool:
        return self.image is not None and self.imaged == self.all_groups

    @property
    def in_host(self) -> bool:
        """Its bytes are in host memory, as far as that can be had."""
        return self.host is HostState.HELD or self.has_whole_image

    @property
    def at_rest(self) -> bool:
        """Nothing of it is under way, and it has no slot."""
        host_rests = self.host in (HostState.NONE, HostState.HELD)
        return self.slot is SlotState.NONE and self.file in RESTING and host_rests

    @property
    def is_idle(self) -> bool:
        """It could be forgotten: nobody waits, and it holds nothing of any budget."""
        wanted = self.waiters or self.unloads or self.demoted
        return self.at_rest and not wanted and not self.is_held and self.image is None

    @property
    def is_held(self) -> bool:
        """Its pages count in the budget, unlike those that were only read ahead."""
        holdable = self.needs is not None and self.needs.holdable
        return holdable and self.host is HostState.HELD

    @property
    def next_copy(self) -> int:
        """The group to be copied next, of those that can be read.

        Whoever streams uses the layers in their order. For whoever waits for all of them, the
        order of the file is the faster one: a disk reads ahead.
        """
        ready = self.fetched & ~self.submitted
        streams = self.leases > 0 or self.waiters.has_tier(WantedTier.STREAM)
        if streams or self.needs is None or not self.needs.file_order:
            return (ready & -ready).bit_length() - 1
        return next(group for group in self.needs.file_order if ready >> group & 1)

    @property
    def wants_slot(self) -> bool:
        """A foreground wish counts once the header is checked, a prefetch once the file is here."""
        if self.needs is None or self.unloads or self.file not in _OPENED:
            return False
        present = self.file is FileState.PRESENT
        return any(
            tier >= WantedTier.STREAM and (foreground or present)
            for tier, foreground in self.waiters.kinds
        )

    @property
    def wants_host(self) -> bool:
        """Somebody waits for the host tier, or it was demoted to it."""
        if self.file is not FileState.PRESENT or self.host is not HostState.NONE or self.unloads:
            return False
        return self.demoted or self.waiters.has_tier(WantedTier.HOST)

    @property
    def stage(self) -> Stage:
        """Where it is, in the words of errors and statistics."""
        if self.needs is None:
            return "fetch"
        if self.slot is SlotState.FILLING:
            awaited = self.file is FileState.FETCHING and not self.fetched & ~self.done
            return "fetch" if awaited else "copy"
        return "ready" if self.slot is SlotState.RESIDENT else "queue"

    def vacate(self) -> None:
        """Forget the grant."""
        self.grant = None
        self.submitted = self.done = 0
        self.watermark = self.copy_turn = self.pins = 0
        self.leaving = self.told = self.broken = self.wiping = False


_OPENED = (FileState.FETCHING, FileState.PRESENT)
