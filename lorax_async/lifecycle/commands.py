"""The commands that the lifecycle returns to the driver, each for one adapter."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.errors import LoraxError
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.types import AdapterKey


@dataclass(frozen=True)
class Command:
    """An instruction to the driver."""

    key: AdapterKey


# -- files: the outcome carries the same `attempt` ------------------------------------------------


@dataclass(frozen=True)
class FileCommand(Command):
    attempt: int


class StartFetch(FileCommand):
    """Open, check and read the file.

    Outcomes: header_checked, span_fetched for each group, then published or fetch_failed.
    """


class CancelFetch(FileCommand):
    """Cancel the fetch, which has no waiter left. Outcome: published or fetch_failed."""


@dataclass(frozen=True)
class PopulatePages(FileCommand):
    """Keep the file's pages in memory. Outcome: populated, released or lost.

    If `demoted`, the adapter has left the device; else a waiter wants them.
    """

    demoted: bool


class ReleasePages(FileCommand):
    """Release the file's pages, or keep them no more. Outcome: released."""


class ForgetAdapter(Command):
    """Forget everything about the adapter."""


# -- slots -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotCommand(Command):
    grant: SlotGrant


@dataclass(frozen=True)
class TakeSlot(SlotCommand):
    """Occupy the granted slot. `since` is when the oldest waiter began to wait, in loop time."""

    since: float


@dataclass(frozen=True)
class CopyGroups(SlotCommand):
    """Copy a run of groups to their extents, in this order. Outcome: copy_done or copy_failed.

    `nbytes` is the size of their extents together. Of waiting runs, the one with the least `tag` is
    next. With an `image`, an extent of pinned host memory, the only group is staged there and
    stays. If `warm`, it is there already and no file is read.
    """

    groups: tuple[int, ...]
    nbytes: int
    tag: int = 0
    image: Extent | None = None
    warm: bool = False


class WipeExtents(SlotCommand):
    """Zero the extents of a broken slot that has no reader left. Outcome: wiped."""


class ClearColumn(SlotCommand):
    """Clear the slot's column. Later commands may reuse the slot and its extents."""


@dataclass(frozen=True)
class BreakSlot(SlotCommand):
    """Fail every lease on the slot with `error`: its bytes must not be used."""

    error: LoraxError


@dataclass(frozen=True)
class NotifyReady(SlotCommand):
    """Report that the groups below `watermark` are on the device."""

    watermark: int


class NotifyLeaving(SlotCommand):
    """Report that the slot takes no new lease."""


class NotifyStays(SlotCommand):
    """Report that a leaving slot takes leases again."""


# -- callers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServeWaiter(Command):
    """Complete a waiter; with `grant` it holds a lease."""

    waiter: int
    grant: SlotGrant | None


@dataclass(frozen=True)
class FailWaiters(Command):
    """Fail these waiters with `error`."""

    waiters: tuple[int, ...]
    error: LoraxError


class NotifyUnloaded(Command):
    """Report that the adapter has left device and host memory."""
