"""Tensors that are refused or given up, at every step: the id means what it did, nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from common import until
from given import assert_holds, used
from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterTimeoutError,
    CapacityError,
    FetchError,
    IntegrityError,
    InternalError,
    LoaderClosedError,
    LoraxError,
    TransferError,
    UsageError,
)
from lorax_async.core.transitions import SlotState
from sweeping import Bench, cancel_at, count_steps, local_bench
from tiny_loaders import loader, on_device

pytestmark = pytest.mark.usefixtures("nothing_left")

Given = Mapping[str, torch.Tensor]
OLD, NEW = tiny.tensors(1), tiny.tensors(2)
VERBS = ["load_tensors", "replace", "replace a source's"]


class Call:
    """One of the three ways to give tensors, on a bench; the id it is about, and what that means."""

    def __init__(self, bench: Bench, verb: str) -> None:
        self.bench = bench
        self.verb = verb
        self.loader = bench.loader
        self.name: Any = bench.adapter if verb.startswith("replace a") else "mine"

    async def prepare(self) -> None:
        """What the id means before."""
        if self.verb == "replace":
            (await self.loader.load_tensors("mine", OLD, tiny.config())).release()
        elif self.name != "mine":
            (await self.loader.load(self.name)).release()

    async def __call__(self, given: Given = NEW, timeout: float = 20) -> AdapterHandle:
        verb = self.loader.load_tensors if self.verb == "load_tensors" else self.loader.replace
        return await verb(self.name, given, tiny.config(), timeout=timeout)

    async def assert_nothing_changed(self) -> None:
        await at_rest(self.bench)
        assert used(self.loader) == (_bytes(self.loader) if self.verb == "replace" else 0)
        if self.verb == "load_tensors":
            assert self.loader.try_acquire("mine") is None
            assert not self.loader.residency()
            return
        async with await self.loader.load(self.name) as handle:
            if self.verb == "replace":
                assert_holds(handle, OLD)
            else:
                tiny.assert_equal_to_file(handle, self.bench.adapter)
        assert len(on_device(self.loader)) == 1


def _bytes(there: AdapterLoader) -> int:
    """Of one of them: all have the same header."""
    (size, *_) = there._machinery.given.values()
    return size


async def at_rest(bench: Bench) -> None:
    await bench.assert_clean()
    lives = bench.loader._driver.lifecycle.lives
    await until(lambda: all(life.slot is not SlotState.FILLING for life in lives.values()))
    assert not bench.loader._driver.retiring._keys
    giving = bench.loader._machinery.giving
    assert not giving._calls
    assert not giving._order._last


@asynccontextmanager
async def prepared(tmp_path: Path, verb: str) -> AsyncIterator[Call]:
    async with local_bench(tmp_path) as bench:
        call = Call(bench, verb)
        await call.prepare()
        yield call


@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_every_await(tmp_path: Path, verb: str) -> None:
    async def body() -> None:
        async with prepared(tmp_path / "counted", verb) as call:
            steps = await count_steps(_released(call()))
        assert steps >= 3, "the copies, and the device, are waited for"
        async with prepared(tmp_path, verb) as call:
            for step in range(1, steps + 1):
                if not await cancel_at(call(), step):
                    assert step > 3
                    return
                await until(lambda: _settled(call))
                await call.assert_nothing_changed()
            async with await call() as handle:
                assert_holds(handle, NEW)

    await body()


async def _released(work: Awaitable[AdapterHandle]) -> None:
    (await work).release()


def _settled(call: Call) -> bool:
    """A thread that was copying has given back its room."""
    given = call.loader._machinery.given
    return used(call.loader) == sum(given.values()) and len(given) == (call.verb == "replace")


STEPS = {
    "measure": "lorax_async.io.snapshot.write_header",
    "copy": "lorax_async.io.snapshot._copy_piece",
    "hash": "lorax_async.io.snapshot.Buffer.of",
    "open": "lorax_async.io.host_copies.HostCopy.open",
    "plan": "lorax_async.runtime.planning.Planner.plan",
    "read": "lorax_async.io.host_copies.HostReader.read_into",
    "to device": "lorax_async.io.devices.cpu.CpuDevice.copy",
    "exchange": "lorax_async.runtime.names.Names.give",
}


@pytest.mark.parametrize("error", [FetchError("ordered"), RuntimeError("a foreign fault")])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("verb", VERBS)
async def test_an_error_at_every_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    step: str,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error.located() if isinstance(error, LoraxError) else error

    async with prepared(tmp_path, verb) as call:
        with monkeypatch.context() as patch:
            patch.setattr(STEPS[step], fail)
            with pytest.raises(LoraxError) as caught:
                await call()
        if isinstance(error, LoraxError):
            assert type(caught.value) is FetchError
        else:
            assert isinstance(caught.value, InternalError | TransferError)
            assert caught.value.__cause__ is error
        assert caught.value.id == str(call.name)
        await call.assert_nothing_changed()
        async with await call() as handle:
            assert_holds(handle, NEW)


@pytest.mark.parametrize("verb", VERBS)
async def test_a_deadline_leaves_the_old(tmp_path: Path, verb: str) -> None:
    async with prepared(tmp_path, verb) as call:
        with pytest.raises(AdapterTimeoutError) as caught:
            await call(timeout=0)
        assert (caught.value.id, caught.value.stage) == (str(call.name), "fetch")
        await until(lambda: _settled(call))
        call.bench.device.gate.clear()
        with pytest.raises(AdapterTimeoutError) as caught:
            await call(timeout=0.05)
        assert (caught.value.id, caught.value.stage) == (str(call.name), "copy")
        call.bench.device.gate.set()
        await until(lambda: _settled(call))
        await call.assert_nothing_changed()


@pytest.mark.parametrize("verb", VERBS)
async def test_the_loader_closes(tmp_path: Path, verb: str) -> None:
    async def body(late: Callable[[], Awaitable[object]]) -> None:
        async with prepared(tmp_path, verb) as call:
            tasks = [asyncio.create_task(call(tiny.tensors(n))) for n in range(4)]
            await late()
            await call.loader.close(timeout=0.01)
            for task in tasks:
                try:
                    (await task).release()
                except LoraxError as error:
                    assert isinstance(error, LoaderClosedError | UsageError)
            assert used(call.loader) == 0

    for turns in (0, 1, 2, 5):

        async def late(turns: int = turns) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        await body(late)
    await body(lambda: asyncio.sleep(0.005))


async def test_what_is_written_to_meanwhile_is_noticed() -> None:
    async with loader() as there:
        given = tiny.tensors(1)
        giving = asyncio.create_task(there.load_tensors("mine", given, tiny.config()))
        await asyncio.sleep(0)
        given[min(given)].add_(1)
        with pytest.raises(IntegrityError, match="written to while it was copied") as caught:
            await giving
        assert (caught.value.id, caught.value.retryable) == ("mine", True)
        assert used(there) == 0
        (await there.load_tensors("mine", given, tiny.config())).release()


async def test_a_machine_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with loader() as there:
        with monkeypatch.context() as patch:
            patch.setattr("lorax_async.io.snapshot.torch.empty", _no_memory)
            with pytest.raises(CapacityError, match="no host memory") as caught:
                await there.load_tensors("mine", NEW, tiny.config())
        assert caught.value.id == "mine"
        assert used(there) == 0


def _no_memory(*_: object, **__: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: not enough memory")
