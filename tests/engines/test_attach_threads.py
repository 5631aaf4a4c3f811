"""Batches in threads, passes that outlive their block, handles that stream; and locks between them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from common import until
from engines.conftest import Served
from engines.variants import logits_of, prompt, serving
from lorax_async import AdapterTimeoutError, FetchError, HandleClosedError, UsageError
from lorax_async.testing import FakeSource

# -- threads --------------------------------------------------------------------------------------


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


# -- streaming handles ----------------------------------------------------------------------------


@pytest.fixture
def source(adapters: list[Path]) -> Iterator[FakeSource]:
    source = FakeSource()
    source.put("held", *tiny.files(adapters[1]))
    source.hold("held")
    yield source
    source.allow("held")


@asynccontextmanager
async def streaming(small: Any, source: FakeSource, **settings: Any) -> Any:
    async with (
        serving(small, source=source, **settings) as (loader, attached),
        loader.stream("held") as handle,
    ):
        yield attached, handle


def forward(small: Any) -> asyncio.Task[torch.Tensor]:
    return asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))


async def test_the_loops_own_thread_does_not_wait_for_a_layer(
    small: Any, source: FakeSource
) -> None:
    base = logits_of(small, prompt(1))
    async with streaming(small, source) as (attached, handle):
        with attached.batch([handle]):
            with pytest.raises(UsageError, match=r"layer 0 .*asyncio\.to_thread"):
                logits_of(small, prompt(1))
            source.allow("held")
            await handle.layer_ready(1)
            assert not torch.equal(logits_of(small, prompt(1)), base)  # here now


async def test_a_pass_ends_when_the_adapter_it_waits_for_is_lost(
    small: Any, source: FakeSource
) -> None:
    source.fail("bring", FetchError("the line is down"), at=1)
    async with streaming(small, source) as (attached, handle):
        with attached.batch([handle]):
            passing = forward(small)
            source.allow("held")
            with pytest.raises(FetchError, match="the line is down"):
                await passing


async def test_a_pass_does_not_wait_for_an_adapter_that_came_too_late_for_itself(
    small: Any, source: FakeSource
) -> None:
    """Its error is of the kind that a look in vain raises, too."""
    source.fail("bring", AdapterTimeoutError("too late for itself"), at=1)
    looked = threading.Event()

    def others_wait() -> bool:
        looked.set()
        return False

    async with streaming(small, source, timeout=1000.0) as (attached, handle):
        with attached.batch([handle], 0.0, others_wait) as gate:
            passing = forward(small)
            await until(looked.is_set)  # it waits by now
            source.allow("held")
            await asyncio.wait_for(passing, 10)
            assert "too late for itself" in str(gate.out[0])


async def test_a_pass_and_a_task_end_when_the_handle_they_wait_for_is_released(
    small: Any, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with streaming(small, source) as (attached, handle):
        waits, real = threading.Event(), type(handle).wait_layer

        def wait_layer(*args: Any, **kwargs: Any) -> None:
            waits.set()
            real(*args, **kwargs)

        monkeypatch.setattr(type(handle), "wait_layer", wait_layer)
        with attached.batch([handle]):
            passing, layer = forward(small), asyncio.create_task(handle.layer_ready(0))
            await until(waits.is_set)
            handle.release()
            async with asyncio.timeout(10):
                for waiting in (passing, layer):
                    with pytest.raises(HandleClosedError):
                        await waiting
