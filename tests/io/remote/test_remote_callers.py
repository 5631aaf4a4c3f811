"""Several callers of one adapter: what one says, or may have, is not another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from remote_world import RemoteWorld, over, stocked

import tiny
from common import Run
from lorax_async import FetchError, IntegrityError

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def test_a_digest_is_its_callers_own(run: Run, tmp_path: Path) -> None:
    """Whoever gave a false one is refused; who asked before him, and is known still, is not."""
    with RemoteWorld(tmp_path / "cache", revalidate=60) as world:
        folder = stocked(world, tmp_path)
        world.locator.promises = False
        plain = world.ref("one")

        async def body() -> None:
            async with over(world) as loader:
                await world.source.resolve(plain)
                with pytest.raises(IntegrityError, match="sha256 digest that was promised"):
                    await loader.load(replace(plain, digest="0" * 64))
                async with await loader.load(plain) as handle:
                    assert (await handle.verified()).kind == "transport"
                    tiny.assert_equal_to_file(handle, folder)

        run(body())


def test_what_is_public_is_there_for_who_has_a_token(run: Run, tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        pinned = replace(world.ref("one"), revision=world.locator.there["one"].version)

        async def body() -> None:
            async with over(world) as loader:
                (await loader.load(pinned)).release()
            world.locator.error = FetchError("it is down")
            theirs = replace(pinned, token="mine")
            async with over(world) as loader, await loader.load(theirs) as handle:
                tiny.assert_equal_to_file(handle, folder)

        run(body())
