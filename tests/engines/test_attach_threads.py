"""Batches in threads, and passes that outlive their block."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.conftest import Served
from engines.variants import logits_of, prompt, serving
from lorax_async import UsageError


async def test_tasks_and_threads_have_batches_of_their_own(small: Any, served: Served) -> None:
    together = threading.Barrier(2)

    def forward() -> list[torch.Tensor]:
        together.wait(10)
        return [logits_of(small, prompt(1)) for _ in range(20)]

    async def one(handle: Any) -> list[torch.Tensor]:
        with served.attached.batch([handle]):
            return await asyncio.to_thread(forward)

    handles = (served.first, served.second)
    seen = await asyncio.gather(*map(one, handles))
    for handle, logits in zip(handles, seen, strict=True):
        with served.attached.batch([handle]):
            expected = logits_of(small, prompt(1))
        assert all(torch.equal(each, expected) for each in logits)
    assert not torch.equal(seen[0][0], seen[1][0])


async def test_a_bare_thread_needs_the_context(small: Any, served: Served) -> None:
    loop, forward = asyncio.get_running_loop(), partial(logits_of, small, prompt(1))
    with ThreadPoolExecutor(1) as pool, served.attached.batch([served.first]):
        expected = forward()
        with pytest.raises(UsageError, match="copy_context"):
            await loop.run_in_executor(pool, forward)
        run = contextvars.copy_context().run
        assert torch.equal(await loop.run_in_executor(pool, run, forward), expected)


async def test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter(
    small: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a task that awaits `asyncio.to_thread` is cancelled: the thread goes on."""
    inside, go_on = threading.Event(), threading.Event()
    linear = small.model.layers[1].self_attn.q_proj
    base: Callable[[torch.Tensor], torch.Tensor] = linear.forward

    def slow(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        go_on.wait(10)
        return base(x)

    monkeypatch.setattr(linear, "forward", slow)
    async with serving(small, max_slots=1) as (loader, attached):
        handle = await loader.load(adapters[0])
        with attached.batch([handle]):
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            await asyncio.to_thread(inside.wait, 10)
        handle.release()
        waiting = asyncio.create_task(loader.load(adapters[1]))
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()  # the linear still reads the first adapter's bytes
        go_on.set()
        with pytest.raises(UsageError, match="block of this batch was left"):
            await forward
        async with asyncio.timeout(10), await waiting:
            pass


async def test_a_task_that_starts_after_its_block_is_refused(small: Any, served: Served) -> None:
    with served.attached.batch([None]):
        late = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
    with pytest.raises(UsageError, match="block of this batch was left"):
        await late
