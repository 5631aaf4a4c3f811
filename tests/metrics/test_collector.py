"""A loader's numbers, against its statistics and against numbers known by hand."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import prometheus_client
import pytest

from common import LOOPS, until
from lorax_async import (
    AdapterLoader,
    AdapterNotFoundError,
    FetchError,
    LoaderClosedError,
    UsageError,
)
from lorax_async.errors import Stage
from lorax_async.metrics import LoaderCollector
from lorax_async.testing import FakeSource
from metrics.scraping import Samples, loaded, of, registered, scraped
from tiny_loaders import ONE, loader
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

STAGES: tuple[Stage, ...] = ("queue", "resolve", "fetch", "verify", "stage", "copy", "ready")


async def known_sequence(there: AdapterLoader, source: FakeSource) -> None:
    """In two slots, of which the least recently used goes."""
    await loaded(there, "a", "a")
    held = there.try_acquire("a")
    assert held is not None
    held.release()
    await loaded(there, "b", "c", "a")  # c pushes a out, and a, which was opened before, b
    with pytest.raises(AdapterNotFoundError):
        await there.load("missing")
    assert there.try_acquire("b") is None
    source.fail("open", FetchError("the source is down"), id="d")
    with pytest.raises(FetchError):
        await there.load("d")
    await there.unload("c")


def assert_known(samples: Samples) -> None:
    totals = {name: samples[f"lorax_{name}_total"] for name in ("fetches", "loads", "departures")}
    assert totals == {"fetches": 4, "loads": 4, "departures": 3}
    assert samples["lorax_moved_bytes_total"] == 4 * ONE
    hits = {"tier=device": 2, "tier=host": 0, "tier=disk": 1, "tier=source": 4}
    assert of(samples, "lorax_hits_total") == hits
    evictions = {"tier=device": 2, "tier=host": 0, "tier=pinned": 0}
    assert of(samples, "lorax_evictions_total") == evictions
    assert of(samples, "lorax_failures_total") == {"error=FetchError,stage=fetch": 1}
    assert of(samples, "lorax_call_errors_total") == {
        "error=FetchError,stage=fetch": 1,
        "error=AdapterNotFoundError,stage=resolve": 1,
    }
    assert (samples["lorax_slots_used"], samples["lorax_slots_limit"]) == (1, 2)
    assert samples["lorax_budget_used_bytes{budget=device}"] == ONE
    assert samples["lorax_budget_limit_bytes{budget=device}"] == 1 << 20
    assert (samples["lorax_leases"], samples["lorax_waiting"]) == (0, 0)


async def test_a_known_sequence(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c", "d")
    async with over(source, max_slots=2) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            await known_sequence(there, source)
            samples, told = scraped(registry), there.statistics()
    assert_known(samples)
    for name in ("fetches", "loads", "departures", "spills"):
        assert samples[f"lorax_{name}_total"] == getattr(told, name)
    assert samples["lorax_moved_bytes_total"] == told.bytes_moved
    assert sum(of(samples, "lorax_failures_total").values()) == told.failures
    for name, values in (("seconds", told.seconds), ("bytes", told.nbytes)):
        shown = of(samples, f"lorax_stage_{name}_total")
        assert shown == {f"stage={stage}": values.get(stage, 0) for stage in STAGES}
    assert samples["lorax_stage_bytes_total{stage=copy}"] == 4 * ONE


async def test_after_the_end_the_last_numbers_are_told(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c", "d")
    made: list[prometheus_client.CollectorRegistry] = []
    async with over(source, max_slots=2) as there:
        made.append(registered(LoaderCollector(there)))
        await known_sequence(there, source)
    samples = scraped(made[0])
    assert samples["lorax_loads_total"] == 4
    assert samples["lorax_departures_total"] == 4, "the last one left as the loader was closed"
    assert samples["lorax_slots_used"] == 0


@pytest.mark.parametrize("kind", LOOPS)
def test_a_closed_loop_is_not_asked(kind: str, tmp_path: Path) -> None:
    """A scrape's thread lives longer than `asyncio.run`."""
    source = stocked(tmp_path, "a")

    async def body() -> LoaderCollector:
        async with over(source) as there:
            collector = LoaderCollector(there, timeout=600)
            await loaded(there, "a")
        return collector

    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        collector = runner.run(body())
    samples = scraped(registered(collector))
    assert samples["lorax_loads_total"] == samples["lorax_departures_total"] == 1


