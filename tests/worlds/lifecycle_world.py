"""A world around the real lifecycle in which everything that can happen is one of `actions`.

The world plays driver, device and callers, one step at a time: it holds what is in flight. It is
small enough to be explored exhaustively, which `explore` does.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

from lorax_async import AdapterKey, FetchError, LoaderClosedError, TransferError
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileState,
    GroupSizes,
    SlotGrant,
    Waiter,
    WantedTier,
)
from lorax_async.lifecycle.commands import Command, CopyGroups
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle
from lorax_async.lifecycle.policies import GDSF, LFU, LRU, EvictionPolicy, PolicyName
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import LifecycleTimes
from lorax_async.runtime.host_tier import HostTier

AGE = 10.0
MIN_RESIDENCY = 5.0
ALIGNMENT = 64
Action = tuple[object, ...]  # The name of one of World's methods, and its arguments


class Violation(AssertionError):
    """The lifecycle did something that must never happen."""


def forbid(wrong: object, problem: str) -> None:
    if wrong:
        raise Violation(problem)


@dataclass(frozen=True)
class Setting:
    """What may happen in a world; each wish is (tier, foreground).

    `holdable` are the adapters that host memory can hold, and not only read ahead. `leases`,
    `pins` and `unloads` are how many there may be at once of one adapter.
    """

    wishes: tuple[tuple[WantedTier, bool], ...]
    sizes: tuple[tuple[int, ...], ...]
    slots: int = 1
    device_bytes: int = 128
    host_bytes: int = 0
    image_bytes: int = 0
    holdable: tuple[int, ...] = ()
    copies: int = 2
    run_bytes: int = 64
    policy: PolicyName = "lru"
    streaming: bool = True
    kernels: bool = True
    failures: bool = True
    withdrawals: bool = True
    lookups: bool = False
    ageing: bool = False
    min_residency: float = 0.0
    leases: int = 1
    clones: bool = False
    pins: int = 0
    unloads: int = 0
    closing: bool = True
    max_idle: int = 10
    forgets: bool = False

    @property
    def step(self) -> float:
        """Seconds that pass at once: wishes starve after one, or after two residencies."""
        return MIN_RESIDENCY + 1 if self.min_residency else AGE + 1

    @property
    def keys(self) -> tuple[AdapterKey, ...]:
        return _KEYS[: len(self.sizes)]

    @property
    def pace(self) -> LifecycleTimes:
        return LifecycleTimes(
            starvation_age=AGE, min_residency=self.min_residency, max_idle=self.max_idle
        )


_KEYS = tuple(AdapterKey(name, ()) for name in "abc")

POLICIES: dict[PolicyName, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": lambda: LFU(half_life=3),
    "gdsf": lambda: GDSF(max_uses=2),
}  # As they are, but that they forget soon: what they remember must be finite, and small


@dataclass
class World:
    setting: Setting
    lifecycle: Lifecycle
    now: float = 0.0
    fetches: dict[int, tuple[bool, frozenset[int], bool]] = field(default_factory=dict)
    """By adapter: header told, groups told, cancelled."""
    populating: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)  # Pages in host memory, until Released
    read_ahead: set[int] = field(default_factory=set)  # Populated where nothing can be held
    releasing: set[int] = field(default_factory=set)
    copies: dict[tuple[int, tuple[int, ...]], CopyGroups] = field(default_factory=dict)
    """In flight, by adapter and groups."""
    on_device: dict[int, frozenset[int]] = field(default_factory=dict)
    readable: dict[int, frozenset[int]] = field(default_factory=dict)
    content: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset in the page-locked memory → adapter and group whose bytes lie there in whole."""
    holder: dict[int, SlotGrant] = field(default_factory=dict)  # From TakeSlot to ClearColumn
    dirty: dict[int, SlotGrant] = field(default_factory=dict)  # Broken, and not zeroed yet
    wiping: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)  # Adapters that were told to be leaving
    resident_at: dict[int, float] = field(default_factory=dict)
    idle_leases: list[int] = field(default_factory=list)
    busy_leases: list[int] = field(default_factory=list)
    orphan_uses: list[int] = field(default_factory=list)  # Kernels that outlived their lease
    broken: set[int] = field(default_factory=set)
    pins: dict[int, int] = field(default_factory=dict)
    unloads: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, tuple[int, WantedTier, bool]] = field(default_factory=dict)
    """Waiter id → adapter, tier, foreground."""
    since: dict[int, float] = field(default_factory=dict)  # Of those who wait
    next_waiter: int = 0
    closed: bool = False
    host: HostTier = field(init=False)
    commands: deque[Command] = field(default_factory=deque)
    executing: bool = False
    judge: ClassVar[Callable[["World", Command], None]]
    """Checks a command and executes it; set by the explorer."""

    @classmethod
    def new(cls, setting: Setting) -> Self:
        new_policy = POLICIES[setting.policy]
        device = Residency(
            device_bytes=setting.device_bytes,
            alignment=ALIGNMENT,
            max_slots=setting.slots,
            copies=setting.copies,
            run_bytes=setting.run_bytes,
            policy=new_policy(),
        )
        images = ImageBudget(setting.image_bytes, ALIGNMENT, new_policy())
        world = cls(setting, Lifecycle(Budgets(device, new_policy(), images), setting.pace))
        world.host = world.new_host_tier()
        return world

    def new_host_tier(self) -> HostTier:
        return HostTier(
            self.setting.host_bytes, self.lifecycle, cast("Any", self), self.decide, level=AGE
        )

    def decide(self, _: AdapterKey, outcome: Callable[[], list[Command]]) -> None:
        """Execute what the lifecycle decides, as the driver does."""
        self.commands.extend(outcome())
        self.execute()

    def execute(self) -> None:
        """Execute the commands, unless that is being done; those they cause come last."""
        if self.executing:
            return
        self.executing = True
        while self.commands:
            self.judge(self.commands.popleft())
        self.executing = False

    @property
    def leased(self) -> list[int]:
        """The adapters of all leases, one entry per lease."""
        return self.idle_leases + self.busy_leases

    def is_complete(self, a: int) -> bool:
        return self.on_device.get(a) == frozenset(range(len(self.setting.sizes[a])))

    def life(self, a: int) -> AdapterState:
        return self.lifecycle.states[self.setting.keys[a]]

    def forget_content(self, a: int) -> None:
        """Forget the adapter's page-locked image: its bytes must not be used again."""
        for offset in [offset for offset, (owner, _) in self.content.items() if owner == a]:
            del self.content[offset]

    def require_complete(self, a: int) -> None:
        forbid(not self.is_complete(a), "resident before its last byte")

    def require_open(self, a: int) -> None:
        forbid(a in self.told or self.unloads.get(a), "a lease on an adapter that is leaving")

    def want(self, a: int, tier: WantedTier, foreground: bool) -> list[Command]:
        self.next_waiter += 1
        self.now += 1e-3
        self.waiting[self.next_waiter] = (a, tier, foreground)
        self.since[self.next_waiter] = self.now
        waiter = Waiter(self.next_waiter, tier, self.now, foreground)
        return self.lifecycle.want(self.setting.keys[a], waiter)

    def look_up(self, a: int) -> list[Command]:
        grant = self.lifecycle.take_lease(self.setting.keys[a])
        if grant is not None:
            self.require_complete(a)
            self.require_open(a)
            self.idle_leases.append(a)
        return []

    def withdraw(self, waiter: int) -> list[Command]:
        a, _, _ = self.waiting.pop(waiter)
        del self.since[waiter]
        return self.lifecycle.withdraw(self.setting.keys[a], waiter)

    def clone_lease(self, a: int) -> list[Command]:
        self.idle_leases.append(a)
        self.lifecycle.add_lease(self.setting.keys[a])
        return []

    def pin(self, a: int) -> list[Command]:
        must_go = self.unloads.get(a, 0) > 0 or self.closed or a in self.broken
        complete = self.is_complete(a)
        ordered = self.lifecycle.pin(self.setting.keys[a])
        pinned = ordered is not None
        forbid(pinned and (must_go or not complete), "a pin on what must go, or is not here")
        forbid(not pinned and not must_go and complete, "what may stay could not be pinned")
        if pinned:
            self.pins[a] = self.pins.get(a, 0) + 1
        return ordered or []

    def unpin(self, a: int) -> list[Command]:
        self.pins[a] -= 1
        return self.lifecycle.unpin(self.setting.keys[a], self.holder[a])

    def unload(self, a: int) -> list[Command]:
        self.unloads[a] = self.unloads.get(a, 0) + 1
        self.pins.pop(a, None)
        return self.lifecycle.unload(self.setting.keys[a])

    def give_up_unload(self, a: int) -> list[Command]:
        self.unloads[a] -= 1
        return self.lifecycle.withdraw_unload(self.setting.keys[a])

    def forget(self, a: int) -> list[Command]:
        return self.lifecycle.forget(self.setting.keys[a])

    def end_lease(self, a: int) -> list[Command]:
        self.idle_leases.remove(a)
        return self.lifecycle.end_lease(self.setting.keys[a])

    def start_kernel(self, a: int) -> list[Command]:
        self.idle_leases.remove(a)
        self.busy_leases.append(a)
        return []

    def end_kernel(self, a: int) -> list[Command]:
        self.busy_leases.remove(a)
        self.idle_leases.append(a)
        return []

    def end_lease_under_kernel(self, a: int) -> list[Command]:
        self.busy_leases.remove(a)
        self.orphan_uses.append(a)
        return self.lifecycle.end_lease(self.setting.keys[a], in_use=True)

    def end_orphan(self, a: int) -> list[Command]:
        self.orphan_uses.remove(a)
        return self.lifecycle.end_use(self.setting.keys[a])

    def age(self) -> list[Command]:
        """Advance the time; tick the lifecycle only when it asked for it."""
        self.now += self.setting.step
        due = self.lifecycle.next_tick
        if due is not None and due <= self.now:
            return self.lifecycle.tick(self.now)
        self.lifecycle.note_time(self.now)
        return []

    def close(self) -> list[Command]:
        self.closed = True
        self.pins.clear()
        return self.lifecycle.close(LoaderClosedError("ordered"))

    def header(self, a: int) -> list[Command]:
        self.fetches[a] = (True, *self.fetches[a][1:])
        sizes = self.setting.sizes[a]
        needs = GroupSizes(sizes, file_nbytes=sum(sizes), holdable=a in self.setting.holdable)
        return self.lifecycle.header_checked(*self._attempt(a), needs)

    def span(self, a: int, group: int) -> list[Command]:
        header, told, cancelled = self.fetches[a]
        self.fetches[a] = (header, told | {group}, cancelled)
        self.readable[a] = self.readable.get(a, frozenset()) | {group}
        return self.lifecycle.span_fetched(*self._attempt(a), group)

    def published(self, a: int) -> list[Command]:
        del self.fetches[a]
        self.readable[a] = frozenset(range(len(self.setting.sizes[a])))
        return self.lifecycle.published(*self._attempt(a))

    def fetch_failed(self, a: int) -> list[Command]:
        _, _, cancelled = self.fetches.pop(a)
        if a in self.holder and not cancelled:
            self.dirty[a] = self.holder[a]
        self.forget_content(a)
        return self.lifecycle.fetch_failed(*self._attempt(a), FetchError("ordered"))

    def populated(self, a: int) -> list[Command]:
        self.populating.discard(a)
        (self.held if a in self.setting.holdable else self.read_ahead).add(a)
        self.host.populated(self.setting.keys[a], None)
        return []

    def lost(self, a: int) -> list[Command]:
        """The file was lost, unless nothing is wanted of it any more."""
        self.populating.discard(a)
        if self.setting.keys[a] not in self.host.leaving:
            self.forget_content(a)
        self.host.populated(self.setting.keys[a], FetchError("ordered"))
        return []

    def released(self, a: int) -> list[Command]:
        for pages in (self.releasing, self.held, self.read_ahead):
            pages.discard(a)
        self.host.unmapped(self.setting.keys[a])
        return []

    def populate(self, key: AdapterKey, *, holdable: bool) -> None:
        """Begin to populate a file: one of the tasks of the host tier."""
        a = self.setting.keys.index(key)
        forbid(holdable != (a in self.setting.holdable), "held, but may change")
        forbid(self.closed, "populated after close")
        forbid(self.populating, "two are populated at once")
        forbid(a in self.releasing, "populated while it is released")
        forbid(a in self.held, "populated while it is held")
        forbid(self.unloads.get(a), "populated while it is unloaded")
        forbid(a in self.fetches or not self.readable.get(a), "populated without a file")
        self.read_ahead.discard(a)
        self.populating.add(a)

    def unmap(self, key: AdapterKey) -> None:
        """Begin to release a file's pages: the other task of the host tier."""
        a = self.setting.keys.index(key)
        forbid(a not in self.held | self.read_ahead, "released what is not held")
        forbid(a in self.releasing, "released twice")
        self.releasing.add(a)

    def copy_done(self, a: int, groups: tuple[int, ...], *others: CopyGroups) -> list[Command]:
        copy = self.copies.pop((a, groups))
        if copy.image is not None:
            self.content[copy.image.offset] = (a, groups[0])
        self.on_device[a] = self.on_device[a].union(*(run.groups for run in (copy, *others)))
        if self.is_complete(a):
            self.resident_at[a] = self.now
        return self.lifecycle.copy_done(copy, *others, fast=self.setting.run_bytes > 64)

    def copies_done(self, a: int, groups: tuple[int, ...], more: tuple[int, ...]) -> list[Command]:
        """End two runs of one adapter before the loop handles the first."""
        other = self.copies.pop((a, more))
        if other.image is not None:
            self.content[other.image.offset] = (a, more[0])
        return self.copy_done(a, groups, other)

    def copy_failed(self, a: int, groups: tuple[int, ...]) -> list[Command]:
        return self.lifecycle.copy_failed(self.copies.pop((a, groups)), TransferError("ordered"))

    def copy_lost(self, a: int, groups: tuple[int, ...]) -> list[Command]:
        copy = self.copies.pop((a, groups))
        self.forget_content(a)
        return self.lifecycle.copy_failed(copy, FetchError("ordered"), file_lost=True)

    def wiped(self, a: int) -> list[Command]:
        self.wiping.discard(a)
        del self.dirty[a]
        return self.lifecycle.wiped(self.setting.keys[a])

    def _attempt(self, a: int) -> tuple[AdapterKey, int]:
        return self.setting.keys[a], self.life(a).attempt


