"""What must never be commanded in a world: every command of the lifecycle is judged here."""

from __future__ import annotations

from collections.abc import Callable

from core.lifecycle_invariants import require_complete, require_open
from core.lifecycle_world import AGE, Violation, World, forget_content, keys
from lorax_async.core import commands
from lorax_async.core.arena import Extent
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier
from lorax_async.errors import CapacityError


def obey(world: World, answer: list[commands.Command]) -> None:
    names = keys(world.setting)
    for command in answer:
        judge = _JUDGES.get(type(command))
        if judge is not None:
            judge(world, names.index(command.key), command)


def forbid(wrong: object, problem: str) -> None:
    if wrong:
        raise Violation(problem)


# -- files and host memory --------------------------------------------------------------------------


def _fetch(world: World, a: int, _: commands.Fetch) -> None:
    forbid(a in world.fetches, "two fetches of one file")
    forbid(world.closed, "a fetch after close")
    forbid(a in world.populating or a in world.held, "a file fetched anew while its old is held")
    world.fetches[a] = (False, frozenset(), False)
    world.readable[a] = frozenset()


def _cancel_fetch(world: World, a: int, _: commands.CancelFetch) -> None:
    header, told, cancelled = world.fetches[a]
    forbid(cancelled, "a fetch was cancelled twice")
    world.fetches[a] = (header, told, True)


def _populate(world: World, a: int, _: commands.Populate) -> None:
    forbid(world.closed, "populated after close")
    forbid(bool(world.populating), "two are populated at once")
    forbid(a in world.releasing, "populated while it is released")
    forbid(a in world.held, "populated while it is held")
    forbid(world.unloads.get(a), "populated while it is unloaded")
    forbid(a in world.fetches or not world.readable.get(a), "populated without a file")
    world.read_ahead.discard(a)
    world.populating.add(a)


def _release(world: World, a: int, _: commands.Release) -> None:
    forbid(a not in world.held | world.read_ahead, "released what is not held")
    forbid(a in world.releasing, "released twice")
    world.releasing.add(a)


def _forget(world: World, a: int, command: commands.Forget) -> None:
    forbid(command.key in world.lifecycle.lives, "forgotten but known")
    held = world.held | world.populating | world.releasing
    forbid(a in held, "forgotten but in host memory")
    forbid(a in world.holder, "forgotten but on the device")
    world.read_ahead.discard(a)


# -- slots and copies -------------------------------------------------------------------------------


def _take_slot(world: World, a: int, command: commands.TakeSlot) -> None:
    grant, setting = command.grant, world.setting
    forbid(world.closed, "a slot was claimed after close")
    forbid(a in world.holder, "a second slot of one adapter")
    forbid(world.unloads.get(a), "a slot was claimed for what is unloaded")
    for other in world.holder.values():
        forbid(other.slot.index == grant.slot.index, "a slot was granted before it was cleared")
        forbid(_overlap(other.extents, grant.extents), "extents of two slots overlap")
    for broken in world.dirty.values():
        forbid(
            _overlap(broken.extents, grant.extents), "what broke was granted before it was zeroed"
        )
    forbid(grant.slot.index >= setting.slots, "more slots than there are")
    end = max(extent.offset + extent.nbytes for extent in grant.extents)
    forbid(end > setting.device_bytes, "extents outside the arena")
    world.holder[a] = grant
    world.on_device[a] = frozenset()
    foreground = any(wish[0] == a and wish[2] for wish in world.waiting.values())
    early = world.life(a).file is not FileState.PRESENT and not foreground
    forbid(early, "a prefetch whose file is on the way took a slot")


def _start_copy(world: World, a: int, command: commands.Copy) -> None:
    group = command.group
    forbid(a not in world.holder, "a copy without a slot")
    forbid(group not in world.readable.get(a, frozenset()), "a copy of bytes that are not here")
    forbid(len(world.copies) >= world.setting.copies, "more copies at once than there is room for")
    again = (a, group) in world.copies or group in world.on_device[a]
    forbid(again, "a group was copied twice")
    if command.image is not None:
        _use_image(world, a, command, command.image)
    world.copies[a, group] = command


def _use_image(world: World, a: int, command: commands.Copy, image: Extent) -> None:
    for other in world.copies.values():
        shared = other.image is not None and _overlap((other.image,), (image,))
        forbid(shared, "an image was used while a copy goes through it")
    if command.warm:
        forbid(world.content.get(image.offset) != (a, command.group), "warm, but not its bytes")
        return
    for offset in list(world.content):
        if image.offset - 64 < offset < image.offset + image.nbytes:
            del world.content[offset]


def _overlap(some: tuple[Extent, ...], others: tuple[Extent, ...]) -> bool:
    return any(
        one.offset < other.offset + other.nbytes and other.offset < one.offset + one.nbytes
        for one in some
        for other in others
    )


def _wipe(world: World, a: int, command: commands.Wipe) -> None:
    forbid(world.dirty.get(a) != command.grant, "zeroed, but nothing broke")
    forbid(world.holder.get(a) != command.grant, "another's bytes were zeroed")
    forbid(a in world.wiping, "zeroed twice at once")
    _forbid_use(world, a, "zeroed")
    world.wiping.add(a)


