"""The whole way: requests for adapters behind a slow link become mixed batches, as PEFT has them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

import tiny
from engines.variants import PEFT_WARNING, active, logits_of, prompt, serving
from lorax_async import (
    AdapterScheduler,
    Allow,
    Batch,
    Event,
    HandleClosedError,
    Request,
    Resident,
    SlotGranted,
    Ticket,
)
from lorax_async.commands.slow_server import SlowServer
from lorax_async.engines.transformers import Attached
from lorax_async.testing import FakeSource
from scheduling.page import functions

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING), pytest.mark.slow]

STYLES = ("pirate", "shout", "json")
BASE = "__base__"
RATE = 700_000.0
"""Bytes per second: an adapter of 1 MB takes longer than a pass."""
PROMPT, TOKENS = 32, 2
WAVES = (
    (BASE,),  # shows how long a pass takes
    ("pirate",),  # alone: nothing else is computed while its layers come
    ("shout", "json", "pirate", BASE, "shout"),
    ("pirate", BASE, "json"),
)


@dataclass
class Engine:
    """Computes every sequence anew from its first token, so that it depends on no earlier batch."""

    model: Any
    peft_model: Any
    attached: Attached
    names: dict[Ticket, str] = field(default_factory=dict)
    sequences: dict[Ticket, list[int]] = field(default_factory=dict)
    began: list[tuple[Batch, float]] = field(default_factory=list)
    """When the first layer of a batch was entered whose adapters were still on their way."""

    def submit(self, scheduler: AdapterScheduler, name: str, url: str | None) -> Ticket:
        ticket = scheduler.submit(Request(url, PROMPT, TOKENS))
        start = 1000 + 37 * len(self.names)
        self.names[ticket] = name
        self.sequences[ticket] = list(range(start, start + PROMPT))
        return ticket

    async def serve(self, scheduler: AdapterScheduler) -> None:
        async for batch in scheduler.batches(max_tokens=4096, max_sequences=8):
            batch.check()
            again = await self._compute(batch)
            scheduler.complete(batch, again=again)
            with pytest.raises(HandleClosedError):
                batch.check()

    async def _compute(self, batch: Batch) -> list[Ticket]:
        inputs = self._inputs(batch)
        waits = partial(getattr, batch, "others_wait")
        with self.attached.batch(batch.handles, batch.budget, waits) as gate, self._noted(batch):
            logits = (await asyncio.to_thread(logits_of, self.model, inputs))[:, -1]
        names = [self.names[row.ticket] for row in batch.rows]
        expected = await asyncio.to_thread(logits_of, self.peft_model, inputs, adapter_names=names)
        good = [number for number in range(len(batch.rows)) if number not in gate.out]
        torch.testing.assert_close(logits[good], expected[good, -1], atol=1e-3, rtol=1e-4)
        for number in good:
            row = batch.rows[number]
            assert row.last
            self.sequences[row.ticket].append(int(logits[number].argmax()))
        return [batch.rows[number].ticket for number in gate.out]

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Padded on the left."""
        rows = [self.sequences[row.ticket] for row in batch.rows]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    @contextmanager
    def _noted(self, batch: Batch) -> Iterator[None]:
        def note(*_: object) -> None:
            if batch.streaming:
                self.began.append((batch, monotonic()))

        hook = self.model.model.layers[0].register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()


@pytest.fixture
def server(examples: Path) -> Iterator[SlowServer]:
    files = {
        f"/{name}/{file}": (examples / name / file).read_bytes()
        for name in STYLES
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    with SlowServer(files, RATE) as running:
        yield running


def test_mixed_batches_are_pefts_while_adapters_come_and_go(
    model: Any, theirs: Any, examples: Path, server: SlowServer, tmp_path: Path
) -> None:
    """Three adapters on two slots."""

    async def main(peft_model: Any) -> None:
        heard: list[Event] = []
        settings = {
            "max_slots": 2,
            "connections": 1,  # one line: its layers come in their order
            "cache_dir": tmp_path,
            "allow": (Allow("http", "127.0.0.1", server.server_port),),
        }
        async with (
            serving(model, **settings) as (loader, attached),
            AdapterScheduler(loader) as scheduler,
        ):
            loader.subscribe(heard.append)
            engine = Engine(model, peft_model, attached)
            serve = asyncio.create_task(engine.serve(scheduler))
            for wave in WAVES:
                tickets = [
                    engine.submit(scheduler, name, None if name == BASE else server.url(name))
                    for name in wave
                ]
                for ticket in tickets:
                    await first_of(serve, ticket)
                    assert ticket.generated == TOKENS
            await scheduler.close()
            await serve
        granted = [event.key for event in heard if isinstance(event, SlotGranted)]
        assert len(granted) > len(STYLES) == len(set(granted))  # somebody went, and came back
        assert began_early(engine, heard)

    folders = {name: examples / name for name in STYLES}
    with active(theirs, **folders) as peft_model:
        asyncio.run(main(peft_model))


async def first_of(serve: asyncio.Task[None], ticket: Ticket) -> None:
    """Wait for the ticket, and no longer than the engine serves."""
    waiting = asyncio.ensure_future(ticket)
    await asyncio.wait([serve, waiting], return_when=asyncio.FIRST_COMPLETED)
    if serve.done():
        waiting.cancel()
        serve.result()
    await waiting


def began_early(engine: Engine, heard: list[Event]) -> list[Batch]:
    """Batches whose first layer was entered before the last byte of one of their adapters came."""
    resident = {
        (event.slot.index, event.slot.generation): event.time
        for event in heard
        if isinstance(event, Resident) and event.slot is not None
    }
    return [
        batch
        for batch, start in engine.began
        for row in batch.rows
        if (place := (row.place.slot, row.place.generation)) in resident and start < resident[place]
    ]


async def test_the_pages_engine_computes_again_what_did_not_come(
    small: Any, adapters: list[Path]
) -> None:
    source = FakeSource()
    source.put("cold", *tiny.files(adapters[0]))
    source.hold("cold")
    source.allow("cold", 0)
    compute = functions()["compute_streaming"]

    def forward(batch: Batch) -> None:
        logits_of(small, prompt(len(batch.rows)))

    async with (
        serving(small, source=source) as (loader, attached),
        AdapterScheduler(loader) as scheduler,
    ):
        cold = scheduler.submit(Request("cold", 5, 1))
        batch = await scheduler.next_batch(100, 8)
        assert len(batch.streaming) == 1
        passing = asyncio.create_task(compute(scheduler, attached, batch, forward))
        base = scheduler.submit(Request(None, 5, 1))  # nobody waits for "cold" any more
        await passing
        assert (cold.generated, cold.done) == (0, False)
        batch = await scheduler.next_batch(100, 8)
        await compute(scheduler, attached, batch, forward)
        assert await base == 1
        source.allow("cold")
        batch = await scheduler.next_batch(100, 8)
        assert ([row.start for row in batch.rows], batch.streaming) == ([0], ())
        await compute(scheduler, attached, batch, forward)
        assert await cold == 1
