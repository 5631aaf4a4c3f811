"""What can happen in a world: callers, threads and devices, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.lifecycle_invariants import check, require_complete, require_open
from core.lifecycle_judge import obey
from core.lifecycle_outcomes import OUTCOMES, outcomes
from core.lifecycle_world import Action, Violation, World, keys
from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command
from lorax_async.core.waiters import Tier, Waiter
from lorax_async.errors import LoaderClosedError


def actions(world: World) -> Iterator[Action]:
    setting = world.setting
    for a in range(len(setting.sizes)):
        if not world.closed:
            yield from _wishes(world, a)
        if world.unloads.get(a):
            yield ("give up unload", a)
        if world.pins.get(a):
            yield ("unpin", a)
    if setting.withdrawals:
        for waiter in world.waiting:
            yield ("withdraw", waiter)
    yield from outcomes(world)
    yield from _uses(world)
    passes = setting.ageing or setting.min_residency
    if passes and (world.waiting or world.lifecycle.next_tick is not None):
        yield ("age",)
    if setting.closing and not world.closed:
        yield ("close",)


def _wishes(world: World, a: int) -> Iterator[Action]:
    setting = world.setting
    if (world.idle_leases + world.busy_leases).count(a) < setting.leases:
        for tier, foreground in setting.wishes:
            if (a, tier, foreground) not in world.waiting.values():
                yield ("want", a, tier, foreground)
        if setting.lookups:
            yield ("look up", a)
    if world.unloads.get(a, 0) < setting.unloads:
        yield ("unload", a)
    if setting.forgets:
        yield ("forget", a)


def _uses(world: World) -> Iterator[Action]:
    setting = world.setting
    for a in set(world.idle_leases):
        yield ("end lease", a)
        used = world.busy_leases + world.orphan_uses
        if setting.kernels and a not in used and a not in world.broken:
            yield ("start kernel", a)
        if world.pins.get(a, 0) < setting.pins:
            yield ("pin", a)
        if setting.clones and (world.idle_leases + world.busy_leases).count(a) < 2:
            yield ("clone", a)
    for a in set(world.busy_leases):
        yield ("end kernel", a)
        yield ("end lease under kernel", a)
    for a in set(world.orphan_uses):
        yield ("end orphan", a)


def perform(world: World, action: Action) -> None:
    """Let `action` happen, and check everything the lifecycle answers."""
    name, args = str(action[0]), action[1:]
    obey(world, _HANDLERS[name](world, *args))
    check(world)


def _key(world: World, a: int) -> AdapterKey:
    return keys(world.setting)[a]


def _want(world: World, a: int, tier: Tier, foreground: bool) -> list[Command]:
    world.next_waiter += 1
    world.now += 1e-3
    world.waiting[world.next_waiter] = (a, tier, foreground)
    world.since[world.next_waiter] = world.now
    waiter = Waiter(world.next_waiter, tier, world.now, foreground)
    return world.lifecycle.want(_key(world, a), waiter)


def _look_up(world: World, a: int) -> list[Command]:
    grant = world.lifecycle.take_lease(_key(world, a))
    if grant is not None:
        require_complete(world, a)
        require_open(world, a)
        world.idle_leases.append(a)
    return []


def _withdraw(world: World, waiter: int) -> list[Command]:
    a, _, _ = world.waiting.pop(waiter)
    del world.since[waiter]
    return world.lifecycle.withdraw(_key(world, a), waiter)


def _clone(world: World, a: int) -> list[Command]:
    world.idle_leases.append(a)
    world.lifecycle.add_lease(_key(world, a))
    return []


def _pin(world: World, a: int) -> list[Command]:
    departing = a in world.told or world.unloads.get(a, 0) > 0 or world.closed
    pinned = world.lifecycle.pin(_key(world, a))
    if pinned and (departing or not world.is_complete(a)):
        raise Violation("a pin on what is leaving, or is not here")
    if not pinned and not departing and world.is_complete(a):
        raise Violation("what stays could not be pinned")
    if pinned:
        world.pins[a] = world.pins.get(a, 0) + 1
    return []


def _unpin(world: World, a: int) -> list[Command]:
    world.pins[a] -= 1
    return world.lifecycle.unpin(_key(world, a), world.holder[a])


def _unload(world: World, a: int) -> list[Command]:
    world.unloads[a] = world.unloads.get(a, 0) + 1
    world.pins.pop(a, None)
    return world.lifecycle.unload(_key(world, a))


def _give_up_unload(world: World, a: int) -> list[Command]:
    world.unloads[a] -= 1
    return world.lifecycle.withdraw_unload(_key(world, a))


def _forget(world: World, a: int) -> list[Command]:
    return world.lifecycle.forget(_key(world, a))


def _end_lease(world: World, a: int) -> list[Command]:
    world.idle_leases.remove(a)
    return world.lifecycle.end_lease(_key(world, a))


def _start_kernel(world: World, a: int) -> list[Command]:
    world.idle_leases.remove(a)
    world.busy_leases.append(a)
    return []


def _end_kernel(world: World, a: int) -> list[Command]:
    world.busy_leases.remove(a)
    world.idle_leases.append(a)
    return []


def _end_lease_under_kernel(world: World, a: int) -> list[Command]:
    world.busy_leases.remove(a)
    world.orphan_uses.append(a)
    return world.lifecycle.end_lease(_key(world, a), in_use=True)


def _end_orphan(world: World, a: int) -> list[Command]:
    world.orphan_uses.remove(a)
    return world.lifecycle.end_use(_key(world, a))


def _age(world: World) -> list[Command]:
    """Time passes; the lifecycle hears of it only where it asked to."""
    world.now += world.setting.step
    due = world.lifecycle.next_tick
    if due is not None and due <= world.now:
        return world.lifecycle.tick(world.now)
    world.lifecycle.note_time(world.now)
    return []


def _close(world: World) -> list[Command]:
    world.closed = True
    world.pins.clear()
    return world.lifecycle.close(LoaderClosedError("ordered"))


_HANDLERS: dict[str, Callable[..., list[Command]]] = {
    **OUTCOMES,
    "want": _want,
    "look up": _look_up,
    "withdraw": _withdraw,
    "clone": _clone,
    "pin": _pin,
    "unpin": _unpin,
    "unload": _unload,
    "forget": _forget,
    "give up unload": _give_up_unload,
    "end lease": _end_lease,
    "start kernel": _start_kernel,
    "end kernel": _end_kernel,
    "end lease under kernel": _end_lease_under_kernel,
    "end orphan": _end_orphan,
    "age": _age,
    "close": _close,
}