def _forbid_use(world: World, a: int, deed: str) -> None:
    forbid(any(copying == a for copying, _ in world.copies), f"a slot was {deed} under a copy")
    forbid(a in world.idle_leases + world.busy_leases, f"a slot was {deed} under a lease")
    forbid(a in world.orphan_uses, f"a slot was {deed} under a kernel")


def _clear_column(world: World, a: int, command: commands.ClearColumn) -> None:
    _forbid_use(world, a, "freed")
    forbid(world.pins.get(a), "a slot was freed under a pin")
    forbid(a not in world.told, "a slot was freed before it was told to be leaving")
    forbid(world.holder.pop(a) != command.grant, "another's column was cleared")
    world.on_device.pop(a, None)
    world.resident_at.pop(a, None)
    world.broken.discard(a)
    world.told.discard(a)


# -- what callers are told --------------------------------------------------------------------------


def _serve(world: World, a: int, command: commands.Serve) -> None:
    holder, tier, foreground = world.waiting.pop(command.waiter)
    del world.since[command.waiter]
    assert holder == a
    leases = tier >= Tier.STREAM and foreground
    forbid((command.grant is not None) != leases, "a lease for a prefetch, or none for a load")
    if tier is Tier.DEVICE:
        require_complete(world, a)
    elif tier is Tier.HOST:
        forbid(not (world.is_complete(a) or _in_host(world, a)), "served before it is in memory")
    elif tier is Tier.DISK:
        present = a not in world.fetches and bool(world.readable.get(a))
        forbid(not (world.is_complete(a) or present), "served before the file is here")
    if tier >= Tier.STREAM:
        forbid(a not in world.holder, "a lease without a slot")
        require_open(world, a)
    if leases:
        forbid(command.grant != world.holder[a], "a lease on another's slot")
        world.idle_leases.append(a)


def _in_host(world: World, a: int) -> bool:
    groups = {group for owner, group in world.content.values() if owner == a}
    return a in world.held | world.read_ahead or len(groups) == len(world.setting.sizes[a])


def _fail(world: World, _: int, command: commands.Fail) -> None:
    for waiter in command.waiters:
        del world.waiting[waiter], world.since[waiter]
    if isinstance(command.error, CapacityError) and command.error.retryable:
        forbid(not any(world.pins.values()), "pinned out, but nothing is pinned")


def _break_slot(world: World, a: int, _: commands.BreakSlot) -> None:
    world.broken.add(a)
    world.dirty[a] = world.holder[a]
    world.pins.pop(a, None)


def _tell_leaving(world: World, a: int, command: commands.TellLeaving) -> None:
    forbid(world.holder.get(a) != command.grant, "told to leave without a slot")
    forbid(a in world.told, "told twice to be leaving")
    forbid(world.pins.get(a), "told to be leaving under a pin")
    world.told.add(a)
    ordered = world.unloads.get(a) or world.closed or a in world.broken
    if not ordered and a in world.resident_at:
        due = world.now >= world.resident_at[a] + world.setting.min_residency
        due = due and a not in world.idle_leases + world.busy_leases
        forbid(not (due or _starves(world, a)), "evicted before its time")


def _starves(world: World, a: int) -> bool:
    waits_ahead = {holder for holder, _, foreground in world.waiting.values() if foreground}
    return any(
        holder != a and holder in waits_ahead and world.since[waiter] + AGE <= world.now
        for waiter, (holder, _, _) in world.waiting.items()
    )


def _tell_stays(world: World, a: int, command: commands.TellStays) -> None:
    forbid(world.holder.get(a) != command.grant, "told to stay without a slot")
    forbid(a not in world.told, "told to stay, but never to be leaving")
    forbid(world.closed, "told to stay after close")
    world.told.discard(a)


def _tell_ready(world: World, a: int, command: commands.TellReady) -> None:
    missing = set(range(command.watermark)) - world.on_device[a]
    forbid(missing, "a layer was told before its bytes, or those before it")


def _tell_unloaded(world: World, a: int, command: commands.TellUnloaded) -> None:
    forbid(not world.unloads.get(a), "unloaded, but nobody asked for it")
    forbid(a in world.holder, "unloaded, but on the device")
    forbid(a in world.populating or a in world.held, "unloaded, but in host memory")
    life = world.lifecycle.lives.get(command.key)
    kept = life is not None and life.image is not None and life.slot is SlotState.NONE
    forbid(kept, "unloaded, but its image is kept")
    world.unloads[a] = 0
    forget_content(world, a)


_JUDGES: dict[type[commands.Command], Callable[..., None]] = {
    commands.Fetch: _fetch,
    commands.CancelFetch: _cancel_fetch,
    commands.Populate: _populate,
    commands.Release: _release,
    commands.Forget: _forget,
    commands.TakeSlot: _take_slot,
    commands.Copy: _start_copy,
    commands.Wipe: _wipe,
    commands.ClearColumn: _clear_column,
    commands.Serve: _serve,
    commands.Fail: _fail,
    commands.BreakSlot: _break_slot,
    commands.TellLeaving: _tell_leaving,
    commands.TellStays: _tell_stays,
    commands.TellReady: _tell_ready,
    commands.TellUnloaded: _tell_unloaded,
}
