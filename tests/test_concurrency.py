"""The inbox: nothing lost, in order, on the loop, with few wake-ups."""

import asyncio
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from event_loops import LOOPS, until

from lorax_async import concurrency as inbox_module
from lorax_async.concurrency import Inbox, call_in

pytestmark = pytest.mark.each_loop


class Ambushed(deque[int]):
    """A thread puts one more item at the very moment that the loop finds none left.

    `late`: not when it looks for the first time, but when it looks for the last time.
    """

    inbox: Inbox[int]

    def __init__(self, times: int, late: bool) -> None:
        super().__init__()
        self._times = times
        self._late = late
        self._looks = 0

    def __len__(self) -> int:
        length = super().__len__()
        self._looks += length == 0
        if length == 0 and self._times and (not self._late or self._looks % 2 == 0):
            self._times -= 1
            thread = threading.Thread(target=self.inbox.put, args=[self._times])
            thread.start()
            thread.join()
        return length


@pytest.mark.parametrize("late", [False, True])
async def test_an_item_at_the_last_moment(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    seen, items = list[int](), Ambushed(7, late)
    with monkeypatch.context() as patch:
        patch.setattr(inbox_module, "deque", lambda: items)
        items.inbox = Inbox(asyncio.get_running_loop(), seen.append)
    items.inbox.put(100)
    await until(lambda: len(seen) == 8)
    assert seen == [100, 6, 5, 4, 3, 2, 1, 0]


async def test_one_that_raises_does_not_hold_up_the_rest() -> None:
    seen: list[int] = []
    told: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    errors = {1: ValueError("one"), 2: KeyError("two")}

    def handle(item: int) -> None:
        if item in errors:
            raise errors[item]
        seen.append(item)

    inbox = Inbox(loop, handle)
    for n in range(4):
        inbox.put(n)
    await until(lambda: len(seen) == 2)
    assert seen == [0, 3]
    assert told == [errors[1], errors[2]]
    inbox.put(4)
    await until(lambda: len(seen) == 3)


@pytest.mark.parametrize("name", LOOPS)
def test_after_the_loop_nobody_listens_and_nothing_is_kept(name: str) -> None:
    loop, item = LOOPS[name](), {1}
    inbox: Inbox[set[int]] = Inbox(loop, lambda _: pytest.fail("nobody listens"))
    loop.close()
    gone = weakref.ref(item)
    inbox.put(item)
    del item
    assert gone() is None


async def test_a_result_that_comes_with_a_cancellation_is_discarded() -> None:
    """By hand: it is set and the caller is cancelled in one turn of the loop."""
    discarded: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        call = asyncio.ensure_future(call_in(threads, lambda: 7, discarded.append))
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251 - until the thread has left it for the loop
        asyncio.get_running_loop().call_soon(call.cancel)
        with pytest.raises(asyncio.CancelledError):
            await call
    assert discarded == [7]
