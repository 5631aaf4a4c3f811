"""What can happen in a world: callers, threads and devices, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.lifecycle_judge import check, obey, require_complete
from core.lifecycle_world import AGE, Action, Violation, World, keys
from lorax_async.adapter import AdapterKey
from lorax_async.core import life as words
from lorax_async.core.life import Needs
from lorax_async.core.transitions import FileState
from lorax_async.core.waiters import Tier, Waiter
from lorax_async.errors import FetchError, LoaderClosedError, TransferError


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
    obey(world, handler(world, *args))
    check(world)


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
        require_complete(world, a)
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