def actions(world: World) -> Iterator[Action]:
    setting = world.setting
    for a in range(len(setting.sizes)):
        if not world.closed:
            yield from _wishes(world, a)
        if world.unloads.get(a):
            yield ("give_up_unload", a)
        if world.pins.get(a):
            yield ("unpin", a)
    if setting.withdrawals:
        yield from (("withdraw", waiter) for waiter in world.waiting)
    yield from _outcomes(world)
    yield from _uses(world)
    passes = setting.ageing or setting.min_residency
    if passes and (world.waiting or world.lifecycle.next_tick is not None):
        yield ("age",)
    if setting.closing and not world.closed:
        yield ("close",)


def _wishes(world: World, a: int) -> Iterator[Action]:
    setting = world.setting
    if world.leased.count(a) < setting.leases:
        for tier, foreground in setting.wishes:
            if (a, tier, foreground) not in world.waiting.values():
                yield ("want", a, tier, foreground)
        if setting.lookups:
            yield ("look_up", a)
    if world.unloads.get(a, 0) < setting.unloads:
        yield ("unload", a)
    if setting.forgets:
        yield ("forget", a)


def _outcomes(world: World) -> Iterator[Action]:
    for a, (header, told, cancelled) in world.fetches.items():
        if world.setting.failures or cancelled:
            yield ("fetch_failed", a)
        untold = set(range(len(world.setting.sizes[a]))) - told
        if not header:
            yield ("header", a)
        elif not world.setting.streaming or not untold:
            yield ("published", a)
        else:
            yield from (("span", a, group) for group in untold)
    for a in world.populating:
        yield ("populated", a)
        if world.setting.failures:
            yield ("lost", a)
    yield from (("released", a) for a in world.releasing)
    yield from (("wiped", a) for a in world.wiping)
    for (a, groups), copy in world.copies.items():
        yield ("copy_done", a, groups)
        for b, more in world.copies:
            if a == b and groups < more:
                yield ("copies_done", a, groups, more)
        if world.setting.failures:
            yield ("copy_failed", a, groups)
            if not copy.warm and world.life(a).file in (FileState.PRESENT, FileState.ENDING):
                yield ("copy_lost", a, groups)


