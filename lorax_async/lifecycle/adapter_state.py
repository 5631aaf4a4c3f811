"""The two tables of moves, the state of one adapter, and the waiters that want it.

The tables have every legal step of an adapter's file and of its slot. The driver reports outcomes;
`Lifecycle` alone makes decisions. A move without a row raises and changes nothing. The state
diagrams in docs/architecture.md are generated from these tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TypeVar

from lorax_async.errors import InvalidTransitionError, Stage
from lorax_async.events import SlotId
from lorax_async.lifecycle.arena import Extent
from lorax_async.types import AdapterKey


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
        raise _unknown_move("file", state, move) from None


def next_slot_state(state: SlotState, move: SlotMove) -> SlotState:
    """Return the slot state after `move`. Raises `InvalidTransitionError` if there is none."""
    try:
        return SLOT_MOVES[state, move]
    except KeyError:
        raise _unknown_move("slot", state, move) from None


def _unknown_move(what: str, state: Enum, move: Enum) -> InvalidTransitionError:
    return InvalidTransitionError(f"no move {move.value!r} for a {what} that is {state.value}")


_K = TypeVar("_K")

Urgency = tuple[bool, float]
"""The sort key of queues: foreground first, then the longest wait (loop time less priority)."""


class WantedTier(IntEnum):
    """How near an adapter must be before a waiter is served."""

    DISK = 0
    HOST = 1
    STREAM = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Waiter:
    """One call that waits for an adapter, `since` a time of the loop's clock in seconds.

    `beside` are the other adapters of its prefetch, which must not make room for this one. If it
    `preempts`, a leased adapter makes room for it once it starves.
    """

    id: int
    tier: WantedTier
    since: float
    foreground: bool = True
    priority: int = 0
    beside: Collection[AdapterKey] = field(default=(), compare=False)
    preempts: bool = True


_NO_WAITERS: dict[int, Waiter] = {}
_NO_KINDS: dict[tuple[WantedTier, bool], int] = {}
_NO_PRIORITIES: dict[tuple[bool, int], int] = {}


class WaiterSet:
    """Waiters in order of arrival, with a count of each kind; `foreground` has some of them."""

    __slots__ = ("_by_id", "_kinds", "_priorities", "foreground")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Share the empty dicts, which are never written: most adapters have no waiter."""
        self._by_id: dict[int, Waiter] = _NO_WAITERS
        self.foreground: dict[int, Waiter] = _NO_WAITERS
        self._kinds: dict[tuple[WantedTier, bool], int] = _NO_KINDS
        self._priorities: dict[tuple[bool, int], int] = _NO_PRIORITIES

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._by_id.values())

    def add(self, waiter: Waiter) -> None:
        if not self._by_id:
            self._by_id, self.foreground, self._kinds, self._priorities = {}, {}, {}, {}
        self._by_id[waiter.id] = waiter
        if waiter.foreground:
            self.foreground[waiter.id] = waiter
        _count(self._kinds, (waiter.tier, waiter.foreground), 1)
        _count(self._priorities, (waiter.foreground, waiter.priority), 1)

    def remove(self, waiter_id: int) -> bool:
        """Return whether the waiter existed."""
        waiter = self._by_id.pop(waiter_id, None)
        if waiter is None:
            return False
        if not self._by_id:
            self._clear()
            return True
        self.foreground.pop(waiter_id, None)
        _count(self._kinds, (waiter.tier, waiter.foreground), -1)
        _count(self._priorities, (waiter.foreground, waiter.priority), -1)
        return True

    @property
    def kinds(self) -> tuple[tuple[WantedTier, bool], ...]:
        """The distinct (tier, foreground) pairs of the waiters."""
        return tuple(self._kinds)

    def of_tiers(self, tiers: set[WantedTier]) -> list[Waiter]:
        return [waiter for waiter in self if waiter.tier in tiers]

    @property
    def slot_waiter_ids(self) -> list[int]:
        """Ids of the waiters that need a slot."""
        return [waiter.id for waiter in self.of_tiers({WantedTier.STREAM, WantedTier.DEVICE})]

    def has_tier(self, tier: WantedTier) -> bool:
        return (tier, True) in self._kinds or (tier, False) in self._kinds

    @property
    def oldest(self) -> float:
        """The start of the longest wait, among foreground waiters if there are any.

        There must be a waiter.
        """
        return next(iter((self.foreground or self._by_id).values())).since

    @property
    def oldest_preempting(self) -> float:
        """The start of the longest wait of a foreground waiter that preempts; `inf` without one."""
        preempting = (waiter for waiter in self.foreground.values() if waiter.preempts)
        first = next(preempting, None)
        return float("inf") if first is None else first.since

    @property
    def spared(self) -> Collection[AdapterKey]:
        """The adapters that must not make room: those of a prefetch, if it alone waits."""
        if len(self._by_id) != 1:
            return ()
        return next(iter(self)).beside

    def urgency(self, level: float) -> Urgency:
        """Return the adapter's sort key; one level of priority equals `level` seconds of waiting.

        A low priority therefore waits longer, but not forever.
        """
        foreground = bool(self.foreground)
        highest = max((p for ahead, p in self._priorities if ahead or not foreground), default=0)
        return not foreground, self.oldest - highest * level