async def test_a_scrape_in_a_thread_asks_the_loop(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with LoaderCollector(there, timeout=600) as collector:
            registry = registered(collector)
            await loaded(there, "a")
            samples = await asyncio.to_thread(scraped, registry)
            assert samples["lorax_loads_total"] == 1


async def test_a_loop_that_does_not_answer_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stocked(tmp_path, "a")
    found: list[Samples] = []
    async with over(source) as there:
        with LoaderCollector(there, timeout=0.001) as collector:
            registry = registered(collector)
            await loaded(there, "a")
            thread = threading.Thread(target=lambda: found.append(scraped(registry)))
            thread.start()
            thread.join(20)  # and so this loop does nothing
            assert not thread.is_alive()
            looks: list[None] = []
            monkeypatch.setattr(there, "last_numbers", lambda: looks.append(None))
            await asyncio.sleep(0)  # it comes to the question now, which nobody asks any more
            assert looks == []
            monkeypatch.undo()
            assert scraped(registry)["lorax_loads_total"] == 1
    assert found[0]["lorax_loads_total"] == 0, "as it was when it was made"


@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError, TimeoutError])
async def test_a_look_that_fails_is_told_who_asked(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Also where it fails with what a loop raises that does not answer."""

    def failing() -> None:
        raise kind("a fault of ours")

    async with loader() as there:
        with LoaderCollector(there, timeout=600) as collector:
            registry = registered(collector)
            monkeypatch.setattr(there, "last_numbers", failing)
            with pytest.raises(kind, match="ours"):
                await asyncio.to_thread(scraped, registry)


async def test_no_label_names_an_adapter(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/secret")
    async with over(source) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            await loaded(there, "org/secret")
            with pytest.raises(AdapterNotFoundError):
                await there.load("org/unknown")
            text = prometheus_client.generate_latest(registry).decode()
    assert "secret" not in text
    assert "unknown" not in text


async def test_registries_are_the_programs() -> None:
    before = prometheus_client.generate_latest()
    async with loader() as one, loader() as two:
        with LoaderCollector(one) as first, LoaderCollector(two) as second:
            registry = registered(first)
            with pytest.raises(ValueError, match="Duplicated"):
                registry.register(second)
            registered(second)
            names = {family.name for family in first.describe()}
            assert names == {family.name for family in first.collect()}
            assert all(name.startswith("lorax_") for name in names)
    assert b"lorax" not in before
    assert b"lorax" not in prometheus_client.generate_latest()


async def test_it_belongs_to_an_open_loader() -> None:
    there = loader()
    with pytest.raises(UsageError):
        LoaderCollector(there)
    async with there:
        with pytest.raises(UsageError):
            await asyncio.to_thread(LoaderCollector, there)
    with pytest.raises(LoaderClosedError):
        LoaderCollector(there)


async def test_looks_at_the_loop_end_with_the_collector() -> None:
    async with loader() as there:
        with LoaderCollector(there, lag_period=0.001) as collector:
            registry = registered(collector)
            await until(lambda: scraped(registry)["lorax_loop_lag_seconds_count"] > 1)
            running = [collector._lag.running]
        running.append(collector._lag.running)
        assert running == [True, False]
        other = LoaderCollector(there, lag_period=0.001)
    await until(lambda: not other._lag.running)
    samples = scraped(registered(other))
    count = samples["lorax_loop_lag_seconds_bucket{le=+Inf}"]
    assert count == samples["lorax_loop_lag_seconds_count"]
