"""How an example ends: everything is let go on, everybody gets an answer, nothing is left."""

from __future__ import annotations

import asyncio

from common import our_threads
from contention.adapters import IDS
from contention.world import World

SECONDS = 10.0
"""For what takes milliseconds."""


async def finish(world: World) -> None:
    """Close; in a rude scene while leases are held, kernels run and loads are under way."""
    _let_everything_go(world)
    if world.scene.rude:
        await _close_under_way(world)
    else:
        await _bounded(world, _everybody_is_answered(world), "somebody still waits")
        await _bounded(world, _everything_loads(world), "it does not load any more")
        await _bounded(world, world.loader.close(), "it does not close")
    await _bounded(world, _ended(world), "a wish outlives its loader")
    _nothing_is_left(world)


async def abandon(world: World) -> None:
    """After a fault: end as much as ends by itself."""
    _let_everything_go(world)
    for kernel in world.kernels:
        kernel.go.set()
    for task in world.wants:
        task.cancel()
    for hint in world.prefetches:
        hint.cancel()
    world.closing = True
    await asyncio.wait([asyncio.create_task(world.loader.close(timeout=0))], timeout=2)


def _let_everything_go(world: World) -> None:
    for id in IDS:
        world.source.allow(id)
    device = world.device.simulated
    device.failing.clear()
    device.delay = 0.0
    device.gate.set()


async def _bounded(world: World, work: object, fault: str) -> None:
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    await asyncio.wait([task], timeout=SECONDS)
    if not task.done():
        task.cancel()
        lives = world.loader._machinery.driver.lifecycle.lives.values()
        raise AssertionError(f"{fault}: {[(str(life.key), life) for life in lives]}")
    task.result()


async def _everybody_is_answered(world: World) -> None:
    """Whoever gets a lease gives it back, so that the next one's turn comes."""
    for kernel in world.kernels:
        kernel.go.set()
    while not all(task.done() for task in world.wants):
        for holder in tuple(world.holders):
            world.release(holder)
        world.check()
        await asyncio.sleep(0.001)
    for holder in tuple(world.holders):
        world.release(holder)
    await asyncio.gather(*world.prefetches, return_exceptions=True)


async def _everything_loads(world: World) -> None:
    for id in IDS:
        world.loader.unpin(id)
    for id in IDS:
        for _ in range(20):  # what is ordered to fail does so once
            world.want(world.load(id, 0, None))
            await world.wants[-1]
            if world.holders:
                break
        world.blame(world.holders and world.holders[0].handle.resident, f"{id} does not load")
        world.check()
        for holder in tuple(world.holders):
            world.release(holder)


async def _close_under_way(world: World) -> None:
    world.closing = True
    closing = asyncio.create_task(world.loader.close(timeout=0.005))
    await asyncio.sleep(0.02)
    for kernel in world.kernels:
        kernel.go.set()
    await _bounded(world, closing, "it does not close")


async def _ended(world: World) -> None:
    for holder in world.holders:
        world.blame(holder.handle.released, "a handle outlives its loader")
        holder.gone.set()
    hints = [task for hint in world.prefetches for task in hint._begun]
    for answer in await asyncio.gather(*world.wants, *hints, return_exceptions=True):
        good = not isinstance(answer, Exception) or world.is_provoked(answer)
        world.blame(good, f"a wish ended with {type(answer).__name__}: {answer}")


def _nothing_is_left(world: World) -> None:
    counts, driver = world.source.counts, world.loader._machinery.driver
    world.blame(not counts.open_readers and not counts.open_holds, f"left open: {counts}")
    world.blame(not world.device.stays, "a slot was never cleared")
    named = any(world.device.column(slot) for slot in range(world.scene.slots))
    world.blame(not named, "a column still names somebody")
    ring = driver._copies._transfer._staging
    world.blame(ring.free == ring.buffers, "a staging buffer was not given back")
    tasks = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    world.blame(not tasks, f"tasks are left: {tasks}")
    world.blame(not our_threads(), f"threads are left: {our_threads()}")
