"""Requests under way: what ends one from outside, and what is left of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorax_async import LoaderClosedError
from lorax_async.server.calls.under_way import ClientGone, UnderWay, Watch, until_gone


class Stays:
    """A client that says nothing more."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def present() -> list[str]:
    names = (task.get_name() for task in asyncio.all_tasks())
    return [name for name in names if name == "lorax client's presence"]


async def interrupted(watch: Watch, *reasons: Exception) -> None:
    """What becomes of a block that is interrupted while it waits."""

    def interrupt() -> None:
        for reason in reasons:
            watch.interrupt(reason)

    async with watch:
        asyncio.get_running_loop().call_soon(interrupt)
        await asyncio.Event().wait()


async def test_the_first_reason_counts() -> None:
    watches = set[Watch]()
    with pytest.raises(ClientGone):
        watch = Watch(watches, Stays().receive)
        await interrupted(watch, ClientGone(), LoaderClosedError("too late"))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "whoever waits next is not cancelled"
    assert watches == set()


async def test_who_is_cancelled_besides_stays_cancelled() -> None:
    watch = Watch(set(), Stays().receive)
    task = asyncio.create_task(interrupted(watch))
    await asyncio.sleep(0)
    watch.interrupt(ClientGone())
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_nobody_listens_to_a_client_that_has_its_answer() -> None:
    client, watches = Stays(), set[Watch]()
    async with Watch(watches, client.receive):
        await asyncio.sleep(0)
        assert len(present()) == len(watches) == 1
    client.gone.set()  # in this very turn
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not present()
    assert watches == set()


async def test_only_who_hangs_up_has_gone() -> None:
    said = ["http.disconnect", "http.request"]

    async def receive() -> Any:
        return {"type": said.pop()}

    await until_gone(receive)
    assert said == []


async def test_the_last_one_ends_it() -> None:
    under_way = UnderWay()
    assert await under_way.ended(0)
    with under_way.one():
        assert not await under_way.ended(0)
        with pytest.raises(ValueError, match="its own"), under_way.one():
            raise ValueError("its own")
        assert not await under_way.ended(0)
        under_way.close()
        with pytest.raises(LoaderClosedError), under_way.one():
            pass
        assert not await under_way.ended(0)
        ending = asyncio.create_task(under_way.ended(20))
        await asyncio.sleep(0)
    assert await ending