def _uses(world: World) -> Iterator[Action]:
    setting = world.setting
    for a in set(world.idle_leases):
        yield ("end_lease", a)
        used = world.busy_leases + world.orphan_uses
        if setting.kernels and a not in used and a not in world.broken:
            yield ("start_kernel", a)
        if world.pins.get(a, 0) < setting.pins:
            yield ("pin", a)
        if setting.clones and world.leased.count(a) < 2:
            yield ("clone_lease", a)
    for a in set(world.busy_leases):
        yield ("end_kernel", a)
        yield ("end_lease_under_kernel", a)
    for a in set(world.orphan_uses):
        yield ("end_orphan", a)


_TIERS = WantedTier.DEVICE, WantedTier.STREAM, WantedTier.HOST, WantedTier.DISK
DEVICE, STREAM, HOST, DISK = ((tier, True) for tier in _TIERS)
PREFETCHES = PREFETCH, PREFETCH_HOST, _ = [(tier, False) for tier in (_TIERS[0], *_TIERS[2:])]
UNEVEN, SMALL, ONE, THREE = ((64, 64), (64,)), ((64,), (64,)), ((64, 64),), ((64,), (64,), (64,))
RUNS = ((64, 64, 64), (64,))
BOTH = (0, 1)
WHOLES = "streaming kernels"  # Files come whole, without kernels
SOUND, QUIET = f"{WHOLES} failures", f"{WHOLES} closing"
ALONE = f"failures withdrawals {QUIET}"
HOSTED: dict[str, Any] = {"host_bytes": 64, "holdable": BOTH}
ROOMY = HOSTED | {"host_bytes": 128}
RESIDENT: dict[str, Any] = {"min_residency": MIN_RESIDENCY}


