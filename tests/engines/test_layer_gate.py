"""Passes that go on without an adapter that fails, or does not come in time."""

from __future__ import annotations

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common import until
from engines.gate_inputs import adapters, expected, forward, source
from engines.variants import PEFT_WARNING, logits_of, prompt, serving, streaming
from lorax_async import AdapterTimeoutError, FetchError, HandleClosedError, UsageError
from lorax_async.testing import FakeSource
from lorax_kernels import dense

__all__ = ["adapters", "source"]

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_spent_budget_takes_out_the_rows_that_wait(
    small: Any, adapters: list[Path], source: FakeSource, dtype: str
) -> None:
    small = copy.deepcopy(small).to(getattr(torch, dtype))
    whole = await expected(small, adapters, dtype=dtype)
    async with streaming(small, source, dtype=dtype) as (attached, warm, cold):
        source.allow("cold", 0)
        await cold.layer_ready(0)
        with attached.batch([warm, cold, None], budget=0.01) as gate:
            logits = await forward(small)
            (error,) = gate.out.values()
            assert set(gate.out) == {1}
            assert isinstance(error, AdapterTimeoutError)
            assert (error.id, error.retryable) == ("cold", True)
            assert torch.equal(logits[[0, 2]], whole[[0, 2]])
            assert not torch.equal(logits[1], whole[1])
            source.allow("cold")
            await cold.layer_ready(cold.layers[-1])
            again = await forward(small)
            assert set(gate.out) == {1}  # its first pass was wrong: it begins anew
        with attached.batch([warm, None, None], budget=0.01):
            assert torch.equal(again, await forward(small))
        with attached.batch([warm, cold, None], budget=0.01) as gate:
            assert torch.equal(await forward(small), whole)
            assert not gate.out


async def test_where_rows_may_be_out_no_product_is_of_several_adapters(
    small: Any, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real shapes, rows' last bits would depend on who is out."""
    small, made, original = (
        copy.deepcopy(small).bfloat16(),
        list[torch.Tensor](),
        dense.Dense.expand,
    )

    def expand(self: dense.Dense, y: torch.Tensor) -> None:
        made.append(y)
        original(self, y)

    monkeypatch.setattr(dense.Dense, "expand", expand)
    async with streaming(small, source, dtype="bfloat16") as (attached, warm, cold):

        async def pass_twice(budget: float | None) -> int:
            """With how many products of several."""
            made.clear()
            with attached.batch([warm, cold, None], budget):
                source.allow("cold")
                for _ in range(2):  # the kernels know the batch from then on
                    await forward(small)
            return len(made)

        assert await pass_twice(60.0) == 0
        assert min([await pass_twice(budget) for budget in (60.0, None)]) > 0  # all is there


async def test_a_layer_within_the_budget_is_waited_for(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    whole = await expected(small, adapters)
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold, None], budget=60.0) as gate:
            passing = asyncio.create_task(forward(small))
            await asyncio.sleep(0.05)
            assert not passing.done()
            source.allow("cold")
            assert torch.equal(await passing, whole)
            assert not gate.out


async def test_a_failure_in_mid_stream_takes_out_its_own_rows(
    small: Any, source: FakeSource
) -> None:
    source.fail("bring", FetchError("the line is down"), id="cold", at=1)
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([cold, warm, None, cold], budget=60.0) as gate:
            passing = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(4)))
            source.allow("cold")
            logits = await passing
            assert set(gate.out) == {0, 3}
            assert all("the line is down" in str(error) for error in gate.out.values())
        with attached.batch([None, warm, None, None]):
            assert torch.equal(logits[1:3], logits_of(small, prompt(4))[1:3])


async def test_a_handle_that_is_released_takes_out_its_own_rows(
    small: Any, source: FakeSource
) -> None:
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold, None], budget=60.0) as gate:
            passing = asyncio.create_task(forward(small))
            await asyncio.sleep(0.05)
            cold.release()
            await passing
            assert isinstance(gate.out[1], HandleClosedError)