def _count(counts: dict[_K, int], key: _K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """The sizes of an adapter's layer groups, from its checked header."""

    group_nbytes: tuple[int, ...]
    """Bytes of each group on the device, in layer order."""
    file_order: tuple[int, ...] = ()
    """The groups in file order; empty if that is layer order."""
    file_nbytes: int = 0
    """Bytes that a reload reads."""
    holdable: bool = False
    """Whether the host tier can hold the file's bytes."""
    weight: int = 1
    """The memory cost of remembering the plan, in rows."""
    largest: int = field(init=False)
    """Bytes of the largest group."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest", max(self.group_nbytes, default=1))


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """A slot with its arena extents, one per layer group. Valid until the slot is free again."""

    slot: SlotId
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum([extent.nbytes for extent in self.extents])


class HostState(Enum):
    """The state of the file's pages in host memory.

    WANTED from an eviction until the file is PRESENT; POPULATING from the command to the host tier
    to its outcome, also while the file waits for its turn.
    """

    NONE = "none"
    WANTED = "wanted"
    POPULATING = "populating"
    HELD = "held"
    RELEASING = "releasing"


@dataclass(slots=True)
class AdapterState:
    """The state of one adapter's file and slot.

    Sets of groups are bit masks, because thousands of adapters are remembered and a set takes
    kilobytes.
    """

    key: AdapterKey
    file: FileState = FileState.ABSENT
    host: HostState = HostState.NONE
    slot: SlotState = SlotState.NONE
    attempt: int = 0  # counts fetches; outcomes of earlier attempts are ignored
    needs: GroupSizes | None = None
    fetch_running: bool = False
    fetched: int = 0  # groups whose bytes can be read
    grant: SlotGrant | None = None
    submitted: int = 0  # groups of this grant
    copying: int = 0  # the number of runs of groups in flight
    copying_bytes: int = 0  # the bytes of their groups on the device
    is_fast: bool = False  # its bytes seem to be in memory, or the last copy was as fast
    service_tag: int = 0  # the position in the fair queue of copies, in bytes
    done: int = 0  # groups that were copied
    watermark: int = 0
    resident_since: float = 0.0
    image: tuple[Extent, ...] | None = None  # of pinned host memory
    imaged: int = 0  # groups that are stored in the image, as on the device
    leases: int = 0
    uses: int = 0  # computations that outlive the lease they began under
    pins: int = 0
    broken: bool = False  # the slot's bytes must not be used
    wiping: bool = False  # they are being zeroed
    leaving: bool = False  # the policy picked the slot for eviction
    unloads: int = 0  # callers that wait until the adapter is unloaded
    leave_notified: bool = False  # `NotifyLeaving` was issued
    waiters: WaiterSet = field(default_factory=WaiterSet)

    @property
    def all_groups(self) -> int:
        """The bit mask of all groups."""
        return (1 << len(self.needs.group_nbytes)) - 1 if self.needs else 0

    @property
    def has_arrived(self) -> bool:
        """Whether all groups can be read."""
        return self.needs is not None and self.fetched == self.all_groups

    @property
    def departing(self) -> bool:
        """Whether the slot is to be freed: it takes no new lease."""
        return self.leaving or self.unloads > 0

    @property
    def has_interest(self) -> bool:
        """Whether a waiter, lease or pin needs the file."""
        held = self.leases > 0 or self.pins > 0
        return bool(self.waiters) or (held and self.slot is not SlotState.DRAINING)

    @property
    def has_whole_image(self) -> bool:
        return self.image is not None and self.imaged == self.all_groups

    @property
    def in_host(self) -> bool:
        """Whether the bytes are in host memory, pinned or as file pages."""
        return self.host is HostState.HELD or self.has_whole_image

    @property
    def at_rest(self) -> bool:
        """Whether the adapter has no slot and no work in flight."""
        file_rests = self.file in (FileState.ABSENT, FileState.PRESENT)
        host_rests = self.host in (HostState.NONE, HostState.HELD)
        return self.slot is SlotState.NONE and file_rests and host_rests

    @property
    def is_idle(self) -> bool:
        """Whether the adapter can be forgotten: it has no waiter and uses no budget."""
        wanted = self.waiters or self.unloads
        return self.at_rest and not wanted and not self.is_held and self.image is None

    @property
    def takes_memory(self) -> bool:
        """Whether it has, or is about to take, memory of the device or the host."""
        in_use = self.slot is not SlotState.NONE or self.host is not HostState.NONE
        return in_use or self.image is not None

    @property
    def is_held(self) -> bool:
        """Whether its pages count in the host budget; pages that were only read ahead do not."""
        holdable = self.needs is not None and self.needs.holdable
        return holdable and self.host is HostState.HELD

    @property
    def streams(self) -> bool:
        """Whether a caller uses, or will use, the layers one by one as they arrive."""
        return self.leases > 0 or self.waiters.has_tier(WantedTier.STREAM)

    def next_copies(self, count: int, nbytes: int) -> tuple[int, ...]:
        """Return groups to copy next, among those that can be read, in the order to copy them.

        They are one or more, at most `count` and at most `nbytes` together. Streaming needs layer
        order. Otherwise file order is faster, because disks read ahead.
        """
        assert self.needs is not None
        sizes, ready = self.needs.group_nbytes, self.fetched & ~self.submitted
        order = () if self.streams else self.needs.file_order
        groups: list[int] = []
        for group in order or range(len(sizes)):
            if ready >> group & 1:
                nbytes -= sizes[group]
                if groups and nbytes < 0:
                    break
                groups.append(group)
                if len(groups) == count:
                    break
        return tuple(groups)

    @property
    def wants_slot(self) -> bool:
        """Whether a waiter needs a slot: foreground once checked, prefetch once PRESENT."""
        present = self.file is FileState.PRESENT
        opened = present or self.file is FileState.FETCHING
        if self.needs is None or self.unloads or not opened:
            return False
        return any(
            tier >= WantedTier.STREAM and (foreground or present)
            for tier, foreground in self.waiters.kinds
        )

    @property
    def stage(self) -> Stage:
        """The stage of the load, as errors and statistics name it."""
        if self.needs is None:
            return "fetch"
        if self.slot is SlotState.FILLING:
            awaited = self.file is FileState.FETCHING and not self.fetched & ~self.done
            return "fetch" if awaited else "copy"
        if self.slot is SlotState.RESIDENT:
            return "ready"
        return "fetch" if self.file is FileState.FETCHING and not self.wants_slot else "queue"

    def vacate(self) -> None:
        """Reset everything that belongs to the grant."""
        self.grant = None
        self.submitted = self.done = 0
        self.watermark = self.service_tag = self.pins = 0
        self.leaving = self.leave_notified = self.broken = self.wiping = False
