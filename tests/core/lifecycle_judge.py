"""What must never happen in a world: every command of the lifecycle is judged here."""

from __future__ import annotations

from core.lifecycle_world import Violation, World, keys
from lorax_async.core import life as words
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier


def obey(world: World, commands: list[words.Command]) -> None:
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
    life = world.lifecycle.lives[keys(world.setting)[a]]
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
        require_complete(world, a)
    if tier >= Tier.STREAM:
        if a not in world.holder.values():
            raise Violation("a lease without a slot")
        if foreground:
            world.idle_leases.append(a)


def require_complete(world: World, a: int) -> None:
    if world.on_device.get(a) != frozenset(range(len(world.setting.sizes[a]))):
        raise Violation("resident before its last byte")


def check(world: World) -> None:
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
