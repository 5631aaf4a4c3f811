"""What a loader and a handle belong to, and how both end."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from common import Run, our_threads, until
from lorax_async import (
    AdapterHandle,
    CapacityError,
    HandleClosedError,
    LoaderClosedError,
    UsageError,
)
from tiny_loaders import loader

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_a_released_handle_shows_nothing(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there:
        handle = await there.load(folder)
        modules = handle.modules
        thread = threading.Thread(target=handle.release)
        thread.start()
        thread.join()
        handle.release()
        assert handle.released
        for use in (lambda: handle.modules, lambda: modules["model.layers.0.mlp.up_proj"]):
            with pytest.raises(HandleClosedError):
                use()
        with pytest.raises(HandleClosedError):
            await handle.layer_ready(0)
        with pytest.raises(HandleClosedError), handle.use():
            pass


async def test_a_handle_cannot_be_copied(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there, await there.load(folder) as handle:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="cannot be copied"):
                copied(handle)
        assert not handle.released


async def test_a_forgotten_handle_warns_and_is_released(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there:
        handle = await there.load(folder)
        with pytest.warns(ResourceWarning, match="never released"):
            handle.__del__()
        del handle
        await until(lambda: [w.leases for w in there.residency().values()] == [0])


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
        with pytest.raises(CapacityError, match="lower io_threads"):
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
        with pytest.raises(LoaderClosedError):
            await waiting
        with pytest.raises(HandleClosedError, match="loader was closed"):
            _ = handle.modules
        with pytest.raises(LoaderClosedError):
            await there.load(a)
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
        with pytest.raises(UsageError, match="enter the loader first"):
            await there.load(folder)
        async with there:
            loop = asyncio.get_running_loop()
            with pytest.raises(UsageError, match="event loop that entered it"):
                await asyncio.to_thread(lambda: asyncio.run(there.load(folder)))
            handle = await asyncio.to_thread(
                lambda: asyncio.run_coroutine_threadsafe(there.load(folder), loop).result()
            )
            handle.release()
            with pytest.raises(UsageError, match="entered before"):
                await there.__aenter__()
            async with await there.load(folder) as held:
                with pytest.raises(UsageError, match="awaited on the event loop"):
                    await asyncio.to_thread(lambda: asyncio.run(held.layer_ready(0)))
                assert _in_a_fork(lambda: there.try_acquire(folder)) == "UsageError"
                assert _in_a_fork(lambda: held.modules) == "UsageError"
                assert _in_a_fork(held.release) == ""
                assert not held.released

    run(body())


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


async def test_nothing_can_be_asked_of_it_while_it_opens() -> None:
    there = loader()
    opening = asyncio.create_task(there.__aenter__())
    await asyncio.sleep(0)
    for ask in (there.residency, there.statistics, lambda: there.prefetch([])):
        with pytest.raises(UsageError, match="enter the loader first"):
            ask()
    with pytest.raises(UsageError, match="enter the loader first"):
        await there.close()
    await opening
    assert not there.residency()
    await there.close()
