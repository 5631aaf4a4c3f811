"""What must hold in a world between any two steps."""

from __future__ import annotations

from core.lifecycle_world import AGE, Violation, World, keys
from lorax_async.core.transitions import SlotState
from lorax_async.core.waiters import Tier


def require_complete(world: World, a: int) -> None:
    if not world.is_complete(a):
        raise Violation("resident before its last byte")


def require_open(world: World, a: int) -> None:
    """What is leaving gives no lease."""
    if a in world.told or world.unloads.get(a):
        raise Violation("a lease on an adapter that is leaving")


def check(world: World) -> None:
    if world.lifecycle.budgets.device.copies_free != world.setting.copies - len(world.copies):
        raise Violation("places for copies leaked")
    for key, life in world.lifecycle.lives.items():
        if life.slot is SlotState.FILLING and life.leaving and life.leases:
            raise Violation(f"{key} was told to leave while filling")
    _check_host(world)
    if world.setting.image_bytes:
        _check_images(world)
    _check_told(world)
    _check_served(world)
    _check_memory(world)
    _check_forward(world)


def _check_host(world: World) -> None:
    holders = (world.populating | world.held).intersection(world.setting.holdable)
    taken = sum(sum(world.setting.sizes[a]) for a in holders)
    if taken > world.setting.host_bytes:
        raise Violation("more is held than host_bytes")
    if world.lifecycle.budgets.host.free != world.setting.host_bytes - taken:
        raise Violation("host_bytes leaked")


def _check_images(world: World) -> None:
    lives = world.lifecycle.lives.values()
    extents = sorted(
        (extent.offset, extent.offset + extent.nbytes)
        for life in lives
        for extent in life.image or ()
    )
    ends = [0, *(end for _, end in extents)]
    starts = [*(start for start, _ in extents), world.setting.image_bytes]
    if any(start < end for end, start in zip(ends, starts, strict=True)):
        raise Violation("two images overlap")
    taken = sum(end - start for start, end in extents)
    if world.lifecycle.budgets.images.arena.free_bytes != world.setting.image_bytes - taken:
        raise Violation("page-locked memory leaked")
    for (a, group), copy in world.copies.items():
        image = world.life(a).image
        if copy.image is not None and (image is None or image[group] != copy.image):
            raise Violation("an image was given away under a copy")


def _check_told(world: World) -> None:
    """Whoever holds a slot has heard whether it is leaving."""
    for a in world.holder:
        life = world.life(a)
        leaves = life.departing or life.slot is SlotState.DRAINING or world.closed
        if a in world.told and not leaves:
            raise Violation("told to be leaving, but stays")
        if life.departing and a not in world.told:
            raise Violation("leaving, but nobody was told")


def _check_served(world: World) -> None:
    """Nobody waits for what is here, nor past their age for what others take leases on."""
    for waiter, (a, tier, foreground) in world.waiting.items():
        open_for_leases = a not in world.told and not world.unloads.get(a)
        here = world.is_complete(a) or (tier is Tier.STREAM and a in world.holder)
        if here and open_for_leases:
            raise Violation("not served, although it is here")
        if tier >= Tier.STREAM and foreground and world.since[waiter] + AGE <= world.now:
            _check_starving(world, a)


def _check_starving(world: World, a: int) -> None:
    life = world.life(a)
    if world.setting.slots > 1 or a in world.holder or life.unloads or not life.wants_slot:
        return
    for holder in world.holder:
        rests = world.is_complete(holder) and not world.pins.get(holder)
        if rests and holder not in world.told:
            raise Violation("somebody starves while others may take leases")


def _check_memory(world: World) -> None:
    """What holds nothing of any budget is remembered up to a limit, and no longer."""
    settling = world.lifecycle._settling
    idle = {key for key, life in world.lifecycle.lives.items() if life.is_idle}
    if set(settling.idle) != idle:
        raise Violation(f"remembered {len(settling.idle)} of {len(idle)}")
    if sum(_holds_nothing(world, a) for a in range(len(keys(world.setting)))) > (
        world.setting.max_idle
    ):
        raise Violation("more is remembered than max_idle")
    plans = {id(life.needs): life.needs for life in world.lifecycle.lives.values() if life.is_idle}
    rows = sum(needs.weight for needs in plans.values() if needs is not None)
    if settling.idle.weight != 8 * len(idle) + rows:
        raise Violation("the weight of what is remembered leaked")


def _holds_nothing(world: World, a: int) -> bool:
    life = world.lifecycle.lives.get(keys(world.setting)[a])
    if life is None or life.image is not None or life.waiters or life.unloads or life.demoted:
        return False
    busy = (
        world.fetches.keys() | world.populating | world.releasing | world.held | world.holder.keys()
    )
    return a not in busy


def _check_forward(world: World) -> None:
    """With nothing in flight and nothing in use nobody may still wait, whatever is pinned."""
    lifecycle = world.lifecycle
    in_flight = world.fetches or world.populating or world.releasing or world.copies
    in_flight = in_flight or world.wiping
    if lifecycle.at_rest and (in_flight or world.holder):
        raise Violation("at rest, but something is under way")
    if in_flight or world.in_use:
        return
    due = world.setting.min_residency and lifecycle.next_tick is not None
    if world.waiting and not due:
        raise Violation(f"stranded: {sorted(map(str, world.waiting.values()))}")
    if any(world.unloads.values()):
        raise Violation("nobody ends an unload")
    if any(life.demoted for life in lifecycle.lives.values()):
        raise Violation("nobody ends a demotion")
    if world.closed and (not lifecycle.at_rest or world.held or world.holder):
        raise Violation("closed and idle, but not at rest")
