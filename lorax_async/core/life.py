"""What the lifecycle knows of one adapter, and the commands it gives the driver about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Extent
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier, Waiters
from lorax_async.errors import LoraxError
from lorax_async.events import SlotId


@dataclass(frozen=True, slots=True)
class Needs:
    """What the checked header says of the layer groups, in layer order.

    `group_nbytes` the device must have room for; `file_place` is where each stands among the others
    in the file, empty if they stand as they come; `weight` is what remembering all this costs.
    """

    group_nbytes: tuple[int, ...]
    file_place: tuple[int, ...] = ()
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot with its arena extents, one for each layer group, until the slot is free again."""

    slot: SlotId
    extents: tuple[Extent, ...]


@dataclass(slots=True)
class Life:
    """One adapter's file and slot.

    `attempt` counts fetches. `fetched` are the groups whose bytes can be read; `submitted`,
    `copying` and `done` belong to the present grant. A lease that ended under a running kernel is
    one of `uses` until the kernel is done.
    """

    key: AdapterKey
    file: FileState = FileState.ABSENT
    slot: SlotState = SlotState.NONE
    attempt: int = 0
    needs: Needs | None = None
    fetch_running: bool = False
    fetched: set[int] = field(default_factory=set)
    populating: bool = False
    populated: bool = False
    grant: Grant | None = None
    submitted: set[int] = field(default_factory=set)
    copying: int = 0
    done: set[int] = field(default_factory=set)
    watermark: int = 0
    leases: int = 0
    uses: int = 0
    leaving: bool = False
    waiters: Waiters = field(default_factory=Waiters)

    @property
    def groups(self) -> int:
        return len(self.needs.group_nbytes) if self.needs else 0

    @property
    def has_interest(self) -> bool:
        """Somebody would miss the file if it went."""
        return bool(self.waiters) or (self.leases > 0 and self.slot is not SlotState.DRAINING)

    @property
    def next_copy(self) -> int:
        """The group to be copied next, of those that can be read.

        Whoever streams uses the layers in their order. For whoever waits for all of them, the
        order of the file is the faster one: a disk reads ahead.
        """
        ready = self.fetched - self.submitted
        streams = self.leases > 0 or self.waiters.has_tier(Tier.STREAM)
        if streams or self.needs is None or not self.needs.file_place:
            return min(ready)
        return min(ready, key=self.needs.file_place.__getitem__)

    @property
    def wants_slot(self) -> bool:
        """A foreground wish counts once the header is checked, a prefetch once the file is here."""
        if self.needs is None or self.file not in (FileState.FETCHING, FileState.PRESENT):
            return False
        present = self.file is FileState.PRESENT
        return any(
            tier >= Tier.STREAM and (foreground or present)
            for tier, foreground in self.waiters.kinds
        )


@dataclass(frozen=True, slots=True)
class Command:
    """Something the driver must do; `attempt` comes back with the outcome."""

    key: AdapterKey


@dataclass(frozen=True, slots=True)
class Fetch(Command):
    """Open, check and read: answers HeaderChecked, SpanFetched …, then Published or FetchFailed."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelFetch(Command):
    """Nobody wants the file any more; the fetch still answers."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Populate(Command):
    """Bring the file's pages into memory: answers Populated or Lost."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Drop(Command):
    """The file is not kept."""


@dataclass(frozen=True, slots=True)
class Forget(Command):
    """Nothing is known of the adapter any more."""


@dataclass(frozen=True, slots=True)
class TakeSlot(Command):
    """The adapter has its slot and extents, wanted since then (seconds of the loop's clock)."""

    grant: Grant
    since: float


@dataclass(frozen=True, slots=True)
class Copy(Command):
    """Move one group to its extent: answers CopyDone or CopyFailed."""

    grant: Grant
    group: int


@dataclass(frozen=True, slots=True)
class ClearColumn(Command):
    """The slot's column names nobody from here on; what comes next may reuse slot and extents."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Serve(Command):
    """A waiter's wish came true; with `grant` it holds a lease."""

    waiter: int
    grant: Grant | None


@dataclass(frozen=True, slots=True)
class Fail(Command):
    """These waiters get `error`."""

    waiters: tuple[int, ...]
    error: LoraxError


@dataclass(frozen=True, slots=True)
class BreakSlot(Command):
    """What the slot holds must not be used; whoever has a lease on it is told."""

    grant: Grant
    error: LoraxError


@dataclass(frozen=True, slots=True)
class TellReady(Command):
    """The groups below `watermark` are on the device; `last` if these are all."""

    grant: Grant
    watermark: int
    last: bool


@dataclass(frozen=True, slots=True)
class TellLeaving(Command):
    """The slot takes no new lease."""

    grant: Grant
