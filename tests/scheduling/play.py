"""Plays a plan in virtual time, and judges what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from common import LOOPS, our_threads
from contention.play import complaints
from lorax_async import LoaderClosedError, LoraxError, Request
from scheduling.engine import Engine
from scheduling.world import LEVEL, Scene, World

MOMENTS = 50_000
"""More than any play has."""


@dataclass(frozen=True, slots=True)
class Step:
    """After `pause` virtual seconds: a request, or the cancelling of one."""

    pause: float
    request: Request | None = None
    cancel: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """When requests ended, in virtual seconds, in the order of the plan; passes, and waits in them."""

    ended: list[float | None]
    passes: int
    waited: float


def play(scene: Scene, plan: Sequence[Step], warm: str = "") -> Result:
    """Raises `AssertionError` if anything was not right. `warm` adapters are loaded before."""
    with asyncio.Runner(loop_factory=LOOPS[scene.loop]) as runner:
        return runner.run(_play(scene, plan, warm))


async def _play(scene: Scene, plan: Sequence[Step], warm: str) -> Result:
    world = World(scene)
    with complaints(world.blame):
        await world.open()
        engine = Engine(world)
        engines = [asyncio.create_task(engine.run()) for _ in range(scene.engines)]
        tasks = list(engines)
        try:
            await _drive(world, asyncio.gather(*[_load(world, id) for id in warm]))
            tasks.append(asyncio.create_task(_arrive(world, plan)))
            await _drive(world, tasks[-1])
            await _drive(world, asyncio.ensure_future(_all_done(world, engine)))
            for each in world.wanted:
                world.judge(each)
            await _end(world, engines)
            world.require_no_faults()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            try:
                await world.scheduler.close()
            finally:  # what is put into the code on purpose may break even that
                await world.loader.close(timeout=1)
        world.require_no_faults()
    assert not our_threads()
    return Result([each.ended for each in world.wanted], engine.passes, engine.waited)


async def _load(world: World, id: str) -> None:
    (await world.loader.load(id)).release()


async def _arrive(world: World, plan: Sequence[Step]) -> None:
    for step in plan:
        await world.clock.sleep(step.pause)
        if step.request is None:
            world.cancel(step.cancel)
        else:
            world.submit(step.request)


async def _all_done(world: World, engine: Engine) -> None:
    """Every request has its answer, and what was cancelled under way is computed."""
    for each in world.wanted:
        with suppress(LoraxError, asyncio.CancelledError):
            await each.ticket
    while engine.computing:
        await world.clock.sleep(world.scene.seconds)


async def _drive(world: World, work: asyncio.Future[Any]) -> None:
    """Let virtual time pass until `work` is done: from one moment to the next, each to its end."""
    idle = 0
    for _ in range(MOMENTS):
        await world.settle()
        world.note_ends()
        world.require_no_faults()
        if work.done():
            work.result()
            return
        due = world.clock.due
        # What the loader does in real time comes before a jump over more than it may take.
        if (due is None or due > world.clock.now + 10 * LEVEL) and idle < 2000 * LEVEL + 10:
            idle += 1
            await asyncio.sleep(0.001)
        elif due is None:
            raise AssertionError(f"nothing happens any more: {[e.ticket for e in world.wanted]}")
        else:
            idle = 0
            world.clock.step()
    raise AssertionError("it goes on and on")


async def _end(world: World, engines: list[asyncio.Task[None]]) -> None:
    """Close, and nothing is left."""
    world.blame(not world.loader.usage().leases, "leases without requests")
    await world.scheduler.close()
    await asyncio.wait(engines, timeout=1)
    world.blame(all(engine.done() for engine in engines), "an engine goes on after close")
    try:
        world.scheduler.submit(Request(None, 1, 1))
        world.blame(False, "a closed scheduler takes requests")
    except LoaderClosedError:
        pass
    await world.settle()
    usage = world.loader.usage()
    world.blame(not usage.leases, "leases are left")
    world.blame(not usage.waiting, "loads or hints are left")
    names = [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("lorax wish")]
    world.blame(not names, "tasks are left")
    world.blame(world.clock.due is None, "alarms are left")
