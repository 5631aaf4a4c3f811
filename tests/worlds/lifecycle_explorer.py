"""Visits every state that a world can reach, and checks what must hold in each."""

import gc
from collections import deque
from dataclasses import fields
from operator import attrgetter
from typing import TypeVar

from lifecycle_world import AGE, Action, Setting, Violation, World, actions, forbid

from lorax_async.errors import CapacityError
from lorax_async.lifecycle import commands
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileState,
    HostState,
    SlotGrant,
    SlotState,
    WantedTier,
)
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle


def perform(world: World, action: Action) -> None:
    """Perform `action`, and check all commands that the lifecycle returns."""
    world.commands.extend(getattr(world, str(action[0]))(*action[1:]))
    world.execute()
    _check_between_steps(world)


def _judge(world: World, command: commands.Command) -> None:
    a = world.setting.keys.index(command.key)
    _judge_files(world, a, command)
    _judge_slots(world, a, command)
    _judge_notices(world, a, command)


World.judge = _judge


def _judge_files(world: World, a: int, command: commands.Command) -> None:
    match command:
        case commands.StartFetch():
            forbid(a in world.fetches, "two fetches of one file")
            forbid(world.closed, "a fetch after close")
            forbid(a in world.populating | world.held, "a file fetched anew while its old is held")
            world.fetches[a] = (False, frozenset(), False)
            world.readable[a] = frozenset()
        case commands.CancelFetch():
            header, told, cancelled = world.fetches[a]
            forbid(cancelled, "a fetch was cancelled twice")
            world.fetches[a] = (header, told, True)
        case commands.PopulatePages():
            world.host.populate(command.key, demoted=command.demoted)
        case commands.ReleasePages():
            world.host.release(command.key)
        case commands.ForgetAdapter():
            forbid(command.key in world.lifecycle.states, "forgotten but known")
            in_memory = a in world.held | world.populating | world.releasing
            forbid(in_memory, "forgotten but in host memory")
            forbid(a in world.holder, "forgotten but on the device")
            world.read_ahead.discard(a)


def _judge_slots(world: World, a: int, command: commands.Command) -> None:
    match command:
        case commands.TakeSlot():
            _take_slot(world, a, command.grant)
        case commands.CopyGroups():
            _start_copy(world, a, command)
        case commands.WipeExtents():
            forbid(world.dirty.get(a) != command.grant, "zeroed, but nothing broke")
            forbid(world.holder.get(a) != command.grant, "another's bytes were zeroed")
            forbid(a in world.wiping, "zeroed twice at once")
            _forbid_use(world, a, "zeroed")
            world.wiping.add(a)
        case commands.ClearColumn():
            _forbid_use(world, a, "freed")
            forbid(world.pins.get(a), "a slot was freed under a pin")
            forbid(a not in world.told, "a slot was freed before it was told to be leaving")
            forbid(world.holder.pop(a) != command.grant, "another's column was cleared")
            world.on_device.pop(a, None)
            world.resident_at.pop(a, None)
            world.broken.discard(a)
            world.told.discard(a)
        case commands.BreakSlot():
            world.broken.add(a)
            world.dirty[a] = world.holder[a]
            world.pins.pop(a, None)


def _start_copy(world: World, a: int, command: commands.CopyGroups) -> None:
    groups = frozenset(command.groups)
    forbid(a not in world.holder, "a copy without a slot")
    forbid(groups - world.readable.get(a, frozenset()), "a copy of bytes that are not here")
    full = len(world.copies) >= world.setting.copies
    forbid(full, "more copies at once than there is room for")
    copying = (group for owner, run in world.copies if owner == a for group in run)
    again = not groups.isdisjoint(copying) or groups & world.on_device[a]
    forbid(again or len(groups) < len(command.groups), "a group was copied twice")
    nbytes = sum(command.grant.extents[group].nbytes for group in groups)
    forbid(nbytes != command.nbytes or not nbytes, "a run of other bytes than its groups'")
    if len(groups) > 1:
        forbid(nbytes > world.setting.run_bytes, "a run that is too long")
        wanted = ((holder, tier) for holder, tier, _ in world.waiting.values())
        streams = a in world.leased or (a, WantedTier.STREAM) in wanted
        forbid(streams, "a run although each layer is awaited")
    if command.image is not None:
        forbid(len(groups) > 1, "one image for several groups")
        _use_image(world, a, command, command.image)
    world.copies[a, command.groups] = command


