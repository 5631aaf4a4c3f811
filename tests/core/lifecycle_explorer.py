"""Visits every state that a world can reach."""

from __future__ import annotations

import copy
from collections import deque

from core.lifecycle_actions import actions, perform
from core.lifecycle_world import Action, Setting, Violation, World, keys, new_world
from lorax_async.core.life import Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.waiters import Waiters


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