def _world(
    sizes: tuple[tuple[int, ...], ...], *wishes: tuple[WantedTier, bool], no: str = "", **more: Any
) -> Setting:
    """Return a world's setting; `no` names flags that are off in it."""
    flags: dict[str, Any] = dict.fromkeys(no.split(), False)
    return Setting(wishes, sizes, **flags, **more)


WHOLE = {
    "prefetch beside foreground": _world(SMALL, DEVICE, PREFETCH, no=QUIET),
    "two adapters, streaming leases": _world(UNEVEN, STREAM, no="kernels"),
    "two adapters, one slot": _world(UNEVEN, DEVICE),
    "an image between two slots": _world(SMALL, DEVICE, slots=2, image_bytes=64, no=WHOLES),
}  # Explored in whole by `make soak`

SETTINGS = {
    # Each twice: where callers give up and nothing fails, and the other way round.
    **{f"{name}, no failure": replace(it, failures=False) for name, it in WHOLE.items()},
    **{f"{name}, all wait": replace(it, withdrawals=False) for name, it in WHOLE.items()},
    "little is remembered": _world(UNEVEN, DEVICE, max_idle=0, no="streaming"),
    "populated and forgotten": _world(SMALL, HOST, DISK, max_idle=0, no="streaming"),
    "forgotten on demand": _world(
        ONE, DEVICE, HOST, host_bytes=128, holdable=(0,), unloads=1, forgets=True
    ),
    "runs of groups": _world(RUNS, DEVICE, device_bytes=192, run_bytes=128, no=f"{WHOLES} closing"),
    "runs that arrive": _world(RUNS[:1], DEVICE, STREAM, device_bytes=192, run_bytes=128),
    "one copy at a time": _world(UNEVEN, DEVICE, copies=1, no="streaming"),
    "two slots, bytes for one": _world(UNEVEN, DEVICE, slots=2, no="streaming"),
    "host and disk tiers": _world(ONE, HOST, DISK, DEVICE, no="kernels"),
    "lookups and ageing": _world(
        UNEVEN, DEVICE, lookups=True, ageing=True, leases=2, no="streaming"
    ),
    "too large": _world(UNEVEN, DEVICE, HOST, device_bytes=64, no="streaming withdrawals"),
    "whole and streaming wishes": _world(UNEVEN, DEVICE, STREAM, no=f"withdrawals {QUIET}"),
    "pins": _world(SMALL, DEVICE, pins=2, no=WHOLES),
    "pins and streams": _world(SMALL, STREAM, pins=1, no="kernels closing"),
    "pins and ageing": _world(SMALL, DEVICE, pins=1, ageing=True, leases=2, no=SOUND),
    "pins beside a second slot": _world(UNEVEN, DEVICE, slots=2, pins=1, no=SOUND),
    "pins of one of three": _world(THREE, DEVICE, slots=2, pins=1, no=ALONE),
    "pins and unload": _world(SMALL, DEVICE, pins=1, unloads=1, no=SOUND),
    "unload beside streams": _world(
        ONE, DEVICE, STREAM, unloads=2, clones=True, max_idle=0, no="kernels"
    ),
    "unload beside loads": _world(SMALL, DEVICE, unloads=1, no="streaming"),
    "host memory for one of two": _world(
        SMALL, PREFETCH_HOST, DEVICE, no=f"withdrawals {QUIET}", **HOSTED
    ),
    "host memory and unload": _world(ONE, HOST, DEVICE, unloads=1, no="streaming", **ROOMY),
    "some can be held": _world(THREE, HOST, unloads=1, no=ALONE, **HOSTED),
    "no host memory": _world(SMALL, PREFETCH_HOST, DEVICE, holdable=BOTH, no=QUIET),
    "prefetch targets": _world(((64,),), DEVICE, *PREFETCHES, unloads=1, no="kernels", **HOSTED),
    "images for one of two": _world(SMALL, DEVICE, image_bytes=64, max_idle=1, no=WHOLES),
    "images of two": _world(UNEVEN, DEVICE, image_bytes=192, no=SOUND),
    "images, unload and failures": _world(
        ONE, DEVICE, PREFETCH_HOST, image_bytes=128, unloads=1, no=WHOLES
    ),
    "minimum residency and starving": _world(SMALL, DEVICE, leases=2, no=WHOLES, **RESIDENT),
    "least often used": _world(SMALL, DEVICE, policy="lfu", no=ALONE),
    "cheapest to have back": _world(
        UNEVEN, DEVICE, policy="gdsf", image_bytes=128, no=f"{SOUND} closing", **ROOMY
    ),
    "minimum residency": _world(SMALL, DEVICE, PREFETCH, no=ALONE, **RESIDENT),
}

LARGER = {
    **WHOLE,
    "streaming and whole": _world(SMALL, DEVICE, STREAM),
    "streaming and kernels": _world(UNEVEN, STREAM),
    "prefetch": _world(UNEVEN, DEVICE, PREFETCH, no="kernels closing"),
    "three adapters": _world(THREE, DEVICE, ageing=True, no=QUIET),
    "pins and unload of three": _world(THREE, DEVICE, slots=2, pins=1, unloads=1, no=ALONE),
    "unload beside streams and kernels": _world(
        ONE, DEVICE, STREAM, unloads=2, clones=True, max_idle=0
    ),
    "every tier of two": _world(
        SMALL, DEVICE, PREFETCH_HOST, image_bytes=64, unloads=1, no=ALONE, **HOSTED
    ),
    "minimum residency and prefetch": _world(SMALL, DEVICE, PREFETCH, pins=1, no=QUIET, **RESIDENT),
    "least often used, and host memory": _world(
        SMALL, DEVICE, PREFETCH_HOST, policy="lfu", no=ALONE, **HOSTED
    ),
}
