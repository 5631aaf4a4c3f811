"""A loader's numbers as Prometheus scrapes them, against its statistics and numbers by hand."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import prometheus_client
import pytest
import tiny
from event_loops import LOOPS, until
from prometheus_client import CollectorRegistry
from scraping import Samples, loaded, of, registered, scraped
from tensor_adapters import FILE, acquired, roomy
from tiny_loaders import ONE, fails, loader
from tiny_sources import make_source, over

from lorax_async import AdapterLoader, errors
from lorax_async.errors import Stage
from lorax_async.metrics import LoaderCollector
from lorax_async.testing import FakeSource

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")

STAGES: tuple[Stage, ...] = ("queue", "resolve", "fetch", "verify", "stage", "copy", "ready")
Watched = tuple[AdapterLoader, CollectorRegistry]


@asynccontextmanager
async def watched(source: FakeSource, **settings: Any) -> AsyncIterator[Watched]:
    async with over(source, **settings) as there:
        with LoaderCollector(there, timeout=600) as collector:
            yield there, registered(collector)


def gauges(samples: Samples) -> tuple[float, float]:
    return samples["lorax_leases"], samples["lorax_waiting"]


def assert_known(samples: Samples) -> None:
    totals = {name: samples[f"lorax_{name}_total"] for name in ("fetches", "loads", "departures")}
    assert totals == {"fetches": 4, "loads": 4, "departures": 3}
    assert samples["lorax_moved_bytes_total"] == 4 * ONE
    hits = {"tier=device": 2, "tier=host": 0, "tier=disk": 1, "tier=source": 4}
    assert of(samples, "lorax_hits_total") == hits
    evictions = {"tier=device": 2, "tier=host": 0, "tier=pinned": 0}
    assert of(samples, "lorax_evictions_total") == evictions
    failures = {"error=FetchError,stage=fetch": 1}
    assert of(samples, "lorax_failures_total") == failures
    errors = failures | {"error=AdapterNotFoundError,stage=resolve": 1}
    assert of(samples, "lorax_call_errors_total") == errors
    assert (samples["lorax_slots_used"], samples["lorax_slots_limit"]) == (1, 2)
    assert samples["lorax_budget_used_bytes{budget=device}"] == ONE
    assert samples["lorax_budget_limit_bytes{budget=device}"] == 1 << 20
    assert gauges(samples) == (0, 0)


async def test_a_known_sequence(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", "c", "d")
    async with watched(source, max_slots=2) as (there, registry):
        await loaded(there, "a", "a")
        acquired(there, "a").release()
        await loaded(there, "b", "c", "a")  # c pushes a out, and a, which was opened before, b
        await fails(there.load("missing"), errors.AdapterNotFoundError)
        assert there.try_acquire("b") is None
        source.fail("open", errors.FetchError("the source is down"), id="d")
        await fails(there.load("d"), errors.FetchError)
        await there.unload("c")
        samples, told = scraped(registry), there.statistics()
    assert_known(samples)
    for name in ("fetches", "loads", "departures"):
        assert samples[f"lorax_{name}_total"] == getattr(told, name)
    assert samples["lorax_moved_bytes_total"] == told.bytes_moved
    assert sum(of(samples, "lorax_failures_total").values()) == told.failures
    for name, values in (("seconds", told.seconds), ("bytes", told.nbytes)):
        shown = of(samples, f"lorax_stage_{name}_total")
        assert shown == {f"stage={stage}": values.get(stage, 0) for stage in STAGES}
    assert samples["lorax_stage_bytes_total{stage=copy}"] == 4 * ONE
    last = scraped(registry)
    assert last["lorax_loads_total"] == 4
    assert last["lorax_departures_total"] == 4, "the last one left as the loader was closed"
    assert last["lorax_slots_used"] == 0


async def test_what_fails_for_one_caller_alone(tmp_path: Path) -> None:
    """A deadline is a caller's: the load goes on for others, and has not failed."""
    source = make_source(tmp_path, "a")
    source.put("large", *tiny.files(tiny.write(tmp_path / "large", rank=64)))
    async with watched(source, device_bytes=2 * ONE) as (there, registry):
        await fails(there.load("large"), errors.CapacityError)
        source.hold("a")
        await fails(there.load("a", timeout=0.01), errors.AdapterTimeoutError)
        cancelled = asyncio.create_task(there.load("a"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        samples = scraped(registry)
    assert not [name for name in samples if "large" in name], "no label names an adapter"
    assert "error=CapacityError,stage=queue" in of(samples, "lorax_failures_total")
    shown = of(samples, "lorax_call_errors_total")
    assert shown.pop("error=CapacityError,stage=queue") == 1
    ((kind, count),) = shown.items()
    assert (kind.split(",")[0], count) == ("error=AdapterTimeoutError", 1)


async def test_a_call_that_joins_a_load_or_waits_for_an_unload_is_no_hit(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with watched(source) as (there, registry):
        source.hold("a")
        both = [asyncio.create_task(there.load("a")) for _ in range(2)]
        await until(lambda: there.placement().usage.waiting == 2)
        assert gauges(scraped(registry)) == (0, 2)
        source.allow("a", 0, 1, 2, 3)
        first, second = await asyncio.gather(*both)
        assert gauges(scraped(registry)) == (2, 0)
        leaving = asyncio.create_task(there.unload("a"))
        await asyncio.sleep(0)
        again = asyncio.create_task(there.load("a"))
        await until(lambda: there.placement().usage.waiting == 1)
        first.release()
        second.release()
        await leaving
        (await again).release()
        samples = scraped(registry)
    hits = {"tier=device": 0, "tier=host": 0, "tier=disk": 1, "tier=source": 2}
    assert of(samples, "lorax_hits_total") == hits
    assert of(samples, "lorax_evictions_total")["tier=device"] == 0, "it made room for no other"


async def test_hits_in_held_memory(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", holdable=True)
    nbytes = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    async with watched(source, max_slots=1, host_bytes=nbytes) as (there, registry):
        await there.prefetch("a", tier="host")
        assert scraped(registry)["lorax_budget_used_bytes{budget=host}"] == nbytes
        await loaded(there, "a")
        await there.prefetch("b", tier="host")
        samples = scraped(registry)
    assert of(samples, "lorax_hits_total")["tier=host"] == 1, "hints are no loads"
    assert sum(of(samples, "lorax_hits_total").values()) == 1
    assert of(samples, "lorax_evictions_total")["tier=host"] == 1
    assert samples["lorax_budget_limit_bytes{budget=host}"] == nbytes


async def test_tensors_in_memory(tmp_path: Path) -> None:
    async with roomy(tmp_path, 2, max_slots=1) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            assert "lorax_budget_used_bytes{budget=cache}" not in scraped(registry)
            for seed, name in enumerate(("one", "two")):
                made = await there.load_tensors(name, tiny.tensors(seed), tiny.config())
                made.release()
            before = scraped(registry)
            await loaded(there, "one", "two")
            after = scraped(registry)
    assert 2 * ONE < before["lorax_budget_used_bytes{budget=memory}"] <= 2 * FILE
    assert before["lorax_budget_limit_bytes{budget=memory}"] == there.config.memory_bytes
    hits = [of(samples, "lorax_hits_total") for samples in (before, after)]
    gained = {tier: hits[1][tier] - hits[0][tier] for tier in hits[0]}
    assert gained == {"tier=device": 0, "tier=host": 2, "tier=disk": 0, "tier=source": 0}


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


@pytest.mark.parametrize("kind", LOOPS)
def test_a_closed_loop_is_not_asked(kind: str, tmp_path: Path) -> None:
    """A scrape's thread lives longer than `asyncio.run`."""

    async def body() -> LoaderCollector:
        async with over(make_source(tmp_path, "a")) as there:
            collector = LoaderCollector(there, timeout=600)
            await loaded(there, "a")
        return collector

    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        collector = runner.run(body())
    samples = scraped(registered(collector))
    assert samples["lorax_loads_total"] == samples["lorax_departures_total"] == 1


async def test_a_scrape_in_a_thread_wakes_the_loop_and_asks_it(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_debug(True)  # it raises for calls of other threads
    async with watched(make_source(tmp_path, "a")) as (there, registry):
        await loaded(there, "a")
        assert (await asyncio.to_thread(scraped, registry))["lorax_loads_total"] == 1


async def test_a_loop_that_does_not_answer(tmp_path: Path, monkeypatch: Patch) -> None:
    source = make_source(tmp_path, "a")
    found: list[Samples] = []
    async with over(source) as there:
        with LoaderCollector(there, timeout=0.001) as collector:
            registry = registered(collector)
            await loaded(there, "a")
            thread = threading.Thread(target=lambda: found.append(scraped(registry)))
            thread.start()
            thread.join(20)  # and so this loop does nothing
            assert not thread.is_alive()
            looks = Mock()
            monkeypatch.setattr(there, "statistics", looks)
            await asyncio.sleep(0)  # it comes to the question now, which nobody asks any more
            assert not looks.called
            monkeypatch.undo()
            assert scraped(registry)["lorax_loads_total"] == 1
    assert found[0]["lorax_loads_total"] == 0, "as it was when it was made"


async def test_a_scrape_that_fails(tmp_path: Path, monkeypatch: Patch) -> None:
    async with watched(make_source(tmp_path)) as (there, registry):
        for kind in (ZeroDivisionError, RuntimeError, TimeoutError):
            failing = Mock(side_effect=kind("a fault of ours"))
            monkeypatch.setattr(there, "statistics", failing)
            await fails(asyncio.to_thread(scraped, registry), kind, "ours")
        monkeypatch.undo()


async def test_it_belongs_to_an_open_loader() -> None:
    there = loader()
    with pytest.raises(errors.UsageError):
        LoaderCollector(there)
    async with there:
        await fails(asyncio.to_thread(LoaderCollector, there), errors.UsageError)
    with pytest.raises(errors.LoaderClosedError):
        LoaderCollector(there)


async def test_looks_at_the_loop_end_with_the_collector_and_with_the_loader() -> None:
    count = "lorax_loop_lag_seconds_count"
    async with loader() as there:
        with LoaderCollector(there, lag_period=0.001) as collector:
            registry = registered(collector)
            await until(lambda: scraped(registry)[count] > 1)
        other = registered(LoaderCollector(there, lag_period=0.001))
        await until(lambda: scraped(other)[count] > 1)
    await asyncio.sleep(0.005)
    for each in (registry, other):
        samples = scraped(each)
        assert samples["lorax_loop_lag_seconds_bucket{le=+Inf}"] == samples[count]
        await asyncio.sleep(0.01)
        assert scraped(each)[count] == samples[count]
