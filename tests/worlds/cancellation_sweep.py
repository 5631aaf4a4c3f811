"""Step through a call one await at a time, and check a loader at rest."""

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tiny
from event_loops import until
from gated_device import GatedDevice

from lorax_async.config import LoaderConfig
from lorax_async.errors import LoraxError
from lorax_async.loader import AdapterLoader

RESTING = {"resident", "present", "held", "read ahead"}


@types.coroutine
def stepwise(
    work: Coroutine[Any, Any, Any], at_step: Callable[[int], None]
) -> Generator[Any, Any, Any]:
    """Run `work`; call `at_step` with the number of each suspension just before it."""
    steps = 0
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            awaited = work.throw(error) if error is not None else work.send(answer)
        except StopIteration as end:
            return end.value
        steps += 1
        at_step(steps)
        try:
            answer, error = (yield awaited), None
        except BaseException as thrown:
            answer, error = None, thrown


async def count_steps(work: Coroutine[Any, Any, Any]) -> int:
    seen = [0]
    await stepwise(work, seen.append)
    return seen[-1]


async def cancel_at(work: Coroutine[Any, Any, Any], step: int) -> bool:
    """Cancel `work` at its suspension number `step`; return whether it ended cancelled."""

    def cancel(current: int) -> None:
        if current == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    async def body() -> Any:
        await released(stepwise(work, cancel))

    task = asyncio.create_task(body())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


async def released(work: Awaitable[Any]) -> None:
    result = await work
    if result is not None:
        result.release()


def raising(error: Exception) -> Callable[..., None]:
    """Return a step that raises the error, as a copy if it is a `LoraxError`."""

    def fail(*_: object, **__: object) -> None:
        raise error.located() if isinstance(error, LoraxError) else error

    return fail


def our_tasks() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("lorax")]


async def settle(loader: AdapterLoader) -> None:
    """Wait until no task of the loader runs and no adapter changes its tier."""

    def rests() -> bool:
        states = {found.state for found in loader.placement().adapters.values()}
        return states <= RESTING and not our_tasks()

    await until(rests)


class Bench:
    """A loader on a gated CPU device, and a check of its state at rest."""

    def __init__(self, loader: AdapterLoader, device: GatedDevice, adapter: Path | str) -> None:
        self.loader = loader
        self.device = device
        self.adapter: Any = adapter

    async def load(self) -> Any:
        return await self.loader.load(self.adapter, timeout=20)

    async def assert_clean(self) -> None:
        await settle(self.loader)
        usage, where = self.loader.placement().usage, self.loader.placement().adapters.values()
        assert (usage.leases, usage.waiting) == (0, 0)
        assert usage.slots.used == sum(each.slot is not None for each in where)


@asynccontextmanager
async def local_bench(tmp_path: Path, *, dtype: str = "bfloat16") -> AsyncIterator[Bench]:
    folder = tiny.write(tmp_path / "a")
    device = GatedDevice(tiny.layout(), dtype="BF16", nbytes=1 << 20, slots=2)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=2, io_threads=2, dtype=dtype)
    async with AdapterLoader(tiny.layout(), config, device=device) as loader:
        yield Bench(loader, device, folder)