async def test_a_handle_that_is_released_leaves_others_of_its_adapter_alone(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    """Two requests for one adapter: one of them is given up in the midst."""
    async with (
        serving(small) as (loader, attached),
        await loader.load(adapters[1]) as warm,
        await loader.load(adapters[0]) as cold,
    ):
        with attached.batch([cold, cold, warm, None]):
            whole = logits_of(small, prompt(4))
    async with (
        serving(small, source=source) as (loader, attached),
        await loader.load("warm") as warm,
        loader.stream("cold") as cold,
        cold.clone() as twin,
    ):
        with attached.batch([cold, twin, warm, None], budget=60.0) as gate:
            passing = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(4)))
            await asyncio.sleep(0.05)
            cold.release()
            await asyncio.sleep(0.05)
            source.allow("cold")
            logits = await passing
            assert set(gate.out) == {0}
            assert torch.equal(logits[1:], whole[1:])


async def test_an_adapter_that_failed_before_its_batch_takes_out_its_own_rows(
    small: Any, source: FakeSource
) -> None:
    """It did so between the scheduler's choice and the pass."""
    source.fail("bring", FetchError("the line is down"), id="cold", at=0)
    async with (
        serving(small, source=source) as (loader, attached),
        await loader.load("warm") as warm,
        loader.stream("cold") as cold,
    ):
        source.allow("cold")
        with pytest.raises(FetchError):
            await cold.layer_ready(0)
        with pytest.raises(FetchError), attached.batch([cold, warm]):
            pass
        with attached.batch([cold, warm, None], budget=60.0) as gate:
            logits = await forward(small)
            (error,) = gate.out.values()
            assert set(gate.out) == {0}
            assert isinstance(error, FetchError)
        with attached.batch([None, warm, None], budget=60.0):
            assert torch.equal(logits, await forward(small))
        cold.release()
        with pytest.raises(HandleClosedError), attached.batch([cold, warm], budget=60.0):
            pass


async def test_what_is_on_this_machine_is_waited_for_beyond_the_budget(
    small: Any, adapters: list[Path], source: FakeSource, monkeypatch: Any
) -> None:
    """Its bytes are here, and no thread has copied them yet."""
    from lorax_async.io.transfer import Transfer

    go, original = threading.Event(), Transfer.run

    def late(self: Transfer, *arguments: Any) -> Any:
        assert go.wait(10)
        return original(self, *arguments)

    try:
        whole = await expected(small, adapters)
        async with streaming(small, source) as (attached, warm, cold):
            monkeypatch.setattr(Transfer, "run", late)
            assert warm.arrived > cold.arrived
            source.allow("cold")
            await until(lambda: cold.arrived)
            assert not cold.is_ready(0)
            with attached.batch([warm, cold, None], budget=0.0) as gate:
                passing = asyncio.create_task(forward(small))
                await asyncio.sleep(0.05)
                assert not passing.done()
                go.set()
                assert torch.equal(await passing, whole)
                assert not gate.out
    finally:
        go.set()


async def test_each_pass_has_the_whole_budget(small: Any, source: FakeSource) -> None:
    """By what a pass leaves of it: a second one is not out for what the first has waited."""
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold], budget=30.0) as gate:
            passing = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(2)))
            await asyncio.sleep(0.05)
            source.allow("cold")
            await passing
            spent = gate.left
            assert 0 < spent < 30.0
            gate.enter(-1)
            assert gate.left == 30.0


async def test_on_the_loops_thread_nobody_is_taken_out_for_it(
    small: Any, source: FakeSource
) -> None:
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold], budget=1.0) as gate:
            with pytest.raises(UsageError, match=r"layer 0 .*asyncio\.to_thread"):
                logits_of(small, prompt(2))
            assert not gate.out
        source.allow("cold")


@pytest.mark.parametrize("budget", [-1.0, float("inf"), float("nan")])
def test_no_budget(small: Any, adapters: list[Path], budget: float) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapters[0]) as handle:
            with pytest.raises(UsageError, match="budget"), attached.batch([handle], budget):
                pass

    asyncio.run(main())
