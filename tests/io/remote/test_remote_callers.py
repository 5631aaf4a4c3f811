"""Several callers of one adapter: what one says, or may have, is not another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from remote_world import RANK, RemoteWorld, over, stocked

import tiny
from lorax_async import AccessDeniedError, AdapterLoader, FetchError, IntegrityError, Merge
from lorax_async.adapter import AdapterId
from lorax_async.config import Limits

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.each_loop]


async def acquired_at_once(loader: AdapterLoader, adapter: AdapterId) -> bool:
    """After a load."""
    async with await loader.load(adapter):
        lease = loader.try_acquire(adapter)
    if lease is not None:
        lease.release()
    return lease is not None


async def test_a_digest_is_its_callers_own(tmp_path: Path) -> None:
    """Whoever gave a false one is refused; who asked before him, and is known still, is not."""
    with RemoteWorld(tmp_path / "cache", revalidate=60) as world:
        folder = stocked(world, tmp_path)
        world.locator.promises = False
        plain = world.ref("one")
        async with over(world) as loader:
            await world.source.resolve(plain)
            with pytest.raises(IntegrityError, match="sha256 digest that was promised"):
                await loader.load(replace(plain, digest="0" * 64))
            async with await loader.load(plain) as handle:
                assert (await handle.verified()).kind == "transport"
                tiny.assert_equal_to_file(handle, folder)


async def test_what_is_public_is_there_for_who_has_a_token(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        pinned = replace(world.ref("one"), revision=world.locator.there["one"].version)
        async with over(world) as loader:
            (await loader.load(pinned)).release()
        world.locator.error = FetchError("it is down")
        theirs = replace(pinned, token="mine")
        async with over(world) as loader, await loader.load(theirs) as handle:
            tiny.assert_equal_to_file(handle, folder)


async def test_who_was_let_have_it_long_ago_has_it_not_at_once(tmp_path: Path) -> None:
    """A lease without asking is for as long as a load asks nobody; then the source judges."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        stored = world.locator.there["one"]
        stored.token = "mine"
        mine = replace(world.ref("one"), token="mine")
        stocked(world, tmp_path, "two", 1)
        doubled = Limits(max_rank=2 * RANK)
        merge = Merge("linear", [mine, world.ref("two")], [1, 1])
        async with over(world, revalidate=60, limits=doubled) as loader:
            kept = await loader.load(mine)
            at_once = loader.try_acquire(mine)
            assert at_once is not None
            at_once.release()
            assert loader.try_acquire(replace(mine, token="other")) is None
            by_key = loader.try_acquire(kept.key)
            assert by_key is not None
            by_key.release()
            kept.release()
            assert await acquired_at_once(loader, merge)
        async with over(world, revalidate=0, limits=doubled) as loader:
            kept = await loader.load(mine)
            assert loader.try_acquire(mine) is None
            assert not await acquired_at_once(loader, merge)
            stored.token = "another"
            with pytest.raises(AccessDeniedError):
                await loader.load(mine)
            kept.release()
