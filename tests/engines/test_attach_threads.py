"""Batches in threads, passes that outlive their block, and handles that still stream."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common import until
from engines.variants import PEFT_WARNING, logits_of, prompt, serving
from lorax_async import AdapterTimeoutError, FetchError, HandleClosedError, UsageError
from lorax_async.testing import FakeSource

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


# -- threads -----------------------------------------------------------------------------------


async def test_tasks_and_threads_have_batches_of_their_own(
    small: Any, adapters: list[Path]
) -> None:
    async with serving(small) as (loader, attached):
        handles = [await loader.load(adapter) for adapter in adapters]
        together = threading.Barrier(2)

        def forward() -> list[torch.Tensor]:
            together.wait(10)
            return [logits_of(small, prompt(1)) for _ in range(20)]

        async def one(handle: Any) -> list[torch.Tensor]:
            with attached.batch([handle]):
                return await asyncio.to_thread(forward)

        seen = await asyncio.gather(*map(one, handles))
        for handle, logits in zip(handles, seen, strict=True):
            with attached.batch([handle]):
                expected = logits_of(small, prompt(1))
            assert all(torch.equal(each, expected) for each in logits)
            handle.release()
        assert not torch.equal(seen[0][0], seen[1][0])


def test_a_bare_thread_needs_the_context(small: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        loop, forward = asyncio.get_running_loop(), partial(logits_of, small, prompt(1))
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with ThreadPoolExecutor(1) as pool, attached.batch([handle]):
                expected = forward()
                with pytest.raises(UsageError, match="copy_context"):
                    await loop.run_in_executor(pool, forward)
                run = contextvars.copy_context().run
                assert torch.equal(await loop.run_in_executor(pool, run, forward), expected)

    asyncio.run(main())


def test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter(
    small: Any, adapters: list[Path]
) -> None:
    """As when a task that awaits `asyncio.to_thread` is cancelled: the thread goes on."""
    inside, go_on = threading.Event(), threading.Event()
    linear = small.model.layers[1].self_attn.q_proj
    base = linear.forward

    def slow(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        go_on.wait(10)
        y: torch.Tensor = base(x)
        return y

    async def main() -> None:
        async with serving(small, max_slots=1) as (loader, attached):
            handle = await loader.load(adapters[0])
            with attached.batch([handle]):
                forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
                await asyncio.to_thread(inside.wait, 10)
            handle.release()
            waiting = asyncio.create_task(loader.load(adapters[1]))
            await asyncio.sleep(0.1)
            assert not waiting.done()  # the linear still reads the first adapter's bytes
            go_on.set()
            with pytest.raises(UsageError, match="block of this batch was left"):
                await forward
            async with asyncio.timeout(10), await waiting:
                pass

    linear.forward = slow
    try:
        asyncio.run(main())
    finally:
        del linear.forward


def test_a_task_that_starts_after_its_block_is_refused(small: Any) -> None:
    async def main() -> None:
        async with serving(small) as (_, attached):
            with attached.batch([None]):
                late = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            with pytest.raises(UsageError, match="block of this batch was left"):
                await late

    asyncio.run(main())


# -- streaming handles -------------------------------------------------------------------------


def held_back(adapter: Path) -> FakeSource:
    source = FakeSource()
    files = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    source.put("held", *(file.read_bytes() for file in files))
    source.hold("held")
    return source


def test_the_loops_own_thread_does_not_wait_for_a_layer(small: Any, adapters: list[Path]) -> None:
    async def main() -> None:
        source = held_back(adapters[1])
        async with (
            serving(small, source=source) as (loader, attached),
            loader.stream("held") as handle,
        ):
            with attached.batch([handle]):
                with pytest.raises(UsageError, match=r"layer 0 .*asyncio\.to_thread"):
                    logits_of(small, prompt(1))
                source.allow("held")
                await handle.layer_ready(1)
                streamed = logits_of(small, prompt(1))  # here now: nothing to wait for
            assert not torch.equal(streamed, expected)

    expected = logits_of(small, prompt(1))
    asyncio.run(main())


def test_a_pass_ends_when_the_adapter_it_waits_for_is_lost(
    small: Any, adapters: list[Path]
) -> None:
    async def main() -> None:
        source = held_back(adapters[1])
        source.fail("bring", FetchError("the line is down"), at=1)
        async with (
            serving(small, source=source) as (loader, attached),
            loader.stream("held") as handle,
        ):
            with attached.batch([handle]):
                forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
                source.allow("held")
                with pytest.raises(FetchError, match="the line is down"):
                    await forward

    asyncio.run(main())


async def test_a_pass_does_not_wait_for_an_adapter_that_came_too_late_for_itself(
    small: Any, adapters: list[Path]
) -> None:
    """Its error is of the kind that a look in vain raises, too."""
    source = held_back(adapters[1])
    source.fail("bring", AdapterTimeoutError("too late for itself"), at=1)
    looked = threading.Event()

    def others_wait() -> bool:
        looked.set()
        return False

    async with (
        serving(small, source=source, timeout=1000.0) as (loader, attached),
        loader.stream("held") as handle,
    ):
        with attached.batch([handle], 0.0, others_wait) as gate:
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            await until(looked.is_set)  # it waits by now
            source.allow("held")
            await asyncio.wait_for(forward, 10)
            assert "too late for itself" in str(gate.out[0])


async def test_a_pass_and_a_task_end_when_the_handle_they_wait_for_is_released(
    small: Any, adapters: list[Path]
) -> None:
    source = held_back(adapters[1])
    async with (
        serving(small, source=source) as (loader, attached),
        loader.stream("held") as handle,
    ):
        with attached.batch([handle]):
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            layer = asyncio.create_task(handle.layer_ready(0))
            await asyncio.sleep(0.1)
            handle.release()
            async with asyncio.timeout(10):
                for waiting in (forward, layer):
                    with pytest.raises(HandleClosedError):
                        await waiting
