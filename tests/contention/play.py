"""Plays a plan on a loop of its own, judges after every step, and ends with nothing left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from common import LOOPS, our_threads
from contention.adapters import IDS
from contention.steps import Step, Steps
from contention.world import Scene, World


def play(scene: Scene, plan: Sequence[Step], seconds: float = 10.0) -> None:
    """Raises `AssertionError` if anything was not right. What takes `seconds` hangs."""
    with asyncio.Runner(loop_factory=LOOPS[scene.loop]) as runner:
        runner.run(_play(scene, plan, seconds))


async def _play(scene: Scene, plan: Sequence[Step], seconds: float) -> None:
    world = World(scene)
    with complaints(world.blame):
        await world.loader.__aenter__()
        world.loader.subscribe(world.device.heard)
        try:
            await _take(world, plan)
            await _finish(world, seconds)
            world.require_no_faults()
        except BaseException:
            await _abandon(world)
            raise


async def _take(world: World, plan: Sequence[Step]) -> None:
    steps = Steps(world)
    for step in plan:
        await step.take(steps)
        for _ in range(2):
            await asyncio.sleep(0)
        world.check()
        world.require_no_faults()


class _Complaints(logging.Handler):
    """What is logged as an error is one."""

    def __init__(self, blame: Callable[[object, str], None]) -> None:
        super().__init__(logging.ERROR)
        self._blame = blame

    def emit(self, record: logging.LogRecord) -> None:
        self._blame(False, self.format(record))


@contextmanager
def complaints(blame: Callable[[object, str], None]) -> Iterator[None]:
    """While the block lasts, what is logged or goes wrong in a callback is blamed on the play."""

    def complain(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        blame(False, str(context))

    asyncio.get_running_loop().set_exception_handler(complain)
    logger, handler = logging.getLogger("lorax_async"), _Complaints(blame)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# -- the end --------------------------------------------------------------------------------------


async def _finish(world: World, seconds: float) -> None:
    """Close; in a rude scene while leases are held, kernels run and loads are under way."""

    async def bounded(work: Awaitable[None], fault: str) -> None:
        task = asyncio.ensure_future(work)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            task.cancel()
            raise AssertionError(f"{fault}: {world.loader.last_numbers()}")
        task.result()

    _let_everything_go(world)
    if world.scene.rude:
        world.closing = True
        closing = asyncio.create_task(world.loader.close(timeout=0.005))
        await asyncio.sleep(0.02)
        _end_kernels(world)
        await bounded(closing, "it does not close")
    else:
        await bounded(_everybody_is_answered(world), "somebody still waits")
        await bounded(_everything_loads(world), "it does not load any more")
        await bounded(world.loader.close(), "it does not close")
    await bounded(_ended(world), "a wish outlives its loader")
    _nothing_is_left(world)


async def _abandon(world: World) -> None:
    """After a fault: end as much as ends by itself."""
    _let_everything_go(world)
    _end_kernels(world)
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


def _end_kernels(world: World) -> None:
    for kernel in world.kernels:
        kernel.go.set()


def _release_all(world: World) -> None:
    for holder in tuple(world.holders):
        world.release(holder)


async def _everybody_is_answered(world: World) -> None:
    """Whoever gets a lease gives it back, so that the next one's turn comes."""
    _end_kernels(world)
    while not all(task.done() for task in world.wants):
        _release_all(world)
        world.check()
        await asyncio.sleep(0.001)
    _release_all(world)
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
        _release_all(world)


async def _ended(world: World) -> None:
    for holder in world.holders:
        world.blame(holder.handle.released, "a handle outlives its loader")
        holder.gone.set()
    answers = await asyncio.gather(*world.wants, return_exceptions=True)
    for hint in world.prefetches:
        await hint.task
        answers += list(hint.errors.values())
    for answer in answers:
        good = not isinstance(answer, Exception) or world.is_provoked(answer)
        world.blame(good, f"a wish ended with {type(answer).__name__}: {answer}")


def _nothing_is_left(world: World) -> None:
    counts = world.source.counts
    world.blame(not counts.open_readers and not counts.open_holds, f"left open: {counts}")
    world.blame(not world.device.stays, "a slot was never cleared")
    named = any(world.device.column(slot) for slot in range(world.scene.slots))
    world.blame(not named, "a column still names somebody")
    tasks = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    world.blame(not tasks, f"tasks are left: {tasks}")
    world.blame(not our_threads(), f"threads are left: {our_threads()}")