def _take_slot(world: World, a: int, grant: SlotGrant) -> None:
    forbid(world.closed, "a slot was claimed after close")
    forbid(a in world.holder, "a second slot of one adapter")
    forbid(world.unloads.get(a), "a slot was claimed for what is unloaded")
    for other in world.holder.values():
        forbid(other.slot.index == grant.slot.index, "a slot was granted before it was cleared")
        forbid(_overlap(other.extents, grant.extents), "extents of two slots overlap")
    for broken in world.dirty.values():
        overlap = _overlap(broken.extents, grant.extents)
        forbid(overlap, "what broke was granted before it was zeroed")
    forbid(grant.slot.index >= world.setting.slots, "more slots than there are")
    end = max(extent.offset + extent.nbytes for extent in grant.extents)
    forbid(end > world.setting.device_bytes, "extents outside the arena")
    world.holder[a] = grant
    world.on_device[a] = frozenset()
    foreground = any(holder == a and wanted for holder, _, wanted in world.waiting.values())
    early = world.life(a).file is not FileState.PRESENT and not foreground
    forbid(early, "a prefetch whose file is on the way took a slot")


def _use_image(world: World, a: int, command: commands.CopyGroups, image: Extent) -> None:
    for other in world.copies.values():
        shared = other.image is not None and _overlap((other.image,), (image,))
        forbid(shared, "an image was used while a copy goes through it")
    if command.warm:
        forbid(world.content.get(image.offset) != (a, *command.groups), "warm, but not its bytes")
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


def _forbid_use(world: World, a: int, deed: str) -> None:
    forbid(any(copying == a for copying, _ in world.copies), f"a slot was {deed} under a copy")
    forbid(a in world.leased, f"a slot was {deed} under a lease")
    forbid(a in world.orphan_uses, f"a slot was {deed} under a kernel")


def _judge_notices(world: World, a: int, command: commands.Command) -> None:
    match command:
        case commands.ServeWaiter():
            _serve(world, a, command)
        case commands.FailWaiters():
            for waiter in command.waiters:
                del world.waiting[waiter], world.since[waiter]
            if isinstance(command.error, CapacityError) and command.error.retryable:
                forbid(not any(world.pins.values()), "pinned out, but nothing is pinned")
        case commands.NotifyLeaving():
            forbid(world.holder.get(a) != command.grant, "told to leave without a slot")
            forbid(a in world.told, "told twice to be leaving")
            forbid(world.pins.get(a), "told to be leaving under a pin")
            world.told.add(a)
            ordered = world.unloads.get(a) or world.closed or a in world.broken
            if not ordered and a in world.resident_at:
                due = world.now >= world.resident_at[a] + world.setting.min_residency
                due = due and a not in world.leased
                forbid(not (due or _starves(world, a)), "evicted before its time")
        case commands.NotifyStays():
            forbid(world.holder.get(a) != command.grant, "told to stay without a slot")
            forbid(a not in world.told, "told to stay, but never to be leaving")
            forbid(world.closed, "told to stay after close")
            world.told.discard(a)
        case commands.NotifyReady():
            missing = set(range(command.watermark)) - world.on_device[a]
            forbid(missing, "a layer was told before its bytes, or those before it")
        case commands.NotifyUnloaded():
            forbid(not world.unloads.get(a), "unloaded, but no caller asked for it")
            forbid(a in world.holder, "unloaded, but on the device")
            forbid(a in world.populating | world.held, "unloaded, but in host memory")
            life = world.lifecycle.states.get(command.key)
            kept = life is not None and life.image is not None and life.slot is SlotState.NONE
            forbid(kept, "unloaded, but its image is kept")
            world.unloads[a] = 0
            world.forget_content(a)


