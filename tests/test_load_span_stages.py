"""Which stage each of several callers of one adapter is told of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from opentelemetry.trace import Tracer

from common import until
from lorax_async.adapter import AdapterKey
from lorax_async.load_spans import LoadSpans
from spans_kept import Kept, calls, kept, load, stages, tracer
from tiny_sources import over, stocked

__all__ = ["kept", "tracer"]

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_who_joins_while_bytes_still_come_waits_for_the_copy(
    tmp_path: Path, kept: Kept, tracer: Tracer
) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with LoadSpans(there, tracer):
            source.hold("a")
            async with there.stream("a") as handle:
                source.allow("a", 0)
                await handle.layer_ready(0)
                joining = asyncio.create_task(load(there, "a"))
                await until(lambda: there.usage().waiting)
                source.allow("a", 1, 2, 3)
                await joining
    _, (joined, its) = calls(kept)
    assert joined.name == "lorax load"
    assert stages(its) == ["resolve", "copy"]


async def test_a_stage_is_entered_only_further_on(
    tmp_path: Path, kept: Kept, tracer: Tracer
) -> None:
    """What was checked may be checked again, while it waits for a slot, and in one."""
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        before = await there.load("b")
        with LoadSpans(there, tracer) as spans:
            source.hold("a")
            waiting = asyncio.create_task(load(there, "a"))
            await until(lambda: bool(spans._calls))
            (call,) = spans._calls.values()
            await until(lambda: call._stage == "queue")
            assert call.key is not None
            spans.checked(call.key)
            before.release()
            await until(lambda: call._stage == "copy")
            spans.checked(call.key)
            source.allow("a", 0, 1, 2, 3)
            await waiting
    ((_, its),) = calls(kept)
    assert stages(its) == ["resolve", "fetch", "queue", "copy"]


async def test_news_of_one_adapter_look_at_no_others_calls(
    tmp_path: Path, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands may wait, and each layer is news."""
    names = [f"a{number}" for number in range(20)]
    source = stocked(tmp_path, *names)
    compared: list[object] = []
    plain = AdapterKey.__eq__

    def compare(key: AdapterKey, other: object) -> bool:
        compared.append(other)
        return plain(key, other)

    async with over(source, max_slots=20) as there:
        with LoadSpans(there, tracer):
            for name in names:
                source.hold(name)
            waiting = [asyncio.create_task(load(there, name)) for name in names]
            await until(lambda: there.usage().slots.used == 20)
            monkeypatch.setattr(AdapterKey, "__eq__", compare)
            source.allow("a7", 0, 1, 2, 3)
            await waiting[7]
            assert len(compared) < 20
            monkeypatch.undo()
            for name in names:
                source.allow(name, 0, 1, 2, 3)
            await asyncio.gather(*waiting)


async def test_who_is_further_than_another_caller_brings_it_stays_there(
    tmp_path: Path, kept: Kept, tracer: Tracer
) -> None:
    """It is told once more that its header was checked, and has its slot already."""
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with LoadSpans(there, tracer) as spans:
            source.hold("a")
            loading = asyncio.create_task(load(there, "a"))
            await until(lambda: there.usage().slots.used == 1)
            (call,) = spans._calls.values()
            assert call.key is not None
            spans.checked(call.key)
            source.allow("a", 0, 1, 2, 3)
            await loading
    ((_, its),) = calls(kept)
    assert stages(its) == ["resolve", "fetch", "queue", "copy"]
