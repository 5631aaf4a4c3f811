"""Who holds, who waits, and where loads found their adapters: numbers known by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterTimeoutError,
    CapacityError,
)
from lorax_async.metrics import LoaderCollector
from metrics.scraping import loaded, of, registered, scraped
from spilling_loaders import FILE, roomy
from tiny_loaders import ONE
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

KEPT = ("memory", "cache")

PADDED = 2 * ONE
"""On a device of its own, where rank 4 lies as rank 8."""


async def test_who_waits_and_who_holds(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            first, second = await there.load("a"), await there.load("a")
            source.hold("b")
            waiting = asyncio.create_task(there.load("b"))
            await until(lambda: scraped(registry)["lorax_slots_used"] == 2)
            samples = scraped(registry)
            assert (samples["lorax_leases"], samples["lorax_waiting"]) == (2, 1)
            source.allow("b", 0, 1, 2, 3)
            (await waiting).release()
            first.release()
            second.release()
            samples = scraped(registry)
            assert (samples["lorax_leases"], samples["lorax_waiting"]) == (0, 0)


async def test_what_fails_for_one_caller_alone(tmp_path: Path) -> None:
    """A deadline is a caller's: the load goes on for others, and has not failed."""
    source = stocked(tmp_path, "a")
    source.put("large", *tiny.files(tiny.write(tmp_path / "large", rank=64)))
    async with over(source, device_bytes=2 * ONE) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            with pytest.raises(CapacityError):
                await there.load("large")
            source.hold("a")
            with pytest.raises(AdapterTimeoutError):
                await there.load("a", timeout=0.01)
            cancelled = asyncio.create_task(there.load("a"))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            samples = scraped(registry)
    assert "error=CapacityError,stage=queue" in of(samples, "lorax_failures_total")
    errors = of(samples, "lorax_call_errors_total")
    assert errors.pop("error=CapacityError,stage=queue") == 1
    ((kind, count),) = errors.items()
    assert (kind.split(",")[0], count) == ("error=AdapterTimeoutError", 1)


async def test_who_joins_a_load_or_waits_for_an_unload_is_no_hit(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            source.hold("a")
            both = [asyncio.create_task(there.load("a")) for _ in range(2)]
            await until(lambda: there.usage().waiting == 2)
            source.allow("a", 0, 1, 2, 3)
            first, second = await asyncio.gather(*both)
            leaving = asyncio.create_task(there.unload("a"))
            await asyncio.sleep(0)
            again = asyncio.create_task(there.load("a"))
            await until(lambda: there.usage().waiting == 1)
            first.release()
            second.release()
            await leaving
            (await again).release()
            samples = scraped(registry)
    hits = {"tier=device": 0, "tier=host": 0, "tier=disk": 1, "tier=source": 2}
    assert of(samples, "lorax_hits_total") == hits
    assert of(samples, "lorax_evictions_total")["tier=device"] == 0, "it made room for nobody"


async def test_hits_in_page_locked_memory(tmp_path: Path) -> None:
    """Room for two images: the third adapter takes that of the first."""
    source = stocked(tmp_path, "a", "b", "c")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 2 * PADDED}
    async with over(source, **settings) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            await loaded(there, "a", "b", "a", "c", "b")
            samples = scraped(registry)
    hits = {"tier=device": 0, "tier=host": 1, "tier=disk": 1, "tier=source": 3}
    assert of(samples, "lorax_hits_total") == hits
    evictions = {"tier=device": 4, "tier=host": 0, "tier=pinned": 2}
    assert of(samples, "lorax_evictions_total") == evictions
    assert samples["lorax_budget_used_bytes{budget=pinned}"] == 2 * PADDED
    assert samples["lorax_budget_limit_bytes{budget=pinned}"] == 2 * PADDED


async def test_hits_in_held_memory(tmp_path: Path) -> None:
    """What the device lets go goes on in host memory, which has room for one file."""
    source = stocked(tmp_path, "a", "b", holdable=True)
    nbytes = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    async with over(source, max_slots=1, host_bytes=nbytes) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            await there.prefetch("a", tier="host")
            assert scraped(registry)["lorax_budget_used_bytes{budget=host}"] == nbytes
            await loaded(there, "a")
            await there.prefetch("b", tier="host")
            samples = scraped(registry)
    assert of(samples, "lorax_hits_total")["tier=host"] == 1, "hints are no loads"
    assert sum(of(samples, "lorax_hits_total").values()) == 1
    assert of(samples, "lorax_evictions_total")["tier=host"] == 1
    assert samples["lorax_budget_limit_bytes{budget=host}"] == nbytes


async def test_tensors_in_memory_and_on_disk(tmp_path: Path) -> None:
    """Memory has room for one: the other goes to the disk cache, and is read from there."""
    async with roomy(tmp_path, 1, max_slots=1) as there:
        with LoaderCollector(there) as collector:
            registry = registered(collector)
            assert "lorax_budget_used_bytes{budget=cache}" not in scraped(registry)
            for seed, name in enumerate(("one", "two")):
                made = await there.load_tensors(name, tiny.tensors(seed), tiny.config())
                made.release()
            before = scraped(registry)
            await loaded(there, "one", "two")
            after = scraped(registry)
    last = scraped(registry)
    used = {budget: before[f"lorax_budget_used_bytes{{budget={budget}}}"] for budget in KEPT}
    assert all(ONE < nbytes < FILE + 1_000 for nbytes in used.values()), used
    assert before["lorax_budget_limit_bytes{budget=memory}"] == there.config.memory_bytes
    assert before["lorax_budget_limit_bytes{budget=cache}"] == there.config.cache_bytes
    assert after["lorax_spills_total"] == before["lorax_spills_total"] == 1
    hits = [of(samples, "lorax_hits_total") for samples in (before, after)]
    gained = {tier: hits[1][tier] - hits[0][tier] for tier in hits[0]}
    assert gained == {"tier=device": 0, "tier=host": 1, "tier=disk": 1, "tier=source": 0}
    assert "lorax_budget_used_bytes{budget=cache}" in last
