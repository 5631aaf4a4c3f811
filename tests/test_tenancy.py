"""One adapter's stay in a slot: who waits for which layer, and who still holds it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant
from lorax_async.core.moves import GroupPlan
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.errors import FetchError, HandleClosedError, IntegrityError, UsageError
from lorax_async.events import SlotId
from lorax_async.runtime.tenancy import Lease, Tenancy

pytestmark = pytest.mark.each_loop

LAYERS = (-1, 0, 2, 4)
"""Of a model with four layers: 1 and 3 have no tensors, 4 is what comes after them."""
KEY = AdapterKey("somewhere", ())


def tenancy() -> Tenancy:
    groups = tuple(GroupPlan(layer, 64, (), (), (), (), ()) for layer in LAYERS)
    plan = TransferPlan(groups, "F32", 4, 256, 300)
    return Tenancy(KEY, Grant(SlotId(0, 1), ()), plan, 4)


def always() -> None: ...  # a check that has no objection


class Ends:
    """Hears of the ends of leases."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def lease(self, of: Tenancy) -> Lease:
        return Lease(of, self._ended, self._quiet)

    def _ended(self, lease: Lease, in_use: bool, soon: bool) -> None:
        assert not soon
        self.heard.append((lease, in_use))

    def _quiet(self, lease: Lease) -> None:
        self.heard.append(lease)


def ready_at(watermark: int) -> list[int]:
    stay = tenancy()
    stay.advance(watermark)
    return [layer for layer in range(-1, 5) if stay.is_ready(layer)]


def test_a_layer_is_ready_once_its_group_is() -> None:
    """A layer without tensors is ready from the start."""
    assert ready_at(0) == [1, 3]
    assert ready_at(1) == [-1, 1, 3]
    assert ready_at(2) == [-1, 0, 1, 3]
    assert ready_at(3) == [-1, 0, 1, 2, 3]
    assert ready_at(4) == [-1, 0, 1, 2, 3, 4]


def test_it_is_complete_with_its_last_group() -> None:
    stay = tenancy()
    assert stay.layers == LAYERS
    for watermark in range(5):
        stay.advance(watermark)
        assert stay.complete == (watermark == len(LAYERS))


@pytest.mark.parametrize("layer", [-2, 5])
async def test_layers_that_the_base_does_not_have(layer: int) -> None:
    stay = tenancy()
    for ask in (stay.is_ready, lambda layer: stay.wait(layer, 0, always)):
        with pytest.raises(UsageError, match=f"layer {layer} is outside -1 … 4"):
            ask(layer)
    with pytest.raises(UsageError, match="outside"):
        await stay.ready(layer, always)


async def test_tasks_wake_with_their_layer() -> None:
    stay = tenancy()
    waiting = {layer: asyncio.create_task(stay.ready(layer, always)) for layer in (4, 0, 2, 1)}
    await asyncio.sleep(0)
    for watermark, done in ((0, {1}), (1, {1}), (2, {0, 1}), (3, {0, 1, 2}), (4, {0, 1, 2, 4})):
        stay.advance(watermark)
        await asyncio.sleep(0.001)
        assert {layer for layer, task in waiting.items() if task.done()} == done
    await asyncio.gather(*waiting.values())
    await stay.ready(4, always)


