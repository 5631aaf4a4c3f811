"""The commands that the lifecycle gives the driver, one adapter each."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Extent
from lorax_async.core.life import Grant
from lorax_async.errors import LoraxError


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
class Release(Command):
    """Let the file's pages go: answers Released."""

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
    """Move one group to its extent: answers CopyDone or CopyFailed.

    With an `image`, an extent of the page-locked memory, the group passes through there and stays;
    if it is `warm`, the group lies there already and no file is read.
    """

    grant: Grant
    group: int
    image: Extent | None = None
    warm: bool = False


@dataclass(frozen=True, slots=True)
class Wipe(Command):
    """Zero the extents of a slot that broke, which nobody reads any more: answers Wiped."""

    grant: Grant


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


@dataclass(frozen=True, slots=True)
class TellStays(Command):
    """The slot that was told to be leaving takes leases again."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class TellUnloaded(Command):
    """The adapter has left device and host memory."""
