"""Visits every state that a world can reach."""

from __future__ import annotations

import gc
from collections import deque
from dataclasses import fields
from operator import attrgetter
from typing import TypeVar

from core.lifecycle.checks import perform
from core.lifecycle.world import Action, Setting, Violation, World, actions, forbid
from lorax_async.core.life import Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.residency import ImageBudget, Residency
from lorax_async.core.settling import Budgets
from lorax_async.core.transitions import SlotState

_Way = tuple["_Way", Action] | None
"""The last action, and the way before it."""

_Budget = TypeVar("_Budget")

_COPIED = (
    *("fetches", "populating", "held", "read_ahead", "releasing", "copies", "on_device"),
    *("readable", "content", "holder", "told", "resident_at", "idle_leases", "busy_leases"),
    *("dirty", "wiping"),
    *("orphan_uses", "broken", "pins", "unloads", "waiting", "since"),
)
_values = attrgetter(*(field.name for field in fields(Life) if field.name != "waiters"))


def clone(world: World) -> World:
    twin = World.__new__(World)
    state = twin.__dict__
    state.update(world.__dict__)
    for name in _COPIED:
        state[name] = state[name].copy()
    twin.lifecycle = _clone_lifecycle(world)
    return twin


def _clone_lifecycle(world: World) -> Lifecycle:
    """What copy.deepcopy would give, a hundred times faster."""
    original = world.lifecycle
    twin = Lifecycle(_clone_budgets(world), world.setting.pace)
    for key, life in original.lives.items():
        twin.lives[key] = _clone_life(life)
    old, new = original._settling, twin._settling
    new.decisions.closing = old.decisions.closing
    new.slots.now = old.slots.now
    new.slots.line.adopt(old.slots.line)
    new.slots._no_room = old.slots._no_room
    for life in twin.lives.values():
        new.slots.holders.note(life)
    new.host_queue.line.adopt(old.host_queue.line)
    new.copies.turn = old.copies.turn
    for key in old.copies._queue:
        new.copies._queue[key] = twin.lives[key]
        new.copies.update(twin.lives[key])
    new.idle.adopt(old.idle)
    return twin


def _clone_life(life: Life) -> Life:
    new = Life(*_values(life))
    for waiter in life.waiters:
        new.waiters.add(waiter)
    return new


def _clone_budgets(world: World) -> Budgets:
    setting, budgets = world.setting, world.lifecycle.budgets
    slots = budgets.device._free_slots.copy()
    device = _twin(budgets.device, _free_slots=slots, **_own(budgets.device))
    host, images = _twin(budgets.host), budgets.images
    if setting.host_bytes:
        held, leaving = host.held.copy(), host.leaving.copy()
        host = _twin(host, held=held, leaving=leaving, policy=host.policy.copy())
    if setting.image_bytes:
        images = _twin(images, **_own(images))
    return Budgets(device, host, images)


def _own(budget: Residency | ImageBudget) -> dict[str, object]:
    return {"arena": budget.arena.copy(), "policy": budget.policy.copy()}


def _twin(original: _Budget, **own: object) -> _Budget:
    """The same, but for what must be its own."""
    twin = original.__new__(type(original))
    twin.__dict__.update(original.__dict__, **own)
    return twin


_PRINTED = (
    *("fetches", "populating", "held", "read_ahead", "releasing", "readable", "content"),
    *("idle_leases", "busy_leases", "orphan_uses", "broken", "told", "wiping", "pins", "unloads"),
)


def fingerprint(world: World) -> tuple[object, ...]:
    """Two worlds with one fingerprint have the same future: no counters, only their order."""
    order = {w: n for n, w in enumerate(sorted(world.waiting))}
    lives = world.lifecycle.lives
    return (
        tuple(_life_print(world, lives.get(key), order) for key in world.setting.keys),
        _queue_print(world),
        *(_frozen(getattr(world, name)) for name in _PRINTED),
        frozenset(world.copies),
        tuple(sorted((a, grant.extents) for a, grant in world.dirty.items())),
        world.closed,
    )


def _frozen(state: dict[int, object] | set[int] | list[int]) -> object:
    if isinstance(state, set):
        return frozenset(state)
    return tuple(sorted(state.items() if isinstance(state, dict) else state))


def _queue_print(world: World) -> tuple[object, ...]:
    lifecycle, setting = world.lifecycle, world.setting
    budgets, settling = lifecycle.budgets, lifecycle._settling
    forgets = len(setting.sizes) > setting.max_idle
    demoted = settling.host_queue.line
    waits = (entry for entry in sorted(demoted._heap) if demoted._waiting.get(entry[2]) == entry[0])
    return (
        budgets.device.policy.state(),
        budgets.host.policy.state(),
        budgets.images.policy.state(),
        tuple(settling.idle) if forgets else None,
        tuple(dict.fromkeys(entry[2] for entry in waits)),
        lifecycle.next_tick is None,
    )


def _life_print(world: World, life: Life | None, order: dict[int, int]) -> tuple[object, ...]:
    if life is None:
        return ()
    copies = world.lifecycle._settling.copies
    turn = life.copy_turn - copies.turn
    if life.slot is not SlotState.FILLING:
        turn = 0
    elif life.key not in copies._queue:
        turn = max(turn, 0)
    return (
        life.file,
        life.host,
        life.slot,
        life.needs is None,
        life.fetched,
        life.submitted,
        life.done,
        turn,
        _grant_print(world, life),
        life.image,
        life.imaged,
        (life.pins, life.leaving, life.unloads, life.told, life.demoted, life.broken, life.wiping),
        tuple((order[w.id], w.tier, w.foreground, _age(world, w.since, 2)) for w in life.waiters),
    )


def _grant_print(world: World, life: Life) -> tuple[object, ...]:
    """Extents, how many grants are older, and whether it may be evicted."""
    if life.grant is None:
        return ()
    generation = life.grant.slot.generation
    older = sum(grant.slot.generation < generation for grant in world.holder.values())
    resident = life.slot is SlotState.RESIDENT and world.setting.min_residency
    return (life.grant.extents, older, _age(world, life.resident_since, 1) if resident else 0)


def _age(world: World, since: float, most: int) -> int:
    """Steps of time that have passed; the wishes between two of them take next to none."""
    return min(round((world.now - since) / world.setting.step), most)


def explore(setting: Setting, *, limit: int = 1_000_000) -> int:
    """Visit every state that can be reached; returns how many there are.

    Raises the first violation, with the way that led to it.
    """
    collects = gc.isenabled()
    gc.disable()  # Nothing here is a cycle, and looking for some takes a third of the time.
    try:
        return _explore(setting, limit)
    finally:
        if collects:
            gc.enable()


def _explore(setting: Setting, limit: int) -> int:
    start = World.new(setting)
    seen = {fingerprint(start)}
    queue: deque[tuple[World, _Way]] = deque([(start, None)])
    while queue:
        world, way = queue.popleft()
        left = list(actions(world))
        while left:
            action = left.pop()
            twin = clone(world) if left else world  # for the last one, nobody needs that any more
            try:
                perform(twin, action)
                mark = fingerprint(twin)
            except Exception as error:
                raise Violation(f"{error!r} after: {_told((way, action))}") from error
            if mark not in seen:
                forbid(len(seen) >= limit, f"more than {limit} states")
                seen.add(mark)
                queue.append((twin, (way, action)))
    return len(seen)


def _told(way: _Way) -> str:
    steps: list[str] = []
    while way is not None:
        way, action = way
        steps.append(" ".join(map(str, action)))
    return " → ".join(reversed(steps))
