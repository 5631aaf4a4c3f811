"""What a loader belongs to, how it opens, what its end waits for; and that no copy is lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from common import Run, our_threads, until
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, errors
from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Extent
from lorax_async.core.commands import Copy
from lorax_async.core.life import Grant
from lorax_async.core.moves import GroupPlan
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.events import SlotId
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.io.ports import CopyTicket
from lorax_async.io.transfer import GroupCopy, Moved
from lorax_async.runtime.copies import Copies
from lorax_async.runtime.tenancy import Tenancy
from lorax_async.testing import FakeHold
from tiny_loaders import loader
from tiny_sources import over, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_threads_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third thread is refused; those before it end, and the loader may be entered later."""
    start = threading.Thread.start
    seen: list[str] = []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("lorax-io"):
            seen.append(thread.name)
            if len(seen) == 3:
                raise RuntimeError("can't start new thread")
        start(thread)

    there = loader(io_threads=4)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(errors.CapacityError, match="lower io_threads"):
            await there.__aenter__()
    assert not our_threads()


async def test_opening_does_not_hold_the_loop() -> None:
    """Claiming memory takes a while; the loop must turn meanwhile, however slowly.

    (That it also has the GIL meanwhile is a matter of time, and so of no test.)
    """

    async def _open_and_close() -> None:
        async with loader(device_bytes=512 << 20, staging_bytes=256 << 20):
            pass

    turns = 0
    opening = asyncio.create_task(_open_and_close())
    while not opening.done():
        await asyncio.sleep(0.001)
        turns += 1
    await opening
    assert turns > 5, "opening ran on the loop"


