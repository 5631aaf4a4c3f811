"""The commands that the lifecycle gives the driver, one adapter each."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.errors import LoraxError
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.types import AdapterKey


@dataclass(frozen=True, slots=True)
class Command:
    """Something the driver must do; `attempt` comes back with the outcome."""

    key: AdapterKey


@dataclass(frozen=True, slots=True)
class StartFetch(Command):
    """Open, check and read: answers HeaderChecked, SpanFetched …, then Published or FetchFailed."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelFetch(Command):
    """Nobody wants the file any more; the fetch still answers."""

    attempt: int


@dataclass(frozen=True, slots=True)
class PopulatePages(Command):
    """Bring the file's pages into memory: answers Populated or Lost."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReleasePages(Command):
    """Let the file's pages go: answers Released."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DropFile(Command):
    """The file is not kept."""


@dataclass(frozen=True, slots=True)
class ForgetAdapter(Command):
    """Nothing is known of the adapter any more."""


@dataclass(frozen=True, slots=True)
class TakeSlot(Command):
    """The adapter has its slot and extents, wanted since then (seconds of the loop's clock)."""

    grant: SlotGrant
    since: float


@dataclass(frozen=True, slots=True)
class CopyGroup(Command):
    """Move one group to its extent: answers CopyDone or CopyFailed.

    With an `image`, an extent of the page-locked memory, the group passes through there and stays;
    if it is `warm`, the group lies there already and no file is read.
    """

    grant: SlotGrant
    group: int
    image: Extent | None = None
    warm: bool = False


@dataclass(frozen=True, slots=True)
class WipeExtents(Command):
    """Zero the extents of a slot that broke, which nobody reads any more: answers Wiped."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class ClearColumn(Command):
    """The slot's column names nobody from here on; what comes next may reuse slot and extents."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class ServeWaiter(Command):
    """A waiter's wish came true; with `grant` it holds a lease."""

    waiter: int
    grant: SlotGrant | None


@dataclass(frozen=True, slots=True)
class FailWaiters(Command):
    """These waiters get `error`."""

    waiters: tuple[int, ...]
    error: LoraxError


@dataclass(frozen=True, slots=True)
class BreakSlot(Command):
    """What the slot holds must not be used; whoever has a lease on it is told."""

    grant: SlotGrant
    error: LoraxError


@dataclass(frozen=True, slots=True)
class NotifyReady(Command):
    """The groups below `watermark` are on the device; `last` if these are all."""

    grant: SlotGrant
    watermark: int
    last: bool


@dataclass(frozen=True, slots=True)
class NotifyLeaving(Command):
    """The slot takes no new lease."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class NotifyStays(Command):
    """The slot that was told to be leaving takes leases again."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class NotifyUnloaded(Command):
    """The adapter has left device and host memory."""