def _serve(world: World, a: int, command: commands.ServeWaiter) -> None:
    holder, tier, foreground = world.waiting.pop(command.waiter)
    del world.since[command.waiter]
    assert holder == a
    leases = tier >= WantedTier.STREAM and foreground
    forbid((command.grant is not None) != leases, "a lease for a prefetch, or none for a load")
    if tier is WantedTier.DEVICE:
        world.require_complete(a)
    elif tier is WantedTier.HOST:
        groups = {group for owner, group in world.content.values() if owner == a}
        in_host = a in world.held | world.read_ahead or len(groups) == len(world.setting.sizes[a])
        forbid(not (world.is_complete(a) or in_host), "served before it is in memory")
    elif tier is WantedTier.DISK:
        present = a not in world.fetches and bool(world.readable.get(a))
        forbid(not (world.is_complete(a) or present), "served before the file is here")
    if tier >= WantedTier.STREAM:
        forbid(a not in world.holder, "a lease without a slot")
        world.require_open(a)
    if leases:
        forbid(command.grant != world.holder[a], "a lease on another's slot")
        world.idle_leases.append(a)


def _starves(world: World, a: int) -> bool:
    waits_ahead = {holder for holder, _, foreground in world.waiting.values() if foreground}
    return any(
        holder != a and holder in waits_ahead and world.since[waiter] + AGE <= world.now
        for waiter, (holder, _, _) in world.waiting.items()
    )


def _check_between_steps(world: World) -> None:
    in_flight = world.lifecycle._copies._copying
    forbid(in_flight != len(world.copies), "places for copies leaked")
    forbid(in_flight > world.setting.copies, "more copies in flight than allowed")
    for life in world.lifecycle.states.values():
        copies = [copy.nbytes for copy in world.copies.values() if copy.key == life.key]
        leaked = life.copying_bytes != sum(copies) or life.copying != len(copies)
        forbid(leaked, "the count of what is copied leaked")
        filling = life.slot is SlotState.FILLING
        forbid(filling and life.leaving and life.leases, "told to leave while filling")
    holders = (world.populating | world.held).intersection(world.setting.holdable)
    free = world.setting.host_bytes - sum(sum(world.setting.sizes[a]) for a in holders)
    forbid(free < 0, "more is held than host_bytes")
    forbid(world.host.nbytes - world.host.used != free, "host_bytes leaked")
    if world.setting.image_bytes:
        _check_images(world)
    for a in world.holder:
        life = world.life(a)
        leaves = life.departing or life.slot is SlotState.DRAINING or world.closed
        forbid(a in world.told and not leaves, "told to be leaving, but stays")
        forbid(life.departing and a not in world.told, "leaving, but without a notice")
    _check_served(world)
    _check_memory(world)
    _check_forward(world)


def _check_images(world: World) -> None:
    states = world.lifecycle.states.values()
    images = [extent for life in states for extent in life.image or ()]
    extents = sorted((extent.offset, extent.offset + extent.nbytes) for extent in images)
    ends = [0, *(end for _, end in extents)]
    starts = [*(start for start, _ in extents), world.setting.image_bytes]
    forbid(any(start < end for end, start in zip(ends, starts, strict=True)), "two images overlap")
    free = world.setting.image_bytes - sum(end - start for start, end in extents)
    forbid(world.lifecycle.budgets.images.arena.free_bytes != free, "page-locked memory leaked")
    for (a, groups), copy in world.copies.items():
        image = world.life(a).image
        gone = image is None or image[groups[0]] != copy.image
        forbid(copy.image is not None and gone, "an image was given away under a copy")


