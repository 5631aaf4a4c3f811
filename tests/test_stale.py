"""Versions that a source last named, when it cannot be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from lorax_async import AdapterKey, AdapterRef, Merge
from lorax_async.adapter import MergedKey, RemoteKey, is_stale
from lorax_async.io.ports import AdapterFile, Demand, Reader
from lorax_async.testing import FakeSource
from tiny_sources import over

pytestmark = pytest.mark.usefixtures("nothing_left")


class Far(FakeSource):
    """One adapter that lies elsewhere; now and then its source cannot be asked."""

    offline = False

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.here = self.put("far", *tiny.files(tiny.write(base / "far")))

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        await super().resolve(AdapterRef("far"))
        return RemoteKey("far", (), "v1", stale=self.offline)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        return await super().open(self.here, demand)

    def reopen(self, key: AdapterKey) -> Reader:
        return super().reopen(self.here)


async def test_a_handle_says_how_its_own_call_was_answered(tmp_path: Path) -> None:
    """Though all of them hold the same bytes, fetched for the first."""
    source = Far(tmp_path)
    async with over(source) as there, await there.load("far") as fresh:
        source.offline = True
        at_once = there.try_acquire("far")
        async with await there.load("far", digest=None) as stale, stale.clone() as clone:
            latest = there.try_acquire("far")
            assert at_once is not None
            assert latest is not None
            told = [each.stale for each in (fresh, at_once, stale, clone, latest)]
            assert told == [False, False, True, True, True]
            assert fresh.slot == stale.slot
        source.offline = False
        async with there.stream("far") as again:
            assert not again.stale
        for each in (at_once, latest):
            each.release()
        assert source.counts.opens == 1


def test_a_merge_is_as_fresh_as_its_parts() -> None:
    fresh, stale = RemoteKey("a", (), "1"), RemoteKey("b", (), "1", stale=True)
    merge = Merge("linear", ["a", "b"], [1, 1])
    assert not is_stale(MergedKey.of(merge, [fresh, fresh]))
    assert is_stale(MergedKey.of(merge, [fresh, stale]))
    assert not is_stale(AdapterKey("here", ()))
