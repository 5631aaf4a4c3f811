"""A world around the real lifecycle in which everything that can happen is one of `actions`.

The world plays driver, device and callers: it holds what is in flight and judges every command. It
is small enough to be explored exhaustively, which `explore` does.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lorax_async.adapter import AdapterKey
from lorax_async.core import life as words
from lorax_async.core.life import Life, Needs
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.residency import Residency
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier, Waiter, Waiters
from lorax_async.errors import FetchError, LoaderClosedError, TransferError

AGE = 10.0
Action = tuple[object, ...]


class Violation(AssertionError):
    """The lifecycle did something that must never happen."""


@dataclass(frozen=True)
class Setting:
    """What may happen in a world; each wish is (tier, foreground)."""

    wishes: tuple[tuple[Tier, bool], ...]
    sizes: tuple[tuple[int, ...], ...] = ((64, 64), (64, 64))
    slots: int = 1
    device_bytes: int = 128
    copies: int = 2
    streaming: bool = True
    kernels: bool = True
    lookups: bool = False
    ageing: bool = False
    leases: int = 1
    closing: bool = True
    max_idle: int = 10


@dataclass
class World:
    setting: Setting
    lifecycle: Lifecycle
    now: float = 0.0
    fetches: dict[int, tuple[bool, frozenset[int], bool]] = field(default_factory=dict)
    """By adapter: header told, groups told, cancelled."""
    populating: set[int] = field(default_factory=set)
    copies: set[tuple[int, int]] = field(default_factory=set)
    on_device: dict[int, frozenset[int]] = field(default_factory=dict)
    readable: dict[int, frozenset[int]] = field(default_factory=dict)
    holder: dict[int, int] = field(default_factory=dict)
    """Slot index → adapter, from TakeSlot to ClearColumn."""
    idle_leases: list[int] = field(default_factory=list)
    busy_leases: list[int] = field(default_factory=list)
    orphan_uses: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    waiting: dict[int, tuple[int, Tier, bool]] = field(default_factory=dict)
    """Waiter id → adapter, tier, foreground."""
    next_waiter: int = 0
    closed: bool = False


def keys(setting: Setting) -> list[AdapterKey]:
    return [AdapterKey(name, ()) for name in "abc"[: len(setting.sizes)]]


def new_world(setting: Setting) -> World:
    residency = Residency(
        device_bytes=setting.device_bytes,
        alignment=64,
        max_slots=setting.slots,
        copies=setting.copies,
    )
    return World(setting, Lifecycle(residency, starvation_age=AGE, max_idle=setting.max_idle))


# -- what can happen ------------------------------------------------------------------------------


def actions(world: World) -> Iterator[Action]:
    setting = world.setting
    for a in range(len(setting.sizes)):
        held = world.idle_leases + world.busy_leases
        if not world.closed and held.count(a) < setting.leases:
            for tier, foreground in setting.wishes:
                if (a, tier, foreground) not in world.waiting.values():
                    yield ("want", a, tier, foreground)
            if setting.lookups:
                yield ("look up", a)
        if a in world.fetches:
            yield from _fetch_outcomes(world, a)
        if a in world.populating:
            yield ("populated", a)
            yield ("lost", a)
    for waiter in world.waiting:
        yield ("withdraw", waiter)
    for a, group in world.copies:
        yield ("copy done", a, group)
        yield ("copy failed", a, group)
        if world.lifecycle.lives[keys(setting)[a]].file in (FileState.PRESENT, FileState.ENDING):
            yield ("copy lost", a, group)
    for a in set(world.idle_leases):
        yield ("end lease", a)
        used = world.busy_leases + world.orphan_uses
        if setting.kernels and a not in used and a not in world.broken:
            yield ("start kernel", a)
    for a in set(world.busy_leases):
        yield ("end kernel", a)
        yield ("end lease under kernel", a)
    for a in set(world.orphan_uses):
        yield ("end orphan", a)
    if setting.ageing and world.lifecycle.next_tick is not None:
        yield ("age",)
    if setting.closing and not world.closed:
        yield ("close",)


def _fetch_outcomes(world: World, a: int) -> Iterator[Action]:
    header, told, _ = world.fetches[a]
    yield ("fetch failed", a)
    if not header:
        yield ("header", a)
        return
    groups = len(world.setting.sizes[a])
    if world.setting.streaming:
        yield from (("span", a, g) for g in range(groups) if g not in told)
        if len(told) == groups:
            yield ("published", a)
    else:
        yield ("published", a)


def perform(world: World, action: Action) -> None:
    """Let `action` happen, and check everything the lifecycle answers."""
    name, args = str(action[0]), action[1:]
    handler: Callable[..., list[words.Command]] = _HANDLERS[name]
    _obey(world, handler(world, *args))
    _check(world)


def _key(world: World, a: int) -> AdapterKey:
    return keys(world.setting)[a]


def _attempt(world: World, a: int) -> int:
    return world.lifecycle.lives[_key(world, a)].attempt


def _want(world: World, a: int, tier: Tier, foreground: bool) -> list[words.Command]:
    world.next_waiter += 1
    world.now += 1e-3
    world.waiting[world.next_waiter] = (a, tier, foreground)
    waiter = Waiter(world.next_waiter, tier, world.now, foreground)
    return world.lifecycle.want(_key(world, a), waiter)


def _look_up(world: World, a: int) -> list[words.Command]:
    grant = world.lifecycle.take_lease(_key(world, a))
    if grant is not None:
        _require_complete(world, a)
        if world.lifecycle.lives[_key(world, a)].leaving:
            raise Violation("a lease on an adapter that is leaving")
        world.idle_leases.append(a)
    return []


def _withdraw(world: World, waiter: int) -> list[words.Command]:
    a, _, _ = world.waiting.pop(waiter)
    return world.lifecycle.withdraw(_key(world, a), waiter)


def _header(world: World, a: int) -> list[words.Command]:
    world.fetches[a] = (True, *world.fetches[a][1:])
    needs = Needs(world.setting.sizes[a])
    return world.lifecycle.header_checked(_key(world, a), _attempt(world, a), needs)


def _span(world: World, a: int, group: int) -> list[words.Command]:
    header, told, cancelled = world.fetches[a]
    world.fetches[a] = (header, told | {group}, cancelled)
    world.readable[a] = world.readable.get(a, frozenset()) | {group}
    return world.lifecycle.span_fetched(_key(world, a), _attempt(world, a), group)


def _published(world: World, a: int) -> list[words.Command]:
    del world.fetches[a]
    world.readable[a] = frozenset(range(len(world.setting.sizes[a])))
    return world.lifecycle.published(_key(world, a), _attempt(world, a))


def _fetch_failed(world: World, a: int) -> list[words.Command]:
    del world.fetches[a]
    return world.lifecycle.fetch_failed(_key(world, a), _attempt(world, a), FetchError("ordered"))


def _populated(world: World, a: int) -> list[words.Command]:
    world.populating.discard(a)
    return world.lifecycle.populated(_key(world, a), _attempt(world, a))


def _lost(world: World, a: int) -> list[words.Command]:
    world.populating.discard(a)
    return world.lifecycle.lost(_key(world, a), _attempt(world, a), FetchError("ordered"))


def _copy_done(world: World, a: int, group: int) -> list[words.Command]:
    world.copies.discard((a, group))
    world.on_device[a] = world.on_device[a] | {group}
    return world.lifecycle.copy_done(_key(world, a), group)


def _copy_failed(world: World, a: int, group: int) -> list[words.Command]:
    world.copies.discard((a, group))
    return world.lifecycle.copy_failed(_key(world, a), TransferError("ordered"))


def _copy_lost(world: World, a: int, group: int) -> list[words.Command]:
    world.copies.discard((a, group))
    return world.lifecycle.copy_failed(_key(world, a), FetchError("ordered"), file_lost=True)


def _end_lease(world: World, a: int) -> list[words.Command]:
    world.idle_leases.remove(a)
    return world.lifecycle.end_lease(_key(world, a))


def _start_kernel(world: World, a: int) -> list[words.Command]:
    world.idle_leases.remove(a)
    world.busy_leases.append(a)
    return []


def _end_kernel(world: World, a: int) -> list[words.Command]:
    world.busy_leases.remove(a)
    world.idle_leases.append(a)
    return []


def _end_lease_under_kernel(world: World, a: int) -> list[words.Command]:
    world.busy_leases.remove(a)
    world.orphan_uses.append(a)
    return world.lifecycle.end_lease(_key(world, a), in_use=True)


def _end_orphan(world: World, a: int) -> list[words.Command]:
    world.orphan_uses.remove(a)
    return world.lifecycle.end_use(_key(world, a))


def _age(world: World) -> list[words.Command]:
    world.now += AGE + 1
    return world.lifecycle.tick(world.now)


def _close(world: World) -> list[words.Command]:
    world.closed = True
    return world.lifecycle.close(LoaderClosedError("ordered"))


_HANDLERS: dict[str, Callable[..., list[words.Command]]] = {
    "want": _want,
    "look up": _look_up,
    "withdraw": _withdraw,
    "header": _header,
    "span": _span,
    "published": _published,
    "fetch failed": _fetch_failed,
    "populated": _populated,
    "lost": _lost,
    "copy done": _copy_done,
    "copy failed": _copy_failed,
    "copy lost": _copy_lost,
    "end lease": _end_lease,
    "start kernel": _start_kernel,
    "end kernel": _end_kernel,
    "end lease under kernel": _end_lease_under_kernel,
    "end orphan": _end_orphan,
    "age": _age,
    "close": _close,
}


# -- what must never happen -----------------------------------------------------------------------


def _obey(world: World, commands: list[words.Command]) -> None:
    names = keys(world.setting)
    for command in commands:
        a = names.index(command.key)
        match command:
            case words.Fetch():
                if a in world.fetches:
                    raise Violation("two fetches of one file")
                if world.closed:
                    raise Violation("a fetch after close")
                world.fetches[a] = (False, frozenset(), False)
                world.readable[a] = frozenset()
            case words.CancelFetch():
                header, told, _ = world.fetches[a]
                world.fetches[a] = (header, told, True)
            case words.Populate():
                world.populating.add(a)
            case words.TakeSlot():
                _take_slot(world, a, command.grant)
            case words.Copy():
                _start_copy(world, a, command.group)
            case words.ClearColumn():
                _clear_column(world, a, command.grant)
            case words.Serve():
                _serve(world, a, command)
            case words.Fail():
                for waiter in command.waiters:
                    del world.waiting[waiter]
            case words.BreakSlot():
                if a in world.idle_leases + world.busy_leases:
                    world.broken.add(a)
            case words.Forget():
                if command.key in world.lifecycle.lives:
                    raise Violation("forgotten but known")


def _take_slot(world: World, a: int, grant: words.Grant) -> None:
    if world.closed:
        raise Violation("a slot was claimed after close")
    if grant.slot.index in world.holder:
        raise Violation("a slot was granted before its column was cleared")
    world.holder[grant.slot.index] = a
    world.on_device[a] = frozenset()
    life = world.lifecycle.lives[_key(world, a)]
    if life.file is not FileState.PRESENT and not any(
        holder == a and foreground for holder, _, foreground in world.waiting.values()
    ):
        raise Violation("a prefetch whose file is on the way took a slot")


def _start_copy(world: World, a: int, group: int) -> None:
    if a not in world.holder.values():
        raise Violation("a copy without a slot")
    if group not in world.readable.get(a, frozenset()):
        raise Violation("a copy of bytes that are not here")
    if (a, group) in world.copies or group in world.on_device[a]:
        raise Violation("a group was copied twice")
    world.copies.add((a, group))


def _clear_column(world: World, a: int, grant: words.Grant) -> None:
    if any(copying == a for copying, _ in world.copies):
        raise Violation("a slot was freed under a copy")
    if a in world.idle_leases + world.busy_leases:
        raise Violation("a slot was freed under a lease")
    if a in world.orphan_uses:
        raise Violation("a slot was freed under a kernel")
    del world.holder[grant.slot.index]
    world.on_device.pop(a, None)
    world.broken.discard(a)


def _serve(world: World, a: int, command: words.Serve) -> None:
    holder, tier, foreground = world.waiting.pop(command.waiter)
    assert holder == a
    if tier is Tier.DEVICE:
        _require_complete(world, a)
    if tier >= Tier.STREAM:
        if a not in world.holder.values():
            raise Violation("a lease without a slot")
        if foreground:
            world.idle_leases.append(a)


def _require_complete(world: World, a: int) -> None:
    if world.on_device.get(a) != frozenset(range(len(world.setting.sizes[a]))):
        raise Violation("resident before its last byte")


def _check(world: World) -> None:
    free = world.setting.copies - len(world.copies)
    if world.lifecycle.residency.copies_free != free:
        raise Violation("places for copies leaked")
    for key, life in world.lifecycle.lives.items():
        if life.slot is SlotState.FILLING and life.leaving and life.leases:
            raise Violation(f"{key} was told to leave while filling")
    _check_forward(world)


def _check_forward(world: World) -> None:
    """With nothing in flight and nothing held nobody may still wait."""
    in_flight = world.fetches or world.populating or world.copies
    held = world.idle_leases or world.busy_leases or world.orphan_uses
    if in_flight or held:
        return
    if world.waiting:
        raise Violation(f"stranded: {sorted(map(str, world.waiting.values()))}")
    if world.closed and not world.lifecycle.at_rest:
        raise Violation("closed and idle, but not at rest")


# -- exploring ------------------------------------------------------------------------------------


def clone(world: World) -> World:
    twin = copy.copy(world)
    for name in ("fetches", "populating", "copies", "on_device", "readable", "holder"):
        setattr(twin, name, getattr(world, name).copy())
    for name in ("idle_leases", "busy_leases", "orphan_uses", "broken", "waiting"):
        setattr(twin, name, getattr(world, name).copy())
    twin.lifecycle = _clone_lifecycle(world)
    return twin


def _clone_lifecycle(world: World) -> Lifecycle:
    """What copy.deepcopy would give, a hundred times faster."""
    original = world.lifecycle
    twin = new_world(world.setting).lifecycle
    twin._decisions.closing = original._decisions.closing
    twin._slots.now = original._slots.now
    twin._idle.update(original._idle)
    twin._idle_weight = original._idle_weight
    for key, life in original.lives.items():
        new = copy.copy(life)
        for name in ("fetched", "submitted", "done"):
            setattr(new, name, getattr(life, name).copy())
        new.waiters = Waiters()
        for waiter in life.waiters:
            new.waiters.add(waiter)
        twin.lives[key] = new
    twin._slots._waiting.update(original._slots._waiting)
    twin._slots._heap.extend(original._slots._heap)
    twin._slots._entries = original._slots._entries
    twin._copies._queue.update((key, twin.lives[key]) for key in original._copies._queue)
    residency = twin.residency
    residency.arena = original.residency.arena.copy()
    residency.copies_free = original.residency.copies_free
    residency._free_slots = original.residency._free_slots.copy()
    residency._generation = original.residency._generation
    residency._recency = original.residency._recency.copy()
    return twin


def fingerprint(world: World) -> tuple[object, ...]:
    """Two worlds with one fingerprint have the same future: no counters, only their order."""
    order = {w: n for n, w in enumerate(sorted(world.waiting))}
    lives = tuple(
        _life_print(world, a, world.lifecycle.lives.get(key), order)
        for a, key in enumerate(keys(world.setting))
    )
    recency = tuple(k.location for k in world.lifecycle.residency.least_recent())
    return (
        lives,
        recency,
        tuple(sorted(world.fetches.items())),
        frozenset(world.populating),
        frozenset(world.copies),
        tuple(sorted(world.readable.items())),
        tuple(sorted(world.idle_leases)),
        tuple(sorted(world.busy_leases)),
        tuple(sorted(world.orphan_uses)),
        frozenset(world.broken),
        world.closed,
        world.lifecycle.next_tick is None,
    )


def _life_print(
    world: World, a: int, life: Life | None, order: dict[int, int]
) -> tuple[object, ...]:
    if life is None:
        return ()
    waiters = tuple((order[w.id], w.tier, w.foreground) for w in life.waiters)
    return (
        life.file,
        life.slot,
        life.needs is None,
        frozenset(life.fetched),
        life.populated,
        frozenset(life.submitted),
        frozenset(life.done),
        life.leaving,
        waiters,
        life.grant.extents if life.grant else None,
    )


def explore(setting: Setting, *, limit: int = 1_000_000) -> int:
    """Visit every state that can be reached; returns how many there are.

    Raises the first violation, with the way that led to it.
    """
    start = new_world(setting)
    seen = {fingerprint(start)}
    queue: deque[tuple[World, tuple[Action, ...]]] = deque([(start, ())])
    while queue:
        world, way = queue.popleft()
        for action in list(actions(world)):
            twin = clone(world)
            try:
                perform(twin, action)
                mark = fingerprint(twin)
            except Exception as error:
                way_there = " → ".join(" ".join(map(str, step)) for step in (*way, action))
                raise Violation(f"{error!r} after: {way_there}") from error
            if mark not in seen:
                if len(seen) >= limit:
                    raise Violation(f"more than {limit} states")
                seen.add(mark)
                queue.append((twin, (*way, action)))
    return len(seen)
