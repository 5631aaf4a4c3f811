"""Plays a plan on a loop of its own, and judges after every step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common import LOOPS
from contention.ending import abandon, finish
from contention.steps import Step, Steps
from contention.world import Scene, World


def play(scene: Scene, plan: Sequence[Step]) -> None:
    """Raises `AssertionError` if anything was not right."""
    with asyncio.Runner(loop_factory=LOOPS[scene.loop]) as runner:
        runner.run(_play(scene, plan))


async def _play(scene: Scene, plan: Sequence[Step]) -> None:
    world = World(scene)
    with complaints(world.blame):
        await world.loader.__aenter__()
        world.loader.subscribe(world.device.heard)
        try:
            await _take(world, plan)
            await finish(world)
            world.require_no_faults()
        except BaseException:
            await abandon(world)
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
