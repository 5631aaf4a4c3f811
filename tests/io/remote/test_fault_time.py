"""What does not come, or too slowly: it ends in time, and all that it took is given back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fault_server import Asked, Client
from fault_world import (
    CHUNK,
    FaultyWorld,
    assert_at_rest,
    at,
    in_turn,
    is_weights,
    loads_right,
    over,
)
from faults import dripping, silent, stalled
from fetching import engine

from common import Run, until
from lorax_async import AdapterTimeoutError, FetchTimeoutError
from lorax_async.core.retries import Retries
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.http.settings import Timeouts

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

HURRIED = Timeouts(read=1.5, slowest=1_000, over=1.2, idle=5.0)
ONCE_AGAIN = Retries(attempts=2, base=0.01, most=0.02)

STALLS = {
    f"{part} {fault.__name__}": at(part, fault)
    for part in ("config", "header", "body")
    for fault in (silent, stalled, dripping)
}


@pytest.mark.parametrize("run", ["uvloop"], indirect=True)
def test_what_stalls_or_drips_ends_by_itself(run: Run, tmp_path: Path) -> None:
    """All of it at the same time, beside one adapter that comes: they hold up nobody."""
    http = engine(32, timeouts=HURRIED, retries=ONCE_AGAIN)
    with FaultyWorld(tmp_path / "cache", tmp_path, http=http) as world:
        good = world.stock("good", 1)
        bad = [world.stock(f"bad-{n}") for n in range(len(STALLS))]
        world.faults |= dict(zip((each.name for each in bad), STALLS.values(), strict=True))

        async def body() -> None:
            async with over(world) as loader:
                loading = [loader.load(world.ref(each.name)) for each in bad]
                *ended, _ = await asyncio.gather(
                    *loading, loads_right(loader, world, good), return_exceptions=True
                )
                for case, error in zip(STALLS, ended, strict=True):
                    assert type(error) is FetchTimeoutError, (case, error)
                    assert (error.stage, error.retryable) == ("fetch", True)
                    assert error.retry_after is None
                await assert_at_rest(loader, world)
                world.faults.clear()
                for each in bad:
                    await loads_right(loader, world, each)

        run(body())


class Held:
    """Weights come up to a byte, and then nothing until somebody lets them; no thread waits."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.held = 0

    def __call__(self, world: FaultyWorld, asked: Asked, client: Client) -> None:
        if is_weights(asked) and asked.span and asked.span[1] > self.stop:
            self.held += 1
            client.stall()
        world.well(asked, client)


@pytest.mark.parametrize(("run", "part"), in_turn(["config", "header", "body"]), indirect=["run"])
def test_a_deadline_ends_the_download_too(run: Run, tmp_path: Path, part: str) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = at(part, stalled)

        async def body() -> None:
            async with over(world) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                with pytest.raises(AdapterTimeoutError, match=r"within 1\.5 s") as caught:
                    await loader.load(world.ref("bad"), timeout=1.5)
                assert (caught.value.stage, caught.value.retryable) == ("fetch", True)
                assert isinstance(caught.value, TimeoutError)
                await healthy
                await assert_at_rest(loader, world)  # a read would have waited for 20 s
                world.faults.clear()
                await loads_right(loader, world, bad)

        run(body())


def test_one_deadline_is_not_another(run: Run, tmp_path: Path) -> None:
    """Who has more time gets what the other one did not wait for, of the same download."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        world.stock("bad")
        hold = Held(CHUNK)
        world.faults["bad"] = hold

        async def body() -> None:
            async with over(world) as loader:
                patient = asyncio.create_task(loader.load(world.ref("bad"), timeout=25))
                with pytest.raises(AdapterTimeoutError):
                    await loader.load(world.ref("bad"), timeout=0.2)
                await until(lambda: hold.held)
                assert not patient.done()
                assert len(world.engine._desk.jobs) == 1
                patient.cancel()
                await asyncio.wait([patient])
                await assert_at_rest(loader, world)

        run(body())


def test_the_next_load_goes_on_where_the_deadline_was(run: Run, tmp_path: Path) -> None:
    """Of two chunks the second one does not come in time."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad = world.stock("bad", rank=168)
        size = len(world.locator.there["bad"].weights)
        assert 2 * CHUNK - 10_000 < size < 2 * CHUNK
        hold = Held(CHUNK)
        world.faults["bad"] = hold

        async def body() -> None:
            async with over(world) as loader:
                with pytest.raises(AdapterTimeoutError):
                    await loader.load(world.ref("bad"), timeout=1.5)
                await assert_at_rest(loader, world)
                (left,) = ls(world.cache)
                assert left.is_partial
                assert hold.held
                begun = len(world.spans_of("bad"))
                world.faults.clear()
                await loads_right(loader, world, bad)
                first, *rest = world.spans_of("bad")[begun:]
                assert first == (0, CHUNK), "the header is asked for again, and no more of it"
                assert sum(stop - start for start, stop in rest) == size - CHUNK

        run(body())
