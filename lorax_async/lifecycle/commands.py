"""The commands that the lifecycle returns to the driver, each for one adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.errors import LoraxError
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.types import AdapterKey


@dataclass(frozen=True, slots=True)
class Command:
    """An instruction to the driver. Its outcome carries the same `attempt`."""

    key: AdapterKey


@dataclass(frozen=True, slots=True)
class StartFetch(Command):
    """Open, check and read the file.

    Outcomes: header_checked, span_fetched for each group, then published or fetch_failed.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelFetch(Command):
    """Cancel the fetch, which has no waiter left. Outcome: published or fetch_failed."""

    attempt: int


@dataclass(frozen=True, slots=True)
class PopulatePages(Command):
    """Read the file's pages into memory. Outcome: populated or lost."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReleasePages(Command):
    """Release the file's pages. Outcome: released."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DropFile(Command):
    """Close the file; it is not kept."""


@dataclass(frozen=True, slots=True)
class ForgetAdapter(Command):
    """Forget everything about the adapter."""


@dataclass(frozen=True, slots=True)
class TakeSlot(Command):
    """Occupy the granted slot. `since` is when the oldest waiter began to wait, in loop time."""

    grant: SlotGrant
    since: float


@dataclass(frozen=True, slots=True)
class CopyGroup(Command):
    """Copy one group to its extent. Outcome: copy_done or copy_failed.

    With an `image`, an extent of pinned host memory, the group is staged there and stays. If
    `warm`, it is there already and no file is read.
    """

    grant: SlotGrant
    group: int
    image: Extent | None = None
    warm: bool = False


@dataclass(frozen=True, slots=True)
class WipeExtents(Command):
    """Zero the extents of a broken slot that has no reader left. Outcome: wiped."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class ClearColumn(Command):
    """Clear the slot's column. Later commands may reuse the slot and its extents."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class ServeWaiter(Command):
    """Complete a waiter; with `grant` it holds a lease."""

    waiter: int
    grant: SlotGrant | None


@dataclass(frozen=True, slots=True)
class FailWaiters(Command):
    """Fail these waiters with `error`."""

    waiters: tuple[int, ...]
    error: LoraxError


@dataclass(frozen=True, slots=True)
class BreakSlot(Command):
    """Fail every lease on the slot with `error`: its bytes must not be used."""

    grant: SlotGrant
    error: LoraxError


@dataclass(frozen=True, slots=True)
class NotifyReady(Command):
    """Report that the groups below `watermark` are on the device; `last` if that is all of them."""

    grant: SlotGrant
    watermark: int
    last: bool


@dataclass(frozen=True, slots=True)
class NotifyLeaving(Command):
    """Report that the slot takes no new lease."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class NotifyStays(Command):
    """Report that a leaving slot takes leases again."""

    grant: SlotGrant


@dataclass(frozen=True, slots=True)
class NotifyUnloaded(Command):
    """Report that the adapter has left device and host memory."""