async def test_a_cancelled_task_is_forgotten() -> None:
    stay = tenancy()
    tasks = [asyncio.create_task(stay.ready(0, always)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    stay.advance(4)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [type(None), asyncio.CancelledError, type(None)]


def test_threads_wake_with_their_layer() -> None:
    stay = tenancy()
    with ThreadPoolExecutor(3) as threads:
        waiting = {layer: threads.submit(stay.wait, layer, 10, always) for layer in (4, 0, 1)}
        waiting[1].result(10)
        time.sleep(0.02)
        assert not waiting[0].done()
        stay.advance(2)
        waiting[0].result(10)
        time.sleep(0.02)
        assert not waiting[4].done()
        stay.advance(4)
        waiting[4].result(10)


def test_a_thread_waits_no_longer_than_it_said() -> None:
    stay, started = tenancy(), time.monotonic()
    with pytest.raises(TimeoutError):
        stay.wait(0, 0.05, always)
    assert time.monotonic() - started >= 0.05
    stay.advance(2)
    stay.wait(0, 0, always)


def both_ways(stay: Tenancy, lease: Lease, happens: Callable[[], None]) -> list[BaseException]:
    """The errors of a task and of a thread that wait for the last layer while it happens."""

    async def body() -> list[BaseException]:
        loop = asyncio.get_running_loop()
        waits = [
            asyncio.ensure_future(stay.ready(4, lease.check)),
            asyncio.ensure_future(loop.run_in_executor(None, stay.wait, 4, 15, lease.check)),
        ]
        await asyncio.sleep(0.02)
        assert not any(wait.done() for wait in waits)
        happens()
        done, _ = await asyncio.wait(waits, timeout=10)
        errors = [error for wait in done if (error := wait.exception()) is not None]
        assert len(errors) == 2
        return errors

    return asyncio.run(body())


def test_a_failure_reaches_all_who_wait() -> None:
    """Each gets a copy of its own, with the name it used and the cause."""
    stay, ends = tenancy(), Ends()
    lease, cause = ends.lease(stay), OSError("no such disk")
    lease.id = "mine"
    error = IntegrityError("the file changed", key=KEY, attempt=3)
    error.__cause__ = cause
    first, second = both_ways(stay, lease, lambda: stay.fail(error))
    assert first is not second
    for each in (first, second):
        assert isinstance(each, IntegrityError)
        assert each is not error
        assert (each.id, each.key, each.attempt) == ("mine", KEY, 3)
        assert each.__cause__ is cause
    assert stay.error is error
    with pytest.raises(IntegrityError):
        lease.begin_use()
    lease.end()
    assert ends.heard == [(lease, False)]


@pytest.mark.parametrize("arrived", [False, True])
def test_an_ended_lease_waits_for_nothing(arrived: bool) -> None:
    """Not even where its layer comes at the same moment."""
    stay, ends = tenancy(), Ends()
    lease, other = ends.lease(stay), ends.lease(stay)

    def end() -> None:
        lease.end("the loader was closed")
        if arrived:
            stay.advance(4)
        stay.wake_tasks()  # the loop's part, once it hears of the end

    for error in both_ways(stay, lease, end):
        assert isinstance(error, HandleClosedError)
        assert "the loader was closed" in str(error)
        assert error.key == KEY
    other.check()


async def test_an_end_does_not_disturb_who_holds_on() -> None:
    stay, ends = tenancy(), Ends()
    lease, other = ends.lease(stay), ends.lease(stay)
    waiting = asyncio.create_task(stay.ready(0, other.check))
    await asyncio.sleep(0)
    lease.end()
    stay.wake_tasks()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    stay.advance(2)
    await waiting


def test_a_lease_ends_once() -> None:
    ends = Ends()
    lease = ends.lease(tenancy())
    lease.check()
    lease.end("first")
    lease.end("second")
    assert lease.closed
    assert ends.heard == [(lease, False)]
    for use in (lease.check, lease.begin_use):
        with pytest.raises(HandleClosedError, match="first"):
            use()


def test_many_threads_end_it_once() -> None:
    ends = Ends()
    leases = [ends.lease(tenancy()) for _ in range(200)]
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(10)
        for lease in leases:
            lease.end()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result(10)
    assert len(ends.heard) == len(leases)
    assert set(ends.heard) == {(lease, False) for lease in leases}


def test_a_kernel_outlives_its_lease() -> None:
    """The last of two says that all is quiet; a later one cannot begin."""
    ends = Ends()
    lease = ends.lease(tenancy())
    lease.begin_use()
    lease.begin_use()
    lease.end()
    assert ends.heard == [(lease, True)]
    with pytest.raises(HandleClosedError):
        lease.begin_use()
    lease.end_use()
    assert ends.heard == [(lease, True)]
    lease.end_use()
    assert ends.heard == [(lease, True), lease]


def test_kernels_that_ended_in_time_are_not_spoken_of() -> None:
    ends = Ends()
    lease = ends.lease(tenancy())
    for _ in range(3):
        lease.begin_use()
        lease.end_use()
    lease.end()
    assert ends.heard == [(lease, False)]


def test_uses_and_ends_in_many_threads_balance() -> None:
    """A lease that was in use is quiet once, one that was not never is."""
    ends, stay = Ends(), tenancy()
    leases = [ends.lease(stay) for _ in range(300)]

    def use(lease: Lease) -> None:
        try:
            lease.begin_use()
        except HandleClosedError:
            return
        lease.end_use()

    with ThreadPoolExecutor(4) as threads:
        for lease in leases:
            for work in (use, Lease.end, use):
                threads.submit(work, lease)
    for lease in leases:
        in_use = (lease, True) in ends.heard
        assert ends.heard.count((lease, in_use)) == 1
        assert ends.heard.count(lease) == in_use


def test_a_failed_stay_is_told_apart_from_a_released_handle() -> None:
    stay = tenancy()
    lease = Ends().lease(stay)
    stay.fail(FetchError("gone"))
    lease.end()
    with pytest.raises(HandleClosedError, match="released"):
        lease.check()
