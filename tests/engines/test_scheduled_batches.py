"""The whole way: requests for adapters that still come become mixed batches, as PEFT has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

import tiny
from engines.variants import active, llama, logits_of, prompt, serving
from lorax_async.scheduler.requests import Request
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.scheduler.step import Batch
from lorax_async.testing import FakeSource
from scheduling.page import functions


async def test_the_pages_engine_answers_as_peft_and_computes_again_what_did_not_come(
    small: Any, adapters: list[Path]
) -> None:
    source, compute = FakeSource(), functions()["compute_streaming"]
    for id, folder in (("cold", adapters[0]), ("warm", adapters[1])):
        source.put(id, *tiny.files(folder))
    source.hold("cold")
    source.allow("cold", 0)
    computed: list[torch.Tensor] = []

    def forward(batch: Batch) -> None:
        computed.append(logits_of(small, prompt(len(batch.rows))))

    async with (
        serving(small, source=source, max_slots=2) as (loader, attached),
        AdapterScheduler(loader) as scheduler,
    ):
        (await loader.load("warm")).release()
        cold = scheduler.submit(Request("cold", 5, 1))
        batch = await scheduler.next_batch(100, 8)
        assert len(batch.streaming) == 1
        passing = asyncio.create_task(compute(scheduler, attached, batch, forward))
        others = [scheduler.submit(Request(id, 5, 1)) for id in ("warm", None, "warm")]
        await passing  # nobody waits for "cold" any more
        assert (cold.generated, cold.done) == (0, False)
        source.allow("cold")
        names: list[str] = []
        while not names.count("cold"):
            batch = await scheduler.next_batch(100, 8)
            names = ["__base__" if h is None else str(h.id) for h in batch.handles]
            await compute(scheduler, attached, batch, forward)
            with active(llama(), cold=adapters[0], warm=adapters[1]) as peft_model:
                expected = logits_of(peft_model, prompt(len(names)), adapter_names=names)
            if not batch.streaming:
                torch.testing.assert_close(computed[-1], expected, atol=1e-4, rtol=1e-4)
        assert [await ticket for ticket in (cold, *others)] == [1] * 4
