"""What a source said before, and what it says now: of sizes, and of versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import Asked, Client
from remote_world import RemoteWorld, ToldLocator, over, stocked

import tiny
from lorax_async import AdapterFormatError, AdapterNotFoundError, FetchError
from lorax_async.adapter import AdapterRef, RemoteKey
from lorax_async.core.cache_names import WEIGHTS_FILE
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.ports import Demand
from lorax_async.io.remote.ports import AnotherVersionError, Located
from lorax_async.io.remote.workers import outcome

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


async def test_who_tells_no_length_is_believed_what_was_told_before(tmp_path: Path) -> None:
    """All in one response, without ranges: the size is the locator's word, or nobody's."""
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        stocked(world, tmp_path, "two")

        def streamed(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            client.head("200 OK", f"ETag: {etag}", "Transfer-Encoding: chunked")
            client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

        world.server.behave = streamed
        async with over(world) as loader:
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)
            world.locator.promises = False
            with pytest.raises(FetchError, match="does not say how large"):
                await loader.load(world.ref("two"))


async def test_a_pinned_version_that_the_source_has_replaced(tmp_path: Path) -> None:
    """Who was let have it, and may still ask, has it from the cache; nobody else has."""
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        world.locator.there["one"].token = "mine"
        pinned = AdapterRef("one", "hub", world.locator.there["one"].version, "mine")
        async with over(world) as loader:
            (await loader.load(pinned)).release()
        world.locator.error = AnotherVersionError("it has another one by now")
        async with over(world) as loader:
            async with await loader.load(pinned) as handle:
                tiny.assert_equal_to_file(handle, folder)
            for other in (replace(pinned, token="x"), replace(pinned, revision=None)):
                for stale in (False, True):
                    with pytest.raises(AdapterNotFoundError, match="another one"):
                        await loader.load(replace(other, allow_stale=stale))


class AnsweringLocator(ToldLocator):
    """Asks for the files' beginnings to learn their version, as for URLs."""

    async def locate(self, ref: AdapterRef) -> Located:
        located = await super().locate(ref)
        with RangeEngine() as engine:
            asked = [
                engine.ask(file.target, 64, ranged=file.role == WEIGHTS_FILE)
                for file in located.files
            ]
            answers = [await outcome(job.done) for job in asked]
        files = [
            replace(file, answer=answer)
            for file, answer in zip(located.files, answers, strict=True)
        ]
        return replace(located, files=tuple(files))


async def test_first_bytes_of_what_was_refused_are_let_go(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        world.locator = AnsweringLocator(world.server)
        ref = world.put("bad", b"{}", b"\xff" * 64)
        key = await world.source.resolve(ref)
        assert isinstance(key, RemoteKey)
        origin = world.known.origin(key)
        assert origin is not None
        assert origin.located is not None
        with pytest.raises(AdapterFormatError):
            await world.source.open(key, Demand())
        origin = world.known.origin(key)
        assert origin is not None
        assert origin.located is None
