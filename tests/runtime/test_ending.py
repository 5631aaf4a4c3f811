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
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from event_loops import until
from false_bytes import watched
from leaks import mapped_files, our_threads
from tiny_loaders import fails, gated, loader
from tiny_sources import Slowed, make_source, over, state

from lorax_async import AdapterKey, SlotId, errors
from lorax_async.concurrency import Inbox, ThreadPool
from lorax_async.config import LocalRoot
from lorax_async.devices import transfer
from lorax_async.devices.base import CopyTicket
from lorax_async.devices.transfer import (
    CopyRun,
    CopyThreads,
    GroupCopy,
    SlotCopies,
    SubmittedCopies,
)
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.commands import CopyGroups
from lorax_async.planning.transfer_plan import GroupPlan, TransferPlan
from lorax_async.runtime import host_tier
from lorax_async.runtime.host_tier import MappedFile
from lorax_async.sources.base import AdapterFile
from lorax_async.testing import FakeSource

Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


@pytest.mark.parametrize("threads", range(8))
async def test_a_process_that_may_start_few_threads(
    threads: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """An error names the limit, at the opening or the load, and all that was started ends."""
    start, left = threading.Thread.start, [threads]

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("lorax-"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    adapter = tiny.write(tmp_path / "a")
    there = loader(io_threads=2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        try:
            async with there, await there.load(adapter):
                pass
        except errors.CapacityError as error:
            assert "thread" in str(error)
            assert "io_threads" in str(error)
            assert threads < 4
    assert not our_threads()


@pytest.mark.parametrize("taken", [True, False])
def test_a_pool_that_cannot_start_a_thread_loses_no_result(taken: bool, monkeypatch: Patch) -> None:
    """The call is queued by then, and one of the other threads may take it."""
    began, free, called = threading.Event(), threading.Event(), threading.Event()

    def occupy() -> None:
        began.set()
        assert free.wait(10)

    def fail_to_start(thread: threading.Thread) -> None:
        if taken:
            free.set()
            assert called.wait(10)
        raise RuntimeError("can't start new thread")

    with ThreadPool(2) as pool:
        pool.submit(occupy)
        assert began.wait(10)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail_to_start)
            if taken:
                assert pool.submit(called.set).result(10) is None
            else:
                with pytest.raises(RuntimeError, match="new thread"):
                    pool.submit(called.set)
        free.set()
        assert pool.submit(lambda: 1).result(10) == 1
    assert called.is_set() is taken


async def test_opening_does_not_hold_the_loop() -> None:
    there, turns = loader(device_bytes=512 << 20, staging_bytes=256 << 20), 0
    opening = asyncio.create_task(there.__aenter__())
    while not opening.done():
        await asyncio.sleep(0.001)
        turns += 1
    await there.close()
    assert turns > 5, "opening ran on the loop"


async def test_close_fails_waiters_and_revokes_leases(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    async with loader(max_slots=1) as there:
        handle = await there.load(a)
        waiting = asyncio.create_task(there.load(b))
        await asyncio.sleep(0.01)
        await there.close(timeout=0.05)
        await fails(waiting, errors.LoaderClosedError)
        with pytest.raises(errors.HandleClosedError, match="loader was closed"):
            _ = handle.modules
        for late in (there.load(a), there.unload(a)):
            await fails(late, errors.LoaderClosedError)
        with pytest.raises(errors.LoaderClosedError):
            there.unpin(a)
        await there.close()


async def test_close_waits_for_kernels_whatever_its_deadline(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there:
        handle = await there.load(folder)
        with handle.use():
            closing = asyncio.create_task(there.close(timeout=0.01))
            await asyncio.sleep(0.05)
            assert handle.released
            assert not closing.done()
        await closing


def _in_a_fork(use: Callable[[], object]) -> bool:
    """Whether `use` is refused in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        code = 2
        try:
            use()
            code = 0
        except errors.UsageError:
            code = 1
        finally:
            os._exit(code)
    return [False, True][os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


async def test_it_belongs_to_one_loop_and_one_process(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there = loader()
    opening = asyncio.create_task(there.__aenter__())
    await asyncio.sleep(0)
    for ask in (there.placement, there.statistics, lambda: there.prefetch([])):
        with pytest.raises(errors.UsageError, match="enter the loader first"):
            ask()
    for call in (there.load(folder), there.close()):
        await fails(call, errors.UsageError, "enter the loader first")
    await opening
    await there.close()
    async with loader() as there:
        loop = asyncio.get_running_loop()
        with pytest.raises(errors.UsageError, match="event loop that entered it"):
            await asyncio.to_thread(lambda: asyncio.run(there.load(folder)))
        future = await asyncio.to_thread(asyncio.run_coroutine_threadsafe, there.load(folder), loop)
        (await asyncio.wrap_future(future)).release()
        await fails(there.__aenter__(), errors.UsageError, "entered once")
        async with await there.load(folder) as held:
            assert _in_a_fork(lambda: there.try_acquire(folder))
            assert _in_a_fork(lambda: held.modules)
            assert not _in_a_fork(held.release)
            assert not held.released


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
    command, here = (
        [sys.executable, "-W", "always", "-c", program],
        Path(__file__).parents[1] / "worlds",
    )
    done = subprocess.run(command, cwd=here, timeout=60, capture_output=True, text=True, check=True)
    assert "was never closed" in done.stderr


async def break_off(closing: asyncio.Task[None]) -> None:
    """Cancel what the loader does at its end, as a loop that is shut down does."""
    await asyncio.sleep(0.01)
    assert not closing.done()
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "lorax close"]
    task.cancel()
    await asyncio.sleep(0.03)


async def test_the_device_outlives_copies(tmp_path: Path, monkeypatch: Patch) -> None:
    """Copies in flight still write to the arena."""
    folder, ended = tiny.write(tmp_path / "a"), list[str]()
    there, device = gated(slots=1)
    for name in ("copy", "close"):
        call = getattr(device, name)

        def noted(*what: Any, call: Any = call, name: str = name) -> Any:
            try:
                return call(*what)
            finally:
                ended.append(name)

        monkeypatch.setattr(device, name, noted)
    await there.__aenter__()
    device.gate.clear()
    loading = asyncio.create_task(there.load(folder))
    await until(lambda: device.copies == 2)
    closing = asyncio.create_task(there.close())
    await break_off(closing)
    device.gate.set()
    ends = await asyncio.gather(loading, closing, return_exceptions=True)
    assert all(isinstance(end, BaseException) for end in ends)
    await until(lambda: "close" in ended)
    assert ended.index("close") == len(ended) - 1 > 2


@pytest.mark.parametrize("step", ["resolve", "digest", "populate", "open"])
async def test_undo_is_awaited(tmp_path: Path, monkeypatch: Patch, step: str) -> None:
    """The undo of a fetch is awaited even if the close is cancelled."""
    source = make_source(tmp_path, "a", holdable=True)
    monkeypatch.setattr(host_tier, "populate", host_tier.populate)  # restored at the end
    slowed = Slowed(host_tier if step == "populate" else source, step)
    there = over(source)
    await there.__aenter__()
    if step == "populate":
        call: Any = there.prefetch("a", tier="host").task
    else:
        digest = "0" * 64 if step == "digest" else None
        call = asyncio.create_task(there.load("a", digest=digest))
    await until(lambda: slowed.asked)
    closing = asyncio.create_task(there.close(timeout=None if step == "open" else 0))
    if step == "open":
        await break_off(closing)
    else:
        await asyncio.wait_for(closing, 10)
    ends = await asyncio.gather(call, closing, return_exceptions=True)
    assert slowed.cancelled == 1
    assert step in {"open", "populate"} or isinstance(ends[0], errors.LoaderClosedError)


@pytest.mark.parametrize("by", ["unload", "close"])
async def test_unmap_is_awaited(tmp_path: Path, monkeypatch: Patch, by: str) -> None:
    source, may_close = make_source(tmp_path, "a", holdable=True), threading.Event()
    close = MappedFile.close

    def slowly(pages: MappedFile) -> None:
        may_close.wait(10)
        close(pages)

    async with over(source) as there:
        await there.prefetch("a", tier="host")
        monkeypatch.setattr(MappedFile, "close", slowly)
        work = there.unload("a", timeout=20) if by == "unload" else there.close()
        ending = asyncio.create_task(work)
        await asyncio.sleep(0.02)
        assert not ending.done()
        may_close.set()
        await ending
        assert not mapped_files()


class SlowInt(int):
    """Lets other threads run while it is counted down."""

    def __add__(self, other: int) -> SlowInt:
        return SlowInt(int(self) + other)

    def __sub__(self, other: int) -> SlowInt:
        time.sleep(0.06)
        return SlowInt(int(self) - other)


NO_READER: Any = None


def copy_threads(
    run: Callable[[list[GroupCopy]], SubmittedCopies],
    ended: Callable[[CopyRun], None],
    threads: int,
) -> CopyThreads:
    """Copies go to `run`, and runs that have ended to `ended` on the loop."""
    copying: Any = SimpleNamespace(run=run)
    inbox = Inbox(asyncio.get_running_loop(), ended)
    return CopyThreads(copying, inbox, lambda key: None, threads=threads, images=torch.empty(0))


async def test_the_least_tag_is_next() -> None:
    """Of one adapter all runs may be waiting, and another's with a lesser tag comes before them."""
    began, go_on = list[int](), threading.Event()

    def run(copies: list[GroupCopy]) -> SubmittedCopies:
        began.append(copies[0].group.layer)
        go_on.wait(10)
        raise errors.TransferError("ordered")

    key = AdapterKey("somewhere", ())
    grant = SlotGrant(SlotId(0, 1), tuple(Extent(64 * n, 64) for n in range(4)))
    groups = tuple(GroupPlan(n, 64, (), (), (), (), ()) for n in range(4))
    slot = SlotCopies(TransferPlan(groups, "F32", 4, 256, 300), grant)
    copies = copy_threads(run, lambda run: None, threads=1)
    for group, tag in enumerate((64, 192, 128, 128)):
        copies.start(CopyGroups(key, grant, (group,), 64, tag), slot, NO_READER)
        await until(lambda: began == [0])
    go_on.set()
    await until(lambda: len(began) == 4)
    assert began == [0, 2, 3, 1]
    copies.stop()
    await asyncio.to_thread(copies.join)


async def test_copies_that_end_at_the_same_moment_are_both_counted(monkeypatch: Patch) -> None:
    """They are the adapter's last two, so that the loop is woken though another's is under way."""
    heard, asked = list[int](), list[int]()
    keys = [AdapterKey(name, ()) for name in ("somewhere", "elsewhere")]
    grant = SlotGrant(SlotId(0, 1), tuple(Extent(64 * n, 64) for n in range(4)))
    groups = tuple(GroupPlan(n, 64, (), (), (), (), ()) for n in range(4))
    plan = TransferPlan(groups, "F32", 4, 256, 300)
    slots = {key: SlotCopies(plan, grant) for key in keys}
    slots[keys[0]].copying = SlowInt(0)
    tickets: list[CopyTicket] = [Future() for _ in range(3)]

    def run(copies: list[GroupCopy]) -> SubmittedCopies:
        ticket = tickets[copies[0].group.layer]
        asked.append(copies[0].group.layer)
        return SubmittedCopies([ticket], [ticket])

    monkeypatch.setattr(transfer, "LOW_RUNS", 0)
    copies = copy_threads(run, lambda run: heard.extend(run.command.groups), threads=2)
    for group, key in enumerate((keys[0], *keys)):
        copies.start(CopyGroups(key, grant, (group,), 64), slots[key], NO_READER)
    await until(lambda: len(asked) == 3)
    await asyncio.sleep(0.01)
    for ticket in tickets[:2]:  # each in a thread of its own, as a device does it
        threading.Thread(target=ticket.set_result, args=(None,)).start()
    await until(lambda: sorted(heard) == [0, 1])
    tickets[2].set_result(None)
    await until(lambda: len(heard) == 3)
    copies.stop()
    await asyncio.to_thread(copies.join)


class FailsAtOnce(FakeSource):
    """Its first `fetch_groups` ends in the turn of the loop in which a group has arrived."""

    async def fetch_groups(self, file: AdapterFile, groups: Any, arrived: Any, control: Any) -> Any:
        if self.counts.opens > 1:
            return await super().fetch_groups(file, groups, arrived, control)
        arrived(0)
        raise errors.FetchError("ordered")


async def test_a_group_that_arrives_as_its_fetch_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FailsAtOnce()
    source.put("a", *tiny.files(tiny.write(tmp_path / "a", 0)))
    async with over(source) as there:
        await fails(there.load("a"), errors.FetchError, "ordered")
        await asyncio.sleep(0.01)
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")
    assert not caplog.records


@pytest.mark.parametrize("streams_on", [True, False])
async def test_a_file_is_opened_once_for_its_fetch_and_its_copies(
    tmp_path: Path, streams_on: bool
) -> None:
    """Also if the caller leaves while two groups are copied and the rest is fetched."""
    source = make_source(tmp_path, "a")
    source.hold("a")
    there, device = watched(source, max_slots=1, io_threads=2)
    async with there:
        device.gate.clear()
        hint = there.prefetch("a", tier="disk")
        async with AsyncExitStack() as held:
            streamed = await held.enter_async_context(there.stream("a"))
            source.allow("a", 0, 1)
            await until(lambda: device.copies == 2)
            if not streams_on:
                await held.aclose()
            source.allow("a")
            await hint
            device.gate.set()
            if streams_on:
                await streamed.layer_ready(3)
                tiny.assert_equal_to_file(streamed, tmp_path / "a")
            else:
                await until(lambda: state(there, "a") == "present")
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")
        assert there.statistics().failures == 0
        assert source.counts.opens == 1


@pytest.mark.each_loop
@pytest.mark.usefixtures("nothing_left")
async def test_it_closes_in_the_turn_in_which_a_file_would_be_populated(tmp_path: Path) -> None:
    """The task is there then, and has not begun."""
    for name in "ab":
        tiny.write(tmp_path / name, seed=ord(name))
    roots = (LocalRoot(tmp_path, immutable=True),)
    async with loader(max_slots=1, local_roots=roots) as there:
        held = await there.load("./a")
        waiting = asyncio.create_task(fails(there.load("./b"), errors.LoaderClosedError))
        await until(lambda: there.placement().usage.waiting == 1)

        async def release() -> None:
            await asyncio.sleep(0)
            held.release()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(release())
            group.create_task(there.close(timeout=1))
        await waiting
