"""Files that are larger than they may be, or of another size than was said."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_world import FaultyWorld, assert_at_rest, in_turn, loads_right, over
from fetching import Anywhere

import tiny
from common import Run
from lorax_async import AdapterFormatError, CapacityError, FetchError, IntegrityError, LoraxError
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.core.cache_names import FileRole
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.http.target import Target
from lorax_async.io.http.urls import parse_url
from lorax_async.io.remote.ports import RemoteFile

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LARGE = 300_000
FIRST = 256 << 10


@dataclass(frozen=True)
class Case:
    """`make` gives config and weights; `asked` is what may be asked for of each file."""

    make: Callable[[Path], tuple[bytes, bytes]]
    kind: type[LoraxError]
    words: str
    asked: set[str]
    stage: str = "verify"
    promises: bool = True


def padded_config(folder: Path) -> tuple[bytes, bytes]:
    config, weights = tiny.files(folder)
    return config + b" " * LARGE, weights


def huge_header(folder: Path) -> tuple[bytes, bytes]:
    """A header of 20,000,000 bytes, says the file; and it is as large as that."""
    config, _ = tiny.files(folder)
    return config, struct.pack("<Q", 20_000_000) + b"{" + b" " * 20_000_100


def padded_header(folder: Path) -> tuple[bytes, bytes]:
    """A good one, but for spaces after it: a byte over the limit of this test."""
    config, weights = tiny.files(folder)
    (size,) = struct.unpack("<Q", weights[:8])
    more = HEADER_LIMIT + 1 - size
    header = weights[8 : 8 + size] + b" " * more
    return config, struct.pack("<Q", size + more) + header + weights[8 + size :]


def large(folder: Path) -> tuple[bytes, bytes]:
    return tiny.files(tiny.write(folder, 0, 256))


HEADER_LIMIT = 350_000
LIMITS = Limits(max_header_bytes=HEADER_LIMIT, max_adapter_bytes=780_000)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CASES = {
    "config": Case(padded_config, AdapterFormatError, "max_config_bytes", set()),
    "config, no promise": Case(
        *(padded_config, FetchError, "more than the 262,144 bytes", {CONFIG, WEIGHTS}),
        stage="fetch",
        promises=False,
    ),
    "weights": Case(large, AdapterFormatError, "max_adapter_bytes", set()),
    "weights, no promise": Case(
        *(large, AdapterFormatError, "max_adapter_bytes", {CONFIG, WEIGHTS}), promises=False
    ),
    "a header over the limit": Case(padded_header, AdapterFormatError, "header", {CONFIG, WEIGHTS}),
    "a huge header in huge weights": Case(
        *(huge_header, AdapterFormatError, "max_adapter_bytes", {CONFIG, WEIGHTS}), promises=False
    ),
}


@pytest.mark.parametrize(("run", "name"), in_turn(CASES), indirect=["run"])
def test_what_is_too_large_is_not_fetched(run: Run, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    with FaultyWorld(tmp_path / "cache", tmp_path, limits=LIMITS) as world:
        world.locator.promises = case.promises
        world.put("bad", *case.make(world.stock("bad")))
        good = world.stock("good", 1)

        async def body() -> None:
            async with over(world, limits=LIMITS) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                with pytest.raises(LoraxError, match=case.words) as caught:
                    await loader.load(world.ref("bad"))
                assert type(caught.value) is case.kind
                assert (caught.value.stage, caught.value.retryable) == (case.stage, False)
                await healthy
                await assert_at_rest(loader, world)
                assert len(ls(world.cache)) == 1

        run(body())
        assert {each.target.split("/")[-1] for each in world.asked_of("bad")} <= case.asked
        assert set(world.spans_of("bad")) <= {(0, FIRST)}


OTHER_SIZES = {f"{name} {by:+}": (name, by) for name in (CONFIG, WEIGHTS) for by in (-1, 1)}


@pytest.mark.parametrize(("run", "name"), in_turn(OTHER_SIZES), indirect=["run"])
def test_other_sizes_than_were_promised(run: Run, tmp_path: Path, name: str) -> None:
    """The source says one byte more or less, and no digest."""
    wrong, by = OTHER_SIZES[name]
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)

        def promised(ref: AdapterRef, role: FileRole, data: bytes) -> RemoteFile:
            path = f"{ref.text}/{role.file_name}"
            target = Target(parse_url(world.server.url(f"/{path}")), path, {}, Anywhere())
            more = by if ref.text == "bad" and role.file_name == wrong else 0
            return RemoteFile(role, target, len(data) + more)

        lying = pytest.MonkeyPatch()
        lying.setattr(world.locator, "_file", promised)

        async def body() -> None:
            async with over(world) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                with pytest.raises(IntegrityError, match="its source said") as caught:
                    await loader.load(world.ref("bad"))
                assert (caught.value.stage, caught.value.retryable) == ("fetch", True)
                await healthy
                await assert_at_rest(loader, world)
                lying.undo()
                await loads_right(loader, world, bad)

        run(body())


# -- the budget of the disk cache -----------------------------------------------------------------


def test_a_cache_that_cannot_hold_it_says_so_at_once(run: Run, tmp_path: Path) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path, cache_bytes=500_000) as world:
        world.stock("bad", rank=256)
        good = world.stock("good", 1, rank=100)

        async def body() -> None:
            async with over(world) as loader:
                await loads_right(loader, world, good)
                with pytest.raises(CapacityError, match=r"do not fit.*raise its budget") as caught:
                    await loader.load(world.ref("bad"))
                assert (caught.value.stage, caught.value.retryable) == ("fetch", False)
                await assert_at_rest(loader, world)
                assert world.spans_of("bad") == [(0, FIRST)]
                (stays,) = (listed for listed in ls(world.cache) if not listed.is_partial)
                assert stays.nbytes > 300_000
                await loads_right(loader, world, good)

        run(body())


def test_of_two_that_do_not_fit_beside_each_other_both_come(run: Run, tmp_path: Path) -> None:
    """The second one waits for the room that the first one has while it is downloaded."""
    with FaultyWorld(tmp_path / "cache", tmp_path, cache_bytes=900_000) as world:
        folders = [world.stock(name, seed, rank=256) for seed, name in enumerate(("one", "two"))]

        async def body() -> None:
            async with over(world) as loader:
                await asyncio.gather(*(loads_right(loader, world, each) for each in folders))
                await assert_at_rest(loader, world)
                assert world.cache.used() <= world.cache_bytes
                assert len(ls(world.cache)) == 1

        run(body())
