"""Bytes that are not the right ones, though all that was said of them is."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path

import pytest
from fault_server import Asked, Client
from fault_world import FaultyWorld, assert_at_rest, at, is_weights, loads_right, over
from faults import wrong_bytes

import tiny
from common import until
from lorax_async import AdapterHandle, AdapterLoader, IntegrityError
from lorax_async.config import Checking
from lorax_async.core.cache_names import WEIGHTS_FILE
from lorax_async.events import Failed
from lorax_async.io.cache.download import DiskDownload
from lorax_async.io.cache.upkeep import ls
from lorax_async.verification import Verification

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def is_poisoned(handle: AdapterHandle) -> bool:
    try:
        assert handle.modules
    except IntegrityError:
        return True
    return False


async def told(loader: AdapterLoader, world: FaultyWorld, words: str) -> None:
    """A load of "bad" fails, at once or, where nobody waits for the digest, after it is resident."""
    failures: list[Failed] = []
    end = loader.subscribe(lambda event: failures.append(event) if type(event) is Failed else None)
    try:
        handle = await loader.load(world.ref("bad"))
    except IntegrityError as error:
        assert words in error.problem
    else:
        async with handle:
            await until(lambda: is_poisoned(handle))
    end()
    assert [type(event.error) for event in failures] == [IntegrityError]
    assert words in failures[0].error.problem


async def test_who_has_it_already_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest comes late: two hold the adapter by then."""
    go_on = threading.Event()
    publish = DiskDownload.publish

    def late(download: DiskDownload) -> object:
        assert go_on.wait(20)
        return publish(download)

    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = at("body", wrong_bytes)

        async def body() -> None:
            async with over(world) as loader:
                await loads_right(loader, world, good)
                monkeypatch.setattr(DiskDownload, "publish", late)
                handles = [await loader.load(world.ref("bad")) for _ in range(2)]
                assert not any(map(is_poisoned, handles))
                go_on.set()
                await until(lambda: all(map(is_poisoned, handles)))
                assert loader.try_acquire(world.ref("bad")) is None
                for handle in handles:
                    with pytest.raises(IntegrityError, match="sha256"):
                        await handle.layer_ready(0)
                    with pytest.raises(IntegrityError, match="sha256"):
                        await handle.verified()
                    handle.release()
                await assert_at_rest(loader, world)
                assert len(ls(world.cache)) == 1
                world.faults.clear()
                await loads_right(loader, world, good)
                await loads_right(loader, world, bad)

        await body()


@pytest.mark.parametrize("verify", ["stream", "before_use"])
async def test_what_nobody_promised_is_taken_and_named_so(tmp_path: Path, verify: Checking) -> None:
    """Later on these bytes are what counts: others in their place are noticed."""
    with FaultyWorld(tmp_path / "cache", tmp_path, verify=verify) as world:
        world.locator.promises = False
        bad, good = world.stock("bad"), world.stock("good", 1)

        async def first() -> None:
            async with over(world) as loader:
                async with await loader.load(world.ref("bad")) as handle:
                    tiny.assert_equal_to_file(handle, bad)
                    own = hashlib.sha256(world.locator.there["bad"].weights).hexdigest()
                    assert await handle.verified() == Verification("transport", own)
                await loads_right(loader, world, good)
                await assert_at_rest(loader, world)

        await first()
        for listed in ls(world.cache):
            assert listed.record is not None
            weights = listed.record.file(WEIGHTS_FILE)
            assert weights is not None
            assert weights.digest.kind == "transport"
        alter(world, "bad")

        async def then() -> None:
            async with over(world) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                await told(loader, world, "changed")
                await healthy
                await assert_at_rest(loader, world)
                await loads_right(loader, world, bad)
                await assert_at_rest(loader, world)

        await then()


def alter(world: FaultyWorld, name: str) -> None:
    """One bit of its weights in the cache; size and times stay as they are."""
    content = world.locator.there[name].weights
    (entry,) = (
        entry
        for entry in (world.folder / "entries").iterdir()
        if (entry / WEIGHTS_FILE.file_name).read_bytes() == content
    )
    path = entry / WEIGHTS_FILE.file_name
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(bytes([content[-5] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(world: FaultyWorld, after: bytes) -> None:
    """The bytes behind the URL are others once the first have been asked for; nothing else is."""

    def other(world: FaultyWorld, asked: Asked, client: Client) -> None:
        data, etag = world.content(asked.target)
        changed = is_weights(asked) and asked.span is not None and asked.span[0] > 0
        world.answer(asked, client, after if changed else data, etag)

    world.faults["bad"] = other


async def test_a_file_that_is_replaced_meanwhile_under_the_same_tag(tmp_path: Path) -> None:
    """Neither ETag nor size tell: the digest does. The new version is another adapter."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        new = tiny.write(tmp_path / "new", 7, 128)
        replaced(world, tiny.files(new)[1])

        async def body() -> None:
            async with over(world) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                await told(loader, world, "sha256 digest that was promised")
                await healthy
                await assert_at_rest(loader, world)
                assert len(ls(world.cache)) == 1
                world.faults.clear()
                world.put("bad", *tiny.files(new))
                async with await loader.load(world.ref("bad")) as handle:
                    tiny.assert_equal_to_file(handle, new)

        await body()
        assert bad.exists()
