"""What every `Source` keeps to. A test class derives from `SourceConformance`.

Its module has two fixtures: `run`, which runs a coroutine function on a fresh loop, and `world`,
which afterwards asserts that nothing stayed open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from hashlib import sha256
from itertools import pairwise
from threading import current_thread
from typing import Any, Protocol, TypeVar

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from rows_conformance import RowsConformance
from source_inputs import CONFIG, groups_of, header_bytes, read, tensors, weights

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.io.ports import AdapterFile, Demand, Source

T = TypeVar("T")


class Run(Protocol):
    def __call__(self, main: Coroutine[Any, Any, T], /) -> T: ...


class World(Protocol):
    source: Source

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        """Add an adapter, or replace it."""

    def ref(self, name: str) -> AdapterRef: ...


async def bring_all(source: Source, file: AdapterFile, content: bytes) -> list[int]:
    seen: list[int] = []
    await source.bring(file, groups_of(content), seen.append, Demand())
    return seen


class SourceConformance(RowsConformance):
    async def test_a_key_lasts_as_long_as_the_bytes(self, world: World) -> None:
        ref = world.put("one", CONFIG, weights(1))
        first = await world.source.resolve(ref)
        assert await world.source.resolve(ref) == first
        world.put("one", CONFIG, weights(2))
        second = await world.source.resolve(ref)
        world.put("one", CONFIG.replace(b"8", b"9"), weights(2))
        third = await world.source.resolve(ref)
        assert len({first, second, third}) == 3
        assert first.location == second.location == third.location

    async def test_two_adapters_have_two_keys(self, world: World) -> None:
        refs = [world.put(name, CONFIG, weights(1)) for name in ("one", "two")]
        keys = [await world.source.resolve(ref) for ref in refs]
        assert keys[0] != keys[1]

    async def test_an_unknown_adapter_is_not_found(self, world: World) -> None:
        with pytest.raises(AdapterNotFoundError):
            await world.source.resolve(world.ref("nobody"))

    async def test_an_opened_adapter_has_config_and_header(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await self.key(world, content), Demand())
        assert file.config == CONFIG
        assert content.startswith(file.prefix)
        assert len(file.prefix) >= header_bytes(content)
        assert file.reader.nbytes == len(content)
        file.reader.close()

    async def test_groups_arrive_in_order_on_the_loop(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await self.key(world, content), Demand())
        arrivals: list[tuple[int, bytes]] = []

        def arrived(group: int) -> None:
            assert current_thread() is thread
            (span,) = groups_of(content)[group]
            arrivals.append((group, read(file.reader, span.start, span.stop)))

        thread = current_thread()
        await world.source.bring(file, groups_of(content), arrived, Demand())
        spans = [(span.start, span.stop) for (span,) in groups_of(content)]
        expected = [(n, content[a:b]) for n, (a, b) in enumerate(spans)]
        # A source that has everything already may leave it to the return.
        assert arrivals in (expected, [])
        assert [read(file.reader, *span) for span in spans] == [part for _, part in expected]
        file.reader.close()

    @pytest.mark.parametrize("reopened", [False, True])
    async def test_scattered_reads_give_the_file(self, world: World, reopened: bool) -> None:
        content = weights(1, {"note": "x" * 9000})
        key = await self.key(world, content)
        file = await world.source.open(key, Demand())
        await bring_all(world.source, file, content)
        reader = world.source.reopen(key) if reopened else file.reader
        whole = memoryview(bytearray(len(content)))
        cuts = [0, 0, *range(3, len(content), 7), len(content)]
        reader.read_into([whole[a:b] for a, b in pairwise(cuts)], 0)
        assert len(cuts) > 1200  # more than one call takes
        loaded = safetensors.torch.load(bytes(whole))
        assert all(torch.equal(loaded[name], t) for name, t in tensors(1).items())
        assert read(reader, 5, 5) == b""
        file.reader.close()
        reader.close()

    async def test_a_matrix_of_bytes_is_filled_too(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await self.key(world, content), Demand())
        await bring_all(world.source, file, content)
        view = memoryview(bytearray(48)).cast("B", (6, 8))
        file.reader.read_into([view], header_bytes(content))
        assert view.tobytes() == content[header_bytes(content) :][:48]
        file.reader.close()

    async def test_a_cancelled_fetch_ends_early(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await self.key(world, content), Demand())
        demand = Demand()
        seen: list[int] = []

        def arrived(group: int) -> None:
            seen.append(group)

        demand.end()
        with pytest.raises(FetchError):
            await world.source.bring(file, groups_of(content), arrived, demand)
        assert seen == []
        file.reader.close()

    @pytest.mark.parametrize("part", ["config", "weights"])
    async def test_another_version_is_not_opened(self, world: World, part: str) -> None:
        key = await self.key(world, weights(1))
        config = CONFIG.replace(b"8", b"9") if part == "config" else CONFIG
        content = weights(2 if part == "weights" else 1)
        world.put("one", config, content)
        with pytest.raises(IntegrityError, match="again"):
            file = await world.source.open(key, Demand())
            try:  # what came until then may be no more than a promise
                await bring_all(world.source, file, content)
            finally:
                file.reader.close()

    async def test_no_read_mixes_versions(self, world: World) -> None:
        content = weights(1)
        key = await self.key(world, content)
        file = await world.source.open(key, Demand())
        await bring_all(world.source, file, content)
        world.put("one", CONFIG, weights(2))
        for reader in (file.reader, world.source.reopen(key)):
            try:  # a source that has its own copy goes on with what was opened
                assert read(reader, 0, len(content)) == content
            except IntegrityError as error:
                assert "again" in str(error)
            reader.close()

    async def test_a_read_beyond_the_end_is_an_error(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await self.key(world, content), Demand())
        await bring_all(world.source, file, content)
        with pytest.raises(IntegrityError):
            read(file.reader, len(content) - 3, len(content) + 1)
        file.reader.close()

    async def test_a_closed_reader_reads_no_more(self, world: World) -> None:
        file = await world.source.open(await self.key(world, weights(1)), Demand())
        file.reader.close()
        file.reader.close()
        with pytest.raises(FetchError):
            read(file.reader, 0, 8)

    @pytest.mark.parametrize("content", [b"PK\3\4" + b"x" * 400, b"x", b"\x09" + b"\0" * 7 + b"{}"])
    async def test_a_file_without_a_header_is_refused(self, world: World, content: bytes) -> None:
        key = await self.key(world, content)
        with pytest.raises(AdapterFormatError):
            await world.source.open(key, Demand())

    async def test_a_digest_is_that_of_the_weights(self, world: World) -> None:
        contents = [weights(1), weights(2, {"note": "x" * 9000})]
        for content in contents:
            key = await self.key(world, content)
            file = await world.source.open(key, Demand())
            await bring_all(world.source, file, content)
            file.reader.close()
            assert await world.source.digest(key) == sha256(content).hexdigest()
        world.put("one", CONFIG, weights(3))
        try:  # a source that has its own copy goes on with what was opened
            assert await world.source.digest(key) == sha256(contents[-1]).hexdigest()
        except IntegrityError as error:
            assert "again" in str(error)

    async def test_many_may_open_at_once(self, world: World) -> None:
        content = weights(1)
        key = await self.key(world, content)
        files = await asyncio.gather(*(world.source.open(key, Demand()) for _ in range(20)))
        assert {file.config for file in files} == {CONFIG}
        for file in files:
            file.reader.close()

    @pytest.mark.parametrize("late", [0.0, 0.003])
    @pytest.mark.parametrize("step", ["resolve", "open", "digest"])
    async def test_cancelled_at_any_await(self, world: World, step: str, late: float) -> None:
        ref = world.put("one", CONFIG, weights(1))
        key = await world.source.resolve(ref)
        if step == "digest":
            file = await world.source.open(key, Demand())
            await bring_all(world.source, file, weights(1))
            file.reader.close()
        call: Callable[..., Coroutine[Any, Any, Any]] = getattr(world.source, step)
        asked = {"resolve": (ref,), "open": (key, Demand()), "digest": (key,)}[step]
        ends = [await was_cancelled(call(*asked), at, late) for at in range(12)]
        assert ends.count(True) >= 1
        assert False in ends

    async def key(self, world: World, content: bytes) -> AdapterKey:
        return await world.source.resolve(world.put("one", CONFIG, content))