def _check_served(world: World) -> None:
    """No waiter waits for a tier that is reached, or starves while others get leases."""
    for waiter, (a, tier, foreground) in world.waiting.items():
        open_for_leases = a not in world.told and not world.unloads.get(a)
        here = world.is_complete(a) or (tier is WantedTier.STREAM and a in world.holder)
        forbid(here and open_for_leases, "not served, although it is here")
        if tier >= WantedTier.STREAM and foreground and world.since[waiter] + AGE <= world.now:
            _check_starving(world, a)


def _check_starving(world: World, a: int) -> None:
    life = world.life(a)
    if world.setting.slots > 1 or a in world.holder or life.unloads or not life.wants_slot:
        return
    for holder in world.holder:
        rests = world.is_complete(holder) and not world.pins.get(holder)
        forbid(rests and holder not in world.told, "a waiter starves while others may take leases")


def _check_memory(world: World) -> None:
    """Adapters without memory are remembered up to a limit."""
    remembered, states = world.lifecycle._idle, world.lifecycle.states
    idle = {key for key, life in states.items() if life.is_idle}
    forbid(set(remembered._entries) != idle, "others are remembered than those that are idle")
    nothing = sum(_holds_nothing(world, a) for a in range(len(world.setting.keys)))
    forbid(nothing > world.setting.max_idle, "more is remembered than max_idle")
    plans = {id(life.needs): life.needs for life in states.values() if life.is_idle}
    rows = sum(needs.weight for needs in plans.values() if needs is not None)
    forbid(remembered.weight != 8 * len(idle) + rows, "the weight of what is remembered leaked")


def _holds_nothing(world: World, a: int) -> bool:
    life = world.lifecycle.states.get(world.setting.keys[a])
    if life is None or life.image is not None or life.waiters or life.unloads:
        return False
    if life.host is HostState.WANTED or life.key in world.host.waiting:
        return False
    busy = (world.fetches, world.populating, world.releasing, world.held, world.holder)
    return not any(a in each for each in busy)


def _check_forward(world: World) -> None:
    """Without work in flight and without leases, no waiter is left, whatever is pinned."""
    lifecycle = world.lifecycle
    stages = (world.fetches, world.populating, world.releasing, world.copies, world.wiping)
    in_flight = any(stages)
    forbid(lifecycle.at_rest and (in_flight or world.holder), "at rest, but something is under way")
    if in_flight or world.leased or world.orphan_uses:
        return
    due = world.setting.min_residency and lifecycle.next_tick is not None
    forbid(world.waiting and not due, "stranded")
    forbid(any(world.unloads.values()), "an unload never ends")
    wanted = any(life.host is HostState.WANTED for life in lifecycle.states.values())
    forbid(wanted or world.host.waiting, "a demotion never ends")
    active = not lifecycle.at_rest or world.held or world.holder
    forbid(world.closed and active, "closed and idle, but not at rest")


_Way = tuple["_Way", Action] | None  # The last action, and the way before it
_Original = TypeVar("_Original")
_values = attrgetter(*(field.name for field in fields(AdapterState) if field.name != "waiters"))


def clone(world: World) -> World:
    twin = _twin(world)
    twin.lifecycle = _clone_lifecycle(world)
    twin.host, old = twin.new_host_tier(), world.host
    twin.host.populating = old.populating
    for name in ("waiting", "sizes", "leaving"):
        setattr(twin.host, name, getattr(old, name).copy())
    return twin


def _twin(original: _Original) -> _Original:
    """Return a copy with its own containers."""
    twin = original.__new__(type(original))
    for name, value in vars(original).items():
        twin.__dict__[name] = value.copy() if hasattr(value, "copy") else value
    return twin