async def test_close_fails_waiters_and_revokes_leases(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    async with loader(max_slots=1) as there:
        handle = await there.load(a)
        waiting = asyncio.create_task(there.load(b))
        await asyncio.sleep(0.01)
        await there.close(timeout=0.05)
        with pytest.raises(errors.LoaderClosedError):
            await waiting
        with pytest.raises(errors.HandleClosedError, match="loader was closed"):
            _ = handle.modules
        for late in (there.load(a), there.unload(a)):
            with pytest.raises(errors.LoaderClosedError):
                await late
        with pytest.raises(errors.LoaderClosedError):
            there.unpin(a)
        await there.close()


async def test_close_waits_for_kernels_whatever_its_deadline(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    begun, may_end = threading.Event(), threading.Event()

    def compute(handle: AdapterHandle) -> None:
        with handle.use():
            begun.set()
            may_end.wait(10)

    async with loader() as there:
        handle = await there.load(folder)
        computing = asyncio.create_task(asyncio.to_thread(compute, handle))
        await asyncio.to_thread(begun.wait)
        closing = asyncio.create_task(there.close(timeout=0.01))
        await asyncio.sleep(0.05)
        assert handle.released
        assert not closing.done()
        may_end.set()
        await computing
        await closing


def _in_a_fork(use: Callable[[], object]) -> str:
    """Name of the exception that `use` raises in a forked child."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        try:
            use()
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_it_belongs_to_one_loop_and_one_process(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")

    async def body() -> None:
        there = loader()
        opening = asyncio.create_task(there.__aenter__())
        await asyncio.sleep(0)
        for ask in (there.residency, there.statistics, lambda: there.prefetch([])):
            with pytest.raises(errors.UsageError, match="enter the loader first"):
                ask()
        for call in (there.load(folder), there.close()):
            with pytest.raises(errors.UsageError, match="enter the loader first"):
                await call
        await opening
        await there.close()
        there = loader()
        async with there:
            loop = asyncio.get_running_loop()
            with pytest.raises(errors.UsageError, match="event loop that entered it"):
                await asyncio.to_thread(lambda: asyncio.run(there.load(folder)))
            handle = await asyncio.to_thread(
                lambda: asyncio.run_coroutine_threadsafe(there.load(folder), loop).result()
            )
            handle.release()
            with pytest.raises(errors.UsageError, match="entered before"):
                await there.__aenter__()
            async with await there.load(folder) as held:
                assert _in_a_fork(lambda: there.try_acquire(folder)) == "UsageError"
                assert _in_a_fork(lambda: held.modules) == "UsageError"
                assert _in_a_fork(held.release) == ""
                assert not held.released

    run(body())


@pytest.mark.slow
def test_a_program_ends_without_closing_its_loader(tmp_path: Path) -> None:
    """No thread of ours keeps the interpreter, and it says what was forgotten."""
    folder = tiny.write(tmp_path / "a")
    program = f"""
import asyncio, pathlib, tiny
from lorax_async import AdapterLoader, LoaderConfig

async def main():
    loader = AdapterLoader(tiny.layout(), LoaderConfig(device_bytes=1 << 20))
    await loader.__aenter__()
    (await loader.load(pathlib.Path({str(folder)!r}))).release()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        cwd=Path(__file__).parent,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "was never closed" in done.stderr


# -- what the end waits for ----------------------------------------------------------------------


async def test_close_goes_on_when_its_caller_is_cancelled(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there = loader()
    await there.__aenter__()
    handle = await there.load(folder)
    closing = asyncio.create_task(there.close(timeout=5))
    await asyncio.sleep(0.01)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    handle.release()
    await there.close()


async def break_off(closing: asyncio.Task[None]) -> None:
    """Cancel what the loader does at its end, as a loop that is shut down does."""
    await asyncio.sleep(0.01)
    assert not closing.done()
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "lorax close"]
    task.cancel()
    await asyncio.sleep(0.03)


async def test_the_device_ends_after_the_copies_even_if_close_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever copies still writes to the arena."""
    folder, ended = tiny.write(tmp_path / "a"), list[str]()
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=1)
    for name in ("copy", "close"):
        call = getattr(device, name)

        def noted(*what: Any, call: Any = call, name: str = name) -> Any:
            try:
                return call(*what)
            finally:
                ended.append(name)

        monkeypatch.setattr(device, name, noted)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=1, io_threads=1)
    there = AdapterLoader(tiny.layout(), config, device=device)
    await there.__aenter__()
    device.gate.clear()
    loading = asyncio.create_task(there.load(folder))
    await until(lambda: device.copies == 1)
    closing = asyncio.create_task(there.close())
    await break_off(closing)
    device.gate.set()
    ends = await asyncio.gather(loading, closing, return_exceptions=True)
    assert all(isinstance(end, BaseException) for end in ends)
    await until(lambda: "close" in ended)
    assert ended == ["copy"] * tiny.LAYERS + ["close"]


class Deaf:
    """A step that never ends by itself, and has something to undo when it is cancelled."""

    asked, undone = False, 0

    async def __call__(self, *_: object) -> Any:
        self.asked = True
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0.01)
            self.undone += 1


@pytest.mark.parametrize("step", ["resolve", "digest", "populate"])
async def test_what_a_source_undoes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source, deaf = stocked(tmp_path, "a", holdable=True), Deaf()
    monkeypatch.setattr(source, step, deaf)
    there = over(source)
    await there.__aenter__()
    if step == "populate":
        call: Any = there.prefetch("a", tier="host").task
    else:
        digest = "0" * 64 if step == "digest" else None
        call = asyncio.create_task(there.load("a", digest=digest))
    await until(lambda: deaf.asked)
    await asyncio.wait_for(there.close(timeout=0), 10)
    assert deaf.undone == 1
    ends = await asyncio.gather(call, return_exceptions=True)
    assert step == "populate" or isinstance(ends[0], errors.LoaderClosedError)


async def test_a_fetch_ends_with_the_loader_even_if_close_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, deaf = stocked(tmp_path, "a"), Deaf()
    monkeypatch.setattr(source, "open", deaf)
    there = over(source)
    await there.__aenter__()
    loading = asyncio.create_task(there.load("a"))
    await until(lambda: deaf.asked)
    closing = asyncio.create_task(there.close())
    await break_off(closing)
    await asyncio.gather(loading, closing, return_exceptions=True)
    assert deaf.undone == 1


@pytest.mark.parametrize("by", ["unload", "close"])
async def test_closing_a_hold_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It is unmapped in a thread, which takes a while."""
    source, may_close = stocked(tmp_path, "a", holdable=True), threading.Event()
    close = FakeHold.close

    def slowly(hold: FakeHold) -> None:
        may_close.wait(10)
        close(hold)

    async with over(source) as there:
        await there.prefetch("a", tier="host")
        monkeypatch.setattr(FakeHold, "close", slowly)
        work = there.unload("a", timeout=20) if by == "unload" else there.close()
        ending = asyncio.create_task(work)
        await asyncio.sleep(0.02)
        assert not ending.done()
        may_close.set()
        await ending
        assert source.counts.open_holds == 0


# -- copies between the loop and the I/O threads ---------------------------------------------------


KEY = AdapterKey("somewhere", ())
GROUPS = 4
GRANT = Grant(SlotId(0, 1), tuple(Extent(64 * n, 64) for n in range(GROUPS)))
PLAN = TransferPlan(
    tuple(GroupPlan(n, 64, (), (), (), (), ()) for n in range(GROUPS)), "F32", 4, 256, 300
)


class Copying:
    """Copies of one adapter of four groups, which end when the test says so.

    The loop is woken for its last, and for the last that is under way.
    """

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.tickets: list[CopyTicket] = [Future() for _ in range(GROUPS)]
        self.asked: list[int] = []
        self.tenancy = Tenancy(KEY, GRANT, PLAN, GROUPS)
        part: Any = SimpleNamespace  # of the loader, as far as copies know it
        self.copies = Copies(
            part(reader=lambda key: None),
            part(tenancy=lambda key: self.tenancy),
            part(run=self._run),
            lambda outcome: self.heard.append(outcome.command.group),
            lambda key: None,
            threads=2,
            low_water=0,
            images=torch.empty(0, dtype=torch.uint8),
        )

    def _run(self, copy: GroupCopy) -> Moved:
        group = copy.group.layer
        self.asked.append(group)
        return Moved(self.tickets[group], self.tickets[group], 0.0)

    async def start(self, *groups: int) -> None:
        for group in groups:
            self.copies.start(Copy(KEY, GRANT, group))
        await until(lambda: set(groups) <= set(self.asked))
        await asyncio.sleep(0.01)

    def end(self, *groups: int) -> None:
        """Each in a thread of its own, as a device does it."""
        for group in groups:
            threading.Thread(target=self.tickets[group].set_result, args=(None,)).start()

    async def stop(self) -> None:
        self.copies.stop()
        await asyncio.to_thread(self.copies.join)


class SlowInt(int):
    """While it is counted up, others have their turn."""

    def __add__(self, other: int) -> SlowInt:
        time.sleep(0.06)
        return SlowInt(int(self) + other)


async def test_copies_that_end_at_the_same_moment_are_both_counted() -> None:
    """They are the adapter's last two, so that the loop is woken though another is under way."""
    copying = Copying()
    copying.tenancy.copied = SlowInt(GROUPS - 2)
    await copying.start(0, 1, 2)
    copying.end(0, 1)
    await until(lambda: sorted(copying.heard) == [0, 1])
    copying.end(2)
    await until(lambda: len(copying.heard) == 3)
    await copying.stop()
