"""Passes that go on without an adapter that fails, or does not come in time."""

import asyncio
import copy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tiny
import torch
from event_loops import until
from peft_adapters import active, llama, logits_of, prompt, serving, streaming
from scheduler_page import functions
from tiny_loaders import fails

from engines.conftest import Call, Served, watched
from lorax_async.devices.transfer import GroupTransfer
from lorax_async.errors import AdapterTimeoutError, FetchError, HandleClosedError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.scheduler.requests import Request
from lorax_async.scheduler.scheduler import AdapterScheduler, Batch
from lorax_async.testing import FakeSource
from lorax_kernels import dense

Paths = list[Path]
Patch = pytest.MonkeyPatch


async def logits_with_all(small: Any, adapters: list[Path], **settings: Any) -> torch.Tensor:
    async with (
        serving(small, **settings) as (loader, attached),
        await loader.load(adapters[2]) as warm,
        await loader.load(adapters[0]) as cold,
    ):
        with attached.batch([warm, cold, None]):
            return logits_of(small, prompt(3))


def forward(small: Any, rows: int = 3) -> asyncio.Task[torch.Tensor]:
    return asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(rows)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watched(monkeypatch, AdapterHandle, "wait_layer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_late_rows_leave(small: Any, adapters: Paths, source: FakeSource, dtype: str) -> None:
    small = copy.deepcopy(small).to(getattr(torch, dtype))
    whole = await logits_with_all(small, adapters, dtype=dtype)
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


async def test_products_mix_no_adapters(small: Any, source: FakeSource, monkeypatch: Patch) -> None:
    """On real shapes, rows' last bits would depend on who is out."""
    small, made = copy.deepcopy(small).bfloat16(), watched(monkeypatch, dense.Dense, "expand")
    async with streaming(small, source, dtype="bfloat16") as (attached, warm, cold):
        products = []
        for budget in (60.0, 60.0, None):
            made.clear()
            with attached.batch([warm, cold, None], budget):
                source.allow("cold")
                for _ in range(2):  # the kernels know the batch from then on
                    await forward(small)
            products.append(len(made))
    assert products[0] == 0
    assert min(products[1:]) > 0  # all is there


async def test_a_layer_within_the_budget_is_waited_for(
    small: Any, adapters: list[Path], source: FakeSource, waits: list[Call]
) -> None:
    whole = await logits_with_all(small, adapters)
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold, None], budget=60.0) as gate:
            passing = forward(small)
            await until(lambda: waits)
            assert not passing.done()
            source.allow("cold")
            assert torch.equal(await passing, whole)
            assert not gate.out
            assert 0 < gate.left < 60.0
            gate.enter(-1)
            assert gate.left == 60.0


@pytest.mark.parametrize("ends", ["fails", "is released", "failed before"])
async def test_an_adapter_that_ends_takes_out_its_own_rows(
    small: Any, source: FakeSource, waits: list[Call], ends: str
) -> None:
    if ends != "is released":
        source.fail("fetch_groups", FetchError("the line is down"), id="cold", at=1)
    async with streaming(small, source) as (attached, warm, cold):
        rows: list[Any] = [cold, warm, None, cold]
        if ends == "failed before":
            source.allow("cold")
            await fails(cold.layer_ready(cold.layers[-1]), FetchError)
            with pytest.raises(FetchError), attached.batch(rows):
                pass
        with attached.batch(rows, budget=60.0) as gate:
            passing = forward(small, 4)
            if ends == "is released":
                await until(lambda: waits)
                cold.release()
            source.allow("cold")
            logits = await passing
            assert set(gate.out) == {0, 3}
            kind = HandleClosedError if ends == "is released" else FetchError
            assert all(isinstance(error, kind) for error in gate.out.values())
        with attached.batch([None, warm, None, None]):
            assert torch.equal(logits[1:3], logits_of(small, prompt(4))[1:3])
        cold.release()
        with pytest.raises(HandleClosedError), attached.batch(rows, budget=60.0):
            pass


async def test_a_release_leaves_a_clone_alone(
    small: Any, source: FakeSource, waits: list[Call]
) -> None:
    """Two requests for one adapter: one of them is given up in the midst."""
    async with streaming(small, source) as (attached, warm, cold), cold.clone() as twin:
        with attached.batch([cold, twin, warm, None], budget=60.0) as gate:
            passing = forward(small, 4)
            await until(lambda: waits)
            cold.release()
            await asyncio.sleep(0.02)  # the pass hears of it before the layer comes
            source.allow("cold")
            logits = await passing
            assert set(gate.out) == {0}
        with attached.batch([None, twin, warm, None]):
            assert torch.equal(logits[1:], logits_of(small, prompt(4))[1:])


async def test_what_is_on_this_machine_is_waited_for_beyond_the_budget(
    small: Any, adapters: list[Path], source: FakeSource, monkeypatch: Any, waits: list[Call]
) -> None:
    """Its bytes are here, and no thread has copied them yet."""
    go, original = Event(), GroupTransfer.run

    def late(self: GroupTransfer, *arguments: Any) -> Any:
        assert go.wait(10)
        return original(self, *arguments)

    whole = await logits_with_all(small, adapters)
    try:
        async with streaming(small, source) as (attached, warm, cold):
            monkeypatch.setattr(GroupTransfer, "run", late)
            assert warm.arrived > cold.arrived
            source.allow("cold")
            await until(lambda: cold.arrived)
            assert not cold.is_ready(0)
            with attached.batch([warm, cold, None], budget=0.0) as gate:
                passing = forward(small)
                await until(lambda: waits)
                assert not passing.done()
                go.set()
                assert torch.equal(await passing, whole)
                assert not gate.out
    finally:
        go.set()


