"""Cancel at every await, fail at every step: nothing may be left, and a clean load must follow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import open_files, our_threads, until
from lorax_async import (
    AdapterFormatError,
    AdapterLoader,
    FetchError,
    IntegrityError,
    InternalError,
    LoaderConfig,
    LoraxError,
    TransferError,
)
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.testing import Step
from sweeping import cancel_at, count_steps, fake_bench, local_bench, released
from tiny_loaders import on_device

SURE_STEPS = 2
"""A load always waits for its resolve and for the device; for single layers if they are late."""

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

ONE_LAYER = 2 * 4 * 4 * (tiny.HIDDEN + 2 * tiny.HIDDEN)
"""Bytes of a layer in the file: two modules, rank 4, F32, A [4, 32] and B [64, 4]."""

ORDERED = [FetchError("ordered"), IntegrityError("ordered"), RuntimeError("a foreign fault")]


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_cancelled_at_every_await_of_a_load(tmp_path: Path, verb: str) -> None:
    async with local_bench(tmp_path) as bench:
        files = open_files()
        work: Callable[[], Awaitable[Any]] = getattr(bench, verb)
        await bench.forget()
        steps = await count_steps(released(work()))
        assert steps >= 2, "resolve and the device are waited for"
        for step in range(1, steps + 1):
            await bench.forget()
            cancelled = await cancel_at(work(), step)  # type: ignore[arg-type]
            assert cancelled or step > SURE_STEPS
            await bench.assert_clean()
            assert open_files() <= files
            await bench.assert_works(bench.adapter)


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_cancelled_at_every_await_from_a_streaming_source(tmp_path: Path, verb: str) -> None:
    steps = 1
    step = 0
    while step < steps:
        step += 1
        async with fake_bench(tmp_path) as (bench, source):
            work = getattr(bench, verb)
            if step == 1:
                steps = await count_steps(released(work()))
                source.put("a", *tiny.files(tmp_path / "a"))
            cancelled = await cancel_at(work(), step)
            assert cancelled or step > SURE_STEPS
            await bench.assert_clean()
            assert source.counts.open_readers == 0
            await bench.assert_works(tmp_path / "a")


async def test_cancelled_at_every_await_of_close(tmp_path: Path) -> None:
    others = asyncio.all_tasks()

    async def close_with_a_load_under_way(step: int) -> int:
        steps = 0
        folder = tiny.write(tmp_path / "a")
        loader = AdapterLoader(tiny.layout(), LoaderConfig(device_bytes=1 << 20, max_slots=2))
        await loader.__aenter__()
        loading = asyncio.create_task(loader.load(folder))
        await asyncio.sleep(0)
        if step == 0:
            steps = await count_steps(loader.close())
        else:
            await cancel_at(loader.close(), step)
            await loader.close()
        with pytest.raises(LoraxError):
            await loading
        assert not our_threads()
        assert asyncio.all_tasks() <= others
        return steps

    steps = await close_with_a_load_under_way(0)
    assert steps >= 1
    for step in range(1, steps + 1):
        await close_with_a_load_under_way(step)


@pytest.mark.parametrize("error", ORDERED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("step", ["resolve", "open", "bring", "verify", "read"])
async def test_every_error_of_a_source(
    tmp_path: Path, step: Step, at: int, error: Exception
) -> None:
    if step in ("resolve", "open", "verify") and at:
        at = 0
    if step == "read":  # a byte of the first layer, or of a later one
        _, weights = tiny.files(tiny.write(tmp_path / "a"))
        at = 8 + int.from_bytes(weights[:8], "little") + at * ONE_LAYER
    async with fake_bench(tmp_path) as (bench, source):
        for verb in (bench.load, bench.stream):
            source.put("a", *tiny.files(tmp_path / "a"))
            source.fail(step, error, at=at)
            expected = type(error) if isinstance(error, LoraxError) else LoraxError
            with pytest.raises(expected) as caught:
                await verb()
            assert caught.value.id == "a"
            if not isinstance(error, LoraxError):
                assert isinstance(caught.value, InternalError | TransferError)
                assert isinstance(caught.value.__cause__, RuntimeError)
            await bench.assert_clean()
            assert source.counts.open_readers == 0
            await bench.assert_works(tmp_path / "a")


async def test_every_copy_can_fail(tmp_path: Path) -> None:
    for number in range(tiny.LAYERS):
        async with local_bench(tmp_path, dtype="bfloat16") as bench:
            bench.device.failing = {number}
            with pytest.raises(TransferError, match="told to fail"):
                await bench.stream()
            await bench.assert_clean()
            assert not on_device(bench.loader)
            bench.device.failing = set()
            await bench.assert_works(bench.adapter)


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_a_file_that_changes_under_the_copy(tmp_path: Path, verb: str) -> None:
    """It is loaded once more; but not for a caller that has a handle."""
    for number, damage in enumerate((_truncate, _touch, _replace)):
        async with local_bench(tmp_path / str(number)) as bench:
            bench.device.gate.clear()
            loading = asyncio.create_task(getattr(bench, verb)())
            await until(partial(_two_copies_began, bench.device))
            damage(bench.adapter / "adapter_model.safetensors")
            bench.device.gate.set()
            if verb == "stream":
                with pytest.raises(IntegrityError):
                    await loading
            elif damage is _truncate:  # which it is for good
                with pytest.raises(AdapterFormatError):
                    await loading
            else:
                (await loading).release()
                await bench.assert_works(bench.adapter)
                continue
            await bench.assert_clean()
            assert not on_device(bench.loader)
            await bench.forget()
            await bench.assert_works(bench.adapter)


STEPS = {
    "verify, config": "lorax_async.runtime.planning.parse_config",
    "verify, header": "lorax_async.runtime.planning.parse_header",
    "verify, plan": "lorax_async.runtime.planning.plan_transfer",
    "stage": "lorax_async.io.staging.Buffer.convert",
    "copy": "lorax_async.io.devices.cpu.CpuDevice.copy",
}


@pytest.mark.parametrize(
    "error", [*ORDERED, MemoryError("none left")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("step", STEPS)
async def test_every_error_of_every_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    """A typed error stays what it is; a foreign one is a fault of ours, and says which."""

    def fail(*_: object, **__: object) -> None:
        raise error.located() if isinstance(error, LoraxError) else error

    for verb in ("load", "stream"):
        async with local_bench(tmp_path) as bench:
            with monkeypatch.context() as patch:
                patch.setattr(STEPS[step], fail)
                with pytest.raises(LoraxError) as caught:
                    await getattr(bench, verb)()
            typed = isinstance(error, LoraxError)
            assert isinstance(caught.value, type(error) if typed else InternalError)
            assert typed or caught.value.__cause__ is error
            assert caught.value.id == str(bench.adapter)
            await bench.assert_clean()
            await bench.forget()
            await bench.assert_works(bench.adapter)


async def test_a_refused_adapter_leaves_nothing(tmp_path: Path) -> None:
    async with local_bench(tmp_path) as bench:
        (bench.adapter / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterFormatError) as caught:
            await bench.load()
        assert caught.value.stage == "verify"
        assert caught.value.id == str(bench.adapter)
        await bench.assert_clean()
        await bench.forget()
        await bench.assert_works(bench.adapter)


def _two_copies_began(device: GatedDevice) -> bool:
    return device.copies == 2


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _touch(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


def _replace(path: Path) -> None:
    """A new file under the old name leaves the open one whole: its ctime tells."""
    tiny.write(path.parent, seed=9)
