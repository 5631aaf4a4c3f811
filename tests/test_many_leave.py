"""Many names that nobody wants any more from one moment to the next."""

from __future__ import annotations

import asyncio

import pytest

from given import file_bytes, give, used
from lorax_async import LoaderClosedError
from tiny_loaders import loader

pytestmark = pytest.mark.usefixtures("nothing_left")

MANY = 250
"""Each would take some calls on the stack, which has room for a thousand."""


async def test_as_many_as_leave_at_once_do_so_one_by_one() -> None:
    """They wait for the only slot and mean nothing any more; then the loader is closed."""
    async with loader(max_slots=1) as there:
        names = [f"{n}" for n in range(MANY)]
        for seed, name in enumerate(names):
            (await give(there, seed, name)).release()
        held = await give(there, MANY, "held")
        loading = [asyncio.create_task(there.load(name)) for name in names]
        await asyncio.sleep(0)
        unloading = [asyncio.create_task(there.unload(name)) for name in names]
        await asyncio.gather(*unloading)
        assert used(there) > MANY * file_bytes(), "who waits may still get them"
        await there.close(timeout=0)
        assert used(there) == 0
        for load in loading:
            with pytest.raises(LoaderClosedError):
                await load
        held.release()
