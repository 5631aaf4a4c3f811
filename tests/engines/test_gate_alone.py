"""A batch of one adapter: the gate waits for it, for nobody could be computed meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from engines.gate_inputs import adapters, source
from engines.variants import PEFT_WARNING, logits_of, prompt, serving
from lorax_async import AdapterTimeoutError
from lorax_async.testing import FakeSource

__all__ = ["adapters", "source"]

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


async def test_who_is_alone_waits_beyond_the_budget(small: Any, source: FakeSource) -> None:
    async with (
        serving(small, source=source) as (loader, attached),
        loader.stream("cold") as cold,
        cold.clone() as twin,
    ):
        with attached.batch([cold, twin], budget=0.0) as gate:
            passing = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(2)))
            await asyncio.sleep(0.05)
            assert not passing.done()
            source.allow("cold")
            streamed = await passing
            assert not gate.out
            assert torch.equal(streamed, logits_of(small, prompt(2)))


async def test_who_is_alone_waits_no_longer_when_others_could_be_computed(
    small: Any, source: FakeSource
) -> None:
    others = threading.Event()
    async with (
        serving(small, source=source) as (loader, attached),
        loader.stream("cold") as cold,
    ):
        with attached.batch([cold], budget=0.0, others_wait=others.is_set) as gate:
            passing = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            await asyncio.sleep(0.05)
            assert not passing.done()
            others.set()
            await passing
            assert isinstance(gate.out[0], AdapterTimeoutError)
            assert "others could be computed" in str(gate.out[0])


async def test_who_is_alone_waits_as_long_as_the_loader_says(
    small: Any, source: FakeSource
) -> None:
    async with (
        serving(small, source=source, timeout=0.2) as (loader, attached),
        loader.stream("cold") as cold,
    ):
        with attached.batch([cold], budget=0.0) as gate:
            await asyncio.to_thread(logits_of, small, prompt(1))
            assert "within 0.2 s" in str(gate.out[0])
