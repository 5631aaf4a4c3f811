"""Who waits until weights were hashed: how that ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from known_digests import OTHER, digest_of, holders
from lorax_async import (
    AdapterKey,
    AdapterTimeoutError,
    FetchError,
    InternalError,
    LoaderClosedError,
)
from lorax_async.testing import FakeSource
from tiny_sources import is_resident, over, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


class SlowToHash(FakeSource):
    """Hashes until it is told to be through."""

    def __init__(self) -> None:
        super().__init__()
        self.through, self.cancelled = asyncio.Event(), 0

    async def digest(self, key: AdapterKey) -> str:
        found = await super().digest(key)
        try:
            await self.through.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return found


def slow(base: Path) -> SlowToHash:
    source = SlowToHash()
    source.put("a", *tiny.files(tiny.write(base / "a")))
    return source


@pytest.mark.parametrize("how", ["cancelled", "late", "released"])
async def test_hashing_ends_when_nobody_waits_for_it(tmp_path: Path, how: str) -> None:
    source = slow(tmp_path)
    async with over(source) as there:
        if how == "released":
            async with there.stream("a", digest=OTHER) as handle, handle.clone():
                await until(lambda: source.counts.digests)
                handle.release()
                await asyncio.sleep(0.01)
                assert not source.cancelled, "the clone is left"
        elif how == "late":
            with pytest.raises(AdapterTimeoutError) as caught:
                await there.load("a", digest=OTHER, timeout=0.2)
            assert caught.value.stage == "verify"
        else:
            loads = [asyncio.create_task(there.load("a", digest=OTHER)) for _ in range(2)]
            await until(lambda: source.counts.digests)
            for load in loads:
                assert not source.cancelled
                load.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await load
        await until(lambda: source.cancelled == 1)
        assert not holders(there)
        source.through.set()
        (await there.load("a", digest=digest_of(tmp_path / "a"))).release()
        assert source.counts.digests == 2


async def test_an_error_of_hashing_is_each_callers(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        source.fail("digest", FetchError("the disk is on fire"))
        loads = [there.load("a", digest=OTHER) for _ in range(3)]
        errors = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(error) for error in errors] == [FetchError] * 3
        assert len(set(map(id, errors))) == 3
        source.fail("digest", RuntimeError("a foreign fault"))
        async with there.stream("a", digest=OTHER) as handle:
            with pytest.raises(InternalError, match="foreign fault"):
                await handle.verified()
        assert not holders(there)
        (await there.load("a", digest=digest_of(tmp_path / "a"))).release()


@pytest.mark.parametrize("step", ["fetched", "hashed"])
async def test_who_waits_when_it_closes_waits_no_longer(tmp_path: Path, step: str) -> None:
    source = slow(tmp_path)
    if step == "fetched":
        source.hold_verification("a")
    async with over(source) as there:
        loading = asyncio.create_task(there.load("a", digest=OTHER))
        await until(lambda: is_resident(there, "a"))
        if step == "hashed":
            await until(lambda: source.counts.digests)
        closing = asyncio.create_task(there.close())
        with pytest.raises(LoaderClosedError) as caught:
            await loading
        assert caught.value.id == "a"
        source.allow_verification("a")
        await closing
