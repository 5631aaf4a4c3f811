"""Every error at every step, with every tier in play: nothing may be left, and a load must follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import FetchError, IntegrityError, InternalError, LoraxError, TransferError
from lorax_async.testing import Step
from sweeping_tiers import DEVICE_VERBS, HOST_VERBS, RANK, VERBS, fake_tiers, local_tiers

pytestmark = pytest.mark.usefixtures("nothing_left")

ERRORS = [
    FetchError("ordered"),
    IntegrityError("ordered"),
    RuntimeError("a foreign fault"),
    MemoryError("none left"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)

ONE_LAYER = 2 * RANK * 4 * (tiny.HIDDEN + 2 * tiny.HIDDEN)
"""Bytes of a layer in the file: two modules, F32, A [4, 32] and B [64, 4]."""

SOURCE_STEPS: dict[tuple[Step, int], tuple[str, ...]] = {
    ("resolve", 0): VERBS,
    ("open", 0): VERBS,
    ("bring", 0): VERBS,
    ("bring", 2): VERBS,
    ("read", 0): DEVICE_VERBS,
    ("read", 2): DEVICE_VERBS,
    ("populate", 0): HOST_VERBS,
}
"""By step and group: the verbs that come to it."""

LATER_STEPS = {
    "config": ("lorax_async.runtime.planning.parse_config", VERBS),
    "header": ("lorax_async.runtime.planning.parse_header", VERBS),
    "plan": ("lorax_async.runtime.planning.plan_transfer", VERBS),
    "file opened": ("lorax_async.io.sources.local_weights.read_prefix", VERBS),
    "file read": ("lorax_async.io.transfer.read", DEVICE_VERBS),
    "staging taken": ("lorax_async.io.staging.StagingRing.take", DEVICE_VERBS),
    "staged": ("lorax_async.io.staging.Buffer.convert", DEVICE_VERBS),
    "copy asked for": ("lorax_async.io.devices.simulated.SimulatedDevice.copy", DEVICE_VERBS),
    "copy ran": ("lorax_async.io.devices.simulated.SimulatedDevice._copy", DEVICE_VERBS),
    "mapped": ("lorax_async.io.sources.local_hold.MappedFile", HOST_VERBS),
    "populated": ("lorax_async.io.sources.local_hold.LocalHold.populate", HOST_VERBS),
    "settled": ("lorax_async.io.sources.local_hold.LocalHold.settle", HOST_VERBS),
}


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error.located() if isinstance(error, LoraxError) else error

    return fail


def assert_told(caught: LoraxError, error: Exception, id: object) -> None:
    """A typed error stays what it is; a foreign one is a fault of ours, and says which."""
    typed = isinstance(error, LoraxError)
    assert isinstance(caught, type(error) if typed else InternalError)
    assert typed or caught.__cause__ is error
    assert caught.id == str(id)


@pytest.mark.parametrize(("step", "group"), SOURCE_STEPS)
async def test_every_error_of_a_source(tmp_path: Path, step: Step, group: int) -> None:
    for error in ERRORS:
        async with fake_tiers(tmp_path) as (bench, source):
            _, weights = tiny.files(tmp_path / "a")
            first = 8 + int.from_bytes(weights[:8], "little")
            at = first + group * ONE_LAYER if step == "read" else group
            for verb in SOURCE_STEPS[step, group]:
                source.put("a", *tiny.files(tmp_path / "a"))
                source.fail(step, error, id="a", at=at)
                with pytest.raises(LoraxError) as caught:
                    await bench.do(verb)
                assert_told(caught.value, error, "a")
                await bench.assert_clean()
                assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)
                await bench.assert_works()
                await bench.assert_clean()


@pytest.mark.parametrize("step", LATER_STEPS)
async def test_every_error_of_every_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target, verbs = LATER_STEPS[step]
    for error in ERRORS:
        for verb in verbs:
            async with local_tiers(tmp_path) as bench:
                with monkeypatch.context() as patch:
                    patch.setattr(target, raising(error))
                    with pytest.raises(LoraxError) as caught:
                        await bench.do(verb)
                    await bench.settle()
                assert_told(caught.value, error, bench.ids["a"])
                await bench.assert_clean()
                await bench.assert_works()
                await bench.assert_clean()


@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_every_ticket_can_fail(tmp_path: Path, verb: str) -> None:
    """Through images, and through the ring; the image of a copy that failed is not warm."""
    for number in range(tiny.LAYERS):
        for pinned_bytes in (0, 1 << 20):
            async with local_tiers(tmp_path, pinned_bytes=pinned_bytes) as bench:
                bench.device.failing = {number}
                with pytest.raises(TransferError, match="told to fail"):
                    await bench.do(verb)
                bench.device.failing = set()
                handle = await bench.loader.load(bench.ids["a"], timeout=20)
                tiny.assert_equal_to_file(handle, tmp_path / "a")
                handle.release()
                await bench.assert_clean()
                await bench.assert_works()


@pytest.mark.parametrize("at", range(tiny.LAYERS + 1))
async def test_the_device_is_lost(tmp_path: Path, at: int) -> None:
    """Before, between and after the copies: all is given back, and closing does not hang."""
    async with fake_tiers(tmp_path) as (bench, source):
        source.hold("a")
        source.allow("a", *range(at)) if at else None
        async with bench.loader.stream("a", timeout=20) as handle:
            if at:
                await handle.layer_ready(at - 1)
            bench.device.lose()
            source.allow("a")
            if at < tiny.LAYERS:
                with pytest.raises(TransferError) as caught:
                    await handle.layer_ready(tiny.LAYERS - 1)
                assert not caught.value.retryable
            else:
                assert handle.resident
                with handle.use():
                    pass
        for verb in DEVICE_VERBS:
            source.put("a", *tiny.files(tmp_path / "a"))
            with pytest.raises(TransferError, match="lost"):
                await bench.do(verb)
        await bench.assert_clean()
    async with local_tiers(tmp_path) as fresh:
        await fresh.assert_works()


@each_error
@pytest.mark.parametrize("step", ["note_use", "wait_for"])
async def test_the_device_fails_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    """It is told to whoever computes, and the lease ends as it would."""
    async with fake_tiers(tmp_path) as (bench, _):
        bench.device.gate.clear()
        async with bench.loader.stream("a", timeout=20) as handle:
            await until(partial(handle.queue_behind, 0))
            with monkeypatch.context() as patch:
                patch.setattr(bench.device, step, raising(error))
                with pytest.raises(type(error)):
                    handle.queue_behind(0)
                    with handle.use():
                        pass
            bench.device.gate.set()
        await bench.assert_clean()
        await bench.assert_works()