def _clone_lifecycle(world: World) -> Lifecycle:
    """Return what copy.deepcopy returns, a hundred times faster."""
    old = world.lifecycle
    budgets = old.budgets
    images = _twin(budgets.images) if world.setting.image_bytes else budgets.images
    budgets = Budgets(_twin(budgets.device), budgets.host.copy(), images)
    new = Lifecycle(budgets, world.setting.pace)
    new._rules.closing = old._rules.closing
    new._slots.now = old._slots.now
    new._slots.queue = _twin(old._slots.queue)
    new._slots._blocked = old._slots._blocked
    for key, life in old.states.items():
        new.states[key] = twin = AdapterState(*_values(life))
        for waiter in life.waiters:
            twin.waiters.add(waiter)
        if life.copying:
            new._copies._in_flight[key] = twin
    for name, kept in vars(old._slots.holders).items():
        own = kept if name == "_seen" else {key: new.states[key] for key in kept}
        setattr(new._slots.holders, name, own.copy())
    for name in ("virtual_time", "_last_tag", "_threads", "_copying", "_copying_bytes"):
        setattr(new._copies, name, getattr(old._copies, name))
    new._copies._foreground = old._copies._foreground.copy()
    for key in old._copies._foreground:
        new._copies.update(new.states[key])
    new._idle = _twin(old._idle)
    return new


_PRINTED = (
    *("fetches", "populating", "held", "read_ahead", "releasing", "readable", "content"),
    *("idle_leases", "busy_leases", "orphan_uses", "broken", "told", "wiping", "pins", "unloads"),
)


_printed = attrgetter(
    *("file", "host", "slot", "fetched", "submitted", "done", "image", "imaged", "pins", "leaving"),
    *("unloads", "leave_notified", "broken", "wiping", "is_fast"),
)


def fingerprint(world: World) -> tuple[object, ...]:
    """Return a key of the world's future: counters are replaced by their order."""
    order = {w: n for n, w in enumerate(sorted(world.waiting))}
    states = world.lifecycle.states
    return (
        tuple(_life_print(world, states.get(key), order) for key in world.setting.keys),
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
    budgets, host = lifecycle.budgets, world.host
    forgets = len(setting.sizes) > setting.max_idle
    return (
        budgets.device.policy.state(),
        budgets.host.state(),
        budgets.images.policy.state(),
        tuple(lifecycle._idle._entries) if forgets else None,
        tuple(host.waiting.items()),
        frozenset(host.leaving),
        lifecycle.next_tick is None,
    )


def _life_print(
    world: World, life: AdapterState | None, order: dict[int, int]
) -> tuple[object, ...]:
    if life is None:
        return ()
    copies = world.lifecycle._copies
    turn = life.service_tag - copies.virtual_time
    if life.slot is not SlotState.FILLING:
        turn = 0
    elif life.key not in copies._foreground:
        turn = max(turn, 0)
    waits = ((order[w.id], w.tier, w.foreground, _age(world, w.since, 2)) for w in life.waiters)
    return (*_printed(life), life.needs is None, turn, _grant_print(world, life), *waits)


def _grant_print(world: World, life: AdapterState) -> tuple[object, ...]:
    """Return a grant's extents, the number of older grants, and whether it may be evicted."""
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
    """Visit every reachable state; return the number of states.

    Raises the first violation, with the way that led to it.
    """
    start = World.new(setting)
    seen = {fingerprint(start)}
    queue: deque[tuple[World, _Way]] = deque([(start, None)])
    gc.disable()  # Nothing here is a cycle, and looking for some takes a third of the time.
    try:
        while queue:
            world, way = queue.popleft()
            left = list(actions(world))
            while left:
                action = left.pop()
                twin = clone(world) if left else world  # for the last one, nobody needs it any more
                mark = _step(twin, action, way)
                if mark not in seen:
                    forbid(len(seen) >= limit, f"more than {limit} states")
                    seen.add(mark)
                    queue.append((twin, (way, action)))
    finally:
        gc.enable()
    return len(seen)


def _step(world: World, action: Action, way: _Way) -> tuple[object, ...]:
    try:
        perform(world, action)
        return fingerprint(world)
    except Exception as error:
        raise Violation(f"{error!r} after: {_told((way, action))}") from error


def _told(way: _Way) -> str:
    steps: list[str] = []
    while way is not None:
        way, action = way
        steps.append(" ".join(map(str, action)))
    return " → ".join(reversed(steps))
