"""What fails while things end, or before they begin: holds, columns, the device's memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from common import mapped_files, open_files, our_threads
from lorax_async import AdapterLoader, CapacityError
from lorax_async.io.sources.local_hold import LocalHold
from lorax_async.testing import FakeHold
from sweeping_tiers import (
    LAYOUT,
    bench_over,
    fake_tiers,
    local_tiers,
    tier_config,
    tier_device,
    written,
)
from test_sweep_tier_errors import each_error, raising

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged here was ordered."""
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)


@each_error
async def test_a_hold_does_not_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is gone for the loader: whoever unloads it is told so, and its budget is whole."""

    def fail(hold: LocalHold) -> None:
        close(hold)
        raising(error)()

    close = LocalHold.close
    async with local_tiers(tmp_path) as bench:
        await bench.host()
        with monkeypatch.context() as patch:
            patch.setattr(LocalHold, "close", fail)
            await bench.loader.unload(bench.ids["a"], timeout=2)
        await bench.assert_clean()
        await bench.host()
        await bench.assert_works()


@each_error
async def test_no_hold_closes_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(hold: LocalHold) -> None:
        close(hold)
        raising(error)()

    close = LocalHold.close
    async with bench_over(tmp_path, None, written(tmp_path)) as bench:
        await bench.loader.prefetch([bench.ids["a"], bench.ids["b"]], tier="host")
        with monkeypatch.context() as patch:
            patch.setattr(LocalHold, "close", fail)
            await bench.loader.close()
    assert not mapped_files()
    assert not our_threads()


@each_error
async def test_what_was_read_ahead_does_not_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its hold keeps nothing, and is closed as soon as it is made."""

    def fail(hold: FakeHold) -> None:
        close(hold)
        raising(error)()

    close = FakeHold.close
    async with fake_tiers(tmp_path) as (bench, source):
        source.holdable = False
        await bench.host()
        with monkeypatch.context() as patch:
            patch.setattr(FakeHold, "close", fail)
            await bench.loader.prefetch("a", tier="host", timeout=2)
        await bench.assert_clean()
        await bench.assert_works()


@each_error
async def test_a_column_is_not_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nothing of the adapter that left stays behind, its open file least of all."""
    async with local_tiers(tmp_path) as bench:
        await bench.load()
        with monkeypatch.context() as patch:
            patch.setattr(bench.device, "clear_column", raising(error))
            await bench.unload()
        assert not bench.driver.tenants._tenancies
        await bench.assert_works()
        await bench.assert_clean()


@each_error
@pytest.mark.parametrize("call", ["open", "staging_memory"])
async def test_the_device_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    device, files = tier_device(), open_files()
    monkeypatch.setattr(device, call, raising(error))
    loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
    with pytest.raises(type(error)):
        await loader.__aenter__()
    assert not our_threads()
    assert open_files() <= files
    async with local_tiers(tmp_path) as bench:
        await bench.assert_works()


async def test_there_is_memory_for_the_ring_but_none_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tier_device()
    given = device.staging_memory
    calls: list[int] = []

    def once(nbytes: int) -> object:
        calls.append(nbytes)
        if len(calls) > 1:
            raise CapacityError("no more page-locked memory")
        return given(nbytes)

    monkeypatch.setattr(device, "staging_memory", once)
    with pytest.raises(CapacityError, match="page-locked"):
        await AdapterLoader(LAYOUT, tier_config(tmp_path), device=device).__aenter__()
    assert len(calls) == 2
    assert not our_threads()