async def test_nobody_is_waited_for_on_the_loops_thread(small: Any, source: FakeSource) -> None:
    async with streaming(small, source) as (attached, warm, cold):
        for budget in (1.0, None):
            with attached.batch([warm, cold], budget) as gate:
                with pytest.raises(UsageError, match=r"layer 0 .*asyncio\.to_thread"):
                    logits_of(small, prompt(2))
                assert not gate.out
        source.allow("cold")
        await cold.layer_ready(cold.layers[-1])
        with attached.batch([warm, cold]):
            logits_of(small, prompt(2))  # here now: nothing to wait for


@pytest.mark.parametrize("released", [True, False])
async def test_without_a_budget_a_pass_raises_what_ended_its_adapter(
    small: Any, source: FakeSource, waits: list[Call], released: bool
) -> None:
    source.fail("fetch_groups", FetchError("the line is down"), id="cold", at=1)
    async with streaming(small, source) as (attached, warm, cold):
        with attached.batch([warm, cold]):
            passing, layer = forward(small, 2), asyncio.create_task(cold.layer_ready(1))
            await until(lambda: waits)
            if released:
                cold.release()
            else:
                source.allow("cold")
            for waiting in (passing, layer):
                error = HandleClosedError if released else FetchError
                await fails(asyncio.wait_for(waiting, 10), error)


async def test_a_budget_is_a_number_of_seconds(served: Served) -> None:
    for budget in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="budget"):
            served.attached.batch([served.first], budget).__enter__()


@pytest.mark.parametrize(
    ("timeout", "problem"), [(60.0, ""), (60.0, "others could be computed"), (0.2, "within 0.2 s")]
)
async def test_who_is_alone_waits_beyond_the_budget(
    small: Any, source: FakeSource, waits: list[Call], timeout: float, problem: str
) -> None:
    """Until others could be computed, or the loader waits no longer."""
    others, settings = Event(), {"timeout": timeout}
    async with streaming(small, source, **settings) as (attached, _, cold), cold.clone() as twin:
        with attached.batch([cold, twin], budget=0.0, others_wait=others.is_set) as gate:
            passing = forward(small, 2)
            await until(lambda: waits)
            if not problem:
                await asyncio.wait([passing], timeout=0.05)  # it looks several times
            assert not passing.done()
            if problem.startswith("others"):
                others.set()
            elif not problem:
                source.allow("cold")
            logits = await passing
            assert gate.out.keys() == ({0, 1} if problem else set())
            assert all(problem in str(error) for error in gate.out.values())
            assert all(isinstance(error, AdapterTimeoutError) for error in gate.out.values())
            assert problem or torch.equal(logits, logits_of(small, prompt(2)))


async def test_one_late_for_itself_is_let_go(
    small: Any, source: FakeSource, waits: list[Call]
) -> None:
    """Its error is of the kind that a look in vain raises, too."""
    source.fail("fetch_groups", AdapterTimeoutError("too late for itself"), id="cold", at=1)
    async with streaming(small, source, timeout=1000.0) as (attached, _, cold):
        with attached.batch([cold], budget=0.0) as gate:
            passing = forward(small, 1)
            await until(lambda: waits)
            source.allow("cold")
            await asyncio.wait_for(passing, 10)
            assert "too late for itself" in str(gate.out[0])


async def test_the_pages_engine_answers_as_peft_and_computes_again_what_did_not_come(
    small: Any, adapters: list[Path]
) -> None:
    source, compute = FakeSource(), functions()["compute_streaming"]
    for id, folder in (("cold", adapters[0]), ("warm", adapters[1])):
        source.put(id, *tiny.files(folder))
    source.hold("cold")
    source.allow("cold", 0)
    computed: list[torch.Tensor] = []

    def forward_batch(batch: Batch) -> None:
        computed.append(logits_of(small, prompt(len(batch.rows))))

    given: Any = {"source": source, "max_slots": 2}
    async with serving(small, **given) as (loader, attached), AdapterScheduler(loader) as scheduler:
        (await loader.load("warm")).release()
        cold = scheduler.submit(Request("cold", 5, 1))
        batch = await scheduler.next_batch(100, 8)
        assert len(batch.streaming) == 1
        passing = asyncio.create_task(compute(scheduler, attached, batch, forward_batch))
        others = [scheduler.submit(Request(id, 5, 1)) for id in ("warm", None, "warm")]
        await passing  # nobody waits for "cold" any more
        assert (cold.generated, cold.done) == (0, False)
        source.allow("cold")
        names: list[str] = []
        while not names.count("cold"):
            batch = await scheduler.next_batch(100, 8)
            names = ["__base__" if h is None else str(h.id) for h in batch.handles]
            await compute(scheduler, attached, batch, forward_batch)
            with active(llama(), cold=adapters[0], warm=adapters[1]) as peft_model:
                expected = logits_of(peft_model, prompt(len(names)), adapter_names=names)
            if not batch.streaming:
                torch.testing.assert_close(computed[-1], expected, atol=1e-4, rtol=1e-4)
        assert [await ticket for ticket in (cold, *others)] == [1] * 4
