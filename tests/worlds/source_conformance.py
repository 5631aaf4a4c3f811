"""The conformance suite of `Source`; its fixture `world` asserts that nothing stays open."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from hashlib import sha256
from itertools import pairwise
from threading import current_thread
from typing import Any, Protocol

import pytest
import safetensors.torch
import torch
from cancellation_sweep import stepwise
from source_inputs import (
    CONFIG,
    cannot_read,
    groups_of,
    header_bytes,
    read,
    read_rows,
    rows_of,
    tensors,
    weights,
)

from lorax_async import AdapterKey, AdapterRef, FetchError, IntegrityError, errors
from lorax_async.concurrency import FetchControl
from lorax_async.formats.spans import ByteSpan
from lorax_async.runtime.host_tier import MappedFile, populate
from lorax_async.sources.base import AdapterFile, Source
from lorax_async.types import RemoteKey


class World(Protocol):
    """The source, and where it looks for adapters; `tests/sources/test_sources.py` has some."""

    source: Source

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        """Add an adapter, or replace it."""

    def ref(self, name: str) -> AdapterRef: ...


async def resolved(world: World, content: bytes, config: bytes = CONFIG) -> AdapterKey:
    return await world.source.resolve(world.put("one", config, content))


async def fetch_all(source: Source, file: AdapterFile, content: bytes) -> None:
    await source.fetch_groups(file, groups_of(content), lambda _: None, FetchControl())


async def fetch_content(
    world: World, content: bytes, span: ByteSpan | None = None
) -> tuple[AdapterFile, AdapterKey]:
    """Open an adapter, and fetch all of it, or these bytes."""
    key = await resolved(world, content)
    file = await world.source.open(key, FetchControl())
    groups = [[span]] if span else groups_of(content)
    await world.source.fetch_groups(file, groups, lambda _: None, FetchControl())
    return file, key


async def was_cancelled(work: Coroutine[Any, Any, Any], at: int, late: float) -> bool:
    """Cancel at a suspension; whether it was reached. What `work` gave otherwise is closed.

    With `late` seconds between, what is awaited has meanwhile come to its end.
    """

    def cancel() -> None:
        time.sleep(late)
        task.cancel()

    def at_step(step: int) -> None:
        if step == at + 1:
            asyncio.get_running_loop().call_soon(cancel)

    async def steps() -> Any:
        return await stepwise(work, at_step)

    task = asyncio.ensure_future(steps())
    await asyncio.wait([task])
    if not task.cancelled():
        opened = getattr(task.result(), "reader", task.result())
        if hasattr(opened, "close"):
            opened.close()
    return task.cancelled()


OTHER_CONFIG = CONFIG.replace(b"8", b"9")
VERSIONS = pytest.mark.parametrize(
    ("config", "content"),
    [(OTHER_CONFIG, weights(1)), (CONFIG, weights(2))],
    ids=["config", "weights"],
)
ROWS = [(0, 12, 4, 96), (84, 12, 4, 96), (3, 5, 7, 11), (0, 16, 5, 16), (200, 1, 90, 2)]
ROWS += [(50, 300, 1, 0)]
"""Where the first begins after the header, bytes of each, how many, and from one to the next."""


class SourceConformance:
    async def test_a_key_lasts_as_long_as_the_bytes(self, world: World) -> None:
        first = await resolved(world, weights(1))
        assert await world.source.resolve(world.ref("one")) == first
        second = await resolved(world, weights(2))
        third = await resolved(world, weights(2), OTHER_CONFIG)
        assert len({first, second, third}) == 3
        assert first.location == second.location == third.location
        # Else a loader never resolves the id again, and keeps the first version.
        assert isinstance(first, RemoteKey) or first.files
        assert await world.source.resolve(world.put("two", CONFIG, weights(1))) != first
        with pytest.raises(errors.AdapterNotFoundError):
            await world.source.resolve(world.ref("nobody"))

    async def test_an_opened_adapter_has_config_and_header(self, world: World) -> None:
        content = weights(1)
        file, _ = await fetch_content(world, content)
        assert file.config == CONFIG
        assert content.startswith(file.prefix)
        assert len(file.prefix) >= header_bytes(content)
        assert file.reader.nbytes == len(content)
        file.reader.close()
        file.reader.close()
        cannot_read(file.reader, ByteSpan(0, 2, 2, 4), FetchError, "closed")

    async def test_groups_arrive_on_the_loop(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await resolved(world, content), FetchControl())
        arrivals: list[tuple[int, bytes]] = []

        def arrived(group: int) -> None:
            assert current_thread() is thread
            (span,) = groups_of(content)[group]
            arrivals.append((group, read(file.reader, span.start, span.stop)))

        thread = current_thread()
        await world.source.fetch_groups(file, groups_of(content), arrived, FetchControl())
        spans = [(span.start, span.stop) for (span,) in groups_of(content)]
        expected = [(n, content[a:b]) for n, (a, b) in enumerate(spans)]
        # A source that has everything already may leave it to the return.
        assert sorted(arrivals) in (expected, [])
        assert [read(file.reader, *span) for span in spans] == [part for _, part in expected]
        file.reader.close()

    @pytest.mark.parametrize("reopened", [False, True])
    async def test_scattered_reads_give_the_file(self, world: World, reopened: bool) -> None:
        content = weights(1, {"note": "x" * 9000})
        file, key = await fetch_content(world, content)
        reader = world.source.reopen(key) if reopened else file.reader
        whole = memoryview(bytearray(len(content)))
        cuts = [0, 0, *range(3, len(content), 7), len(content)]
        reader.read_into([whole[a:b] for a, b in pairwise(cuts)], 0)
        assert len(cuts) > 1200  # more than one call takes
        loaded = safetensors.torch.load(bytes(whole))
        assert all(torch.equal(loaded[name], t) for name, t in tensors(1).items())
        assert read(reader, 5, 5) == b""
        view = memoryview(bytearray(48)).cast("B", (6, 8))
        reader.read_into([view], header_bytes(content))
        assert view.tobytes() == content[header_bytes(content) :][:48]
        file.reader.close()
        reader.close()

    @pytest.mark.parametrize("reopened", [False, True])
    async def test_rows_come_one_after_the_other(self, world: World, reopened: bool) -> None:
        """Rows at odd offsets, without a gap, and a single one; not beyond the end."""
        content = weights(1)
        start, size = header_bytes(content), len(content)
        file, key = await fetch_content(world, content)
        reader = world.source.reopen(key) if reopened else file.reader
        for first, nbytes, rows, pitch in ROWS:
            span = ByteSpan(start + first, start + first + nbytes, rows, pitch)
            assert read_rows(reader, span) == rows_of(content, span)
        view = memoryview(bytearray(48)).cast("B", (4, 12))
        reader.read_into([view], start, 4, 96)
        assert view.tobytes() == rows_of(content, ByteSpan(start, start + 12, 4, 96))
        for beyond in (1, 97, 1000):  # the last ends within the file, or begins behind it
            first = size + beyond - 2 * 96 - 12
            apart = ByteSpan(first, first + 12, 3, 96)
            cannot_read(reader, apart, IntegrityError, "ends before byte")
        file.reader.close()
        reader.close()

    async def test_no_more_is_brought_than_the_rows(self, world: World) -> None:
        """These rows can be read; a source that tracks its bytes refuses the others."""
        content = weights(1)
        start = header_bytes(content)
        span = ByteSpan(start + 24, start + 48, 4, 96)
        file, _ = await fetch_content(world, content, span)
        assert read_rows(file.reader, span) == rows_of(content, span)
        wider = ByteSpan(span.start, span.stop + 1, 4, 96)
        try:
            assert read_rows(file.reader, wider) == rows_of(content, wider)
        except errors.InternalError as error:
            assert "before they arrived" in str(error)
        file.reader.close()

    async def test_a_cancelled_fetch_ends_early(self, world: World) -> None:
        content = weights(1)
        file = await world.source.open(await resolved(world, content), FetchControl())
        control, seen = FetchControl(), list[int]()
        control.cancel()
        with closing(file.reader), pytest.raises(FetchError):
            await world.source.fetch_groups(file, groups_of(content), seen.append, control)
        assert seen == []

    @VERSIONS
    async def test_another_version_is_not_opened(
        self, world: World, config: bytes, content: bytes
    ) -> None:
        key = await resolved(world, weights(1))
        world.put("one", config, content)
        with pytest.raises(IntegrityError, match="again"):
            file = await world.source.open(key, FetchControl())
            with closing(file.reader):  # what came until then may be no more than a promise
                await fetch_all(world.source, file, content)

    async def test_no_read_mixes_versions(self, world: World) -> None:
        content = weights(1)
        file, key = await fetch_content(world, content)
        world.put("one", CONFIG, weights(2))
        rows = ByteSpan(header_bytes(content), header_bytes(content) + 12, 4, 96)
        for reader in (file.reader, world.source.reopen(key)):
            try:  # a source that has its own copy goes on with what was opened
                assert read_rows(reader, rows) == rows_of(content, rows)
                assert read(reader, 0, len(content)) == content
            except IntegrityError as error:
                assert "again" in str(error)
            reader.close()

    @pytest.mark.parametrize("content", [b"PK\3\4" + b"x" * 400, b"x", b"\x09" + b"\0" * 7 + b"{}"])
    async def test_a_file_without_a_header_is_refused(self, world: World, content: bytes) -> None:
        key = await resolved(world, content)
        with pytest.raises(errors.AdapterFormatError):
            await world.source.open(key, FetchControl())

    async def test_a_digest_is_that_of_the_weights(self, world: World) -> None:
        contents = [weights(1), weights(2, {"note": "x" * 9000})]
        for content in contents:
            file, key = await fetch_content(world, content)
            file.reader.close()
            assert await world.source.digest(key) == sha256(content).hexdigest()
        world.put("one", CONFIG, weights(3))
        try:  # a source that has its own copy goes on with what was opened
            assert await world.source.digest(key) == sha256(contents[-1]).hexdigest()
        except IntegrityError as error:
            assert "again" in str(error)

    @pytest.mark.parametrize("late", [0.0, 0.003])
    @pytest.mark.parametrize("step", ["resolve", "open", "digest"])
    async def test_cancelled_at_any_await(self, world: World, step: str, late: float) -> None:
        key = await resolved(world, weights(1))
        if step == "digest":
            file = await world.source.open(key, FetchControl())
            await fetch_all(world.source, file, weights(1))
            file.reader.close()
        call: Callable[..., Coroutine[Any, Any, Any]] = getattr(world.source, step)
        asked = {"resolve": (world.ref("one"),), "open": (key, FetchControl()), "digest": (key,)}
        ends = [await was_cancelled(call(*asked[step]), at, late) for at in range(12)]
        assert set(ends) == {True, False}


async def held(source: Source, key: AdapterKey, *, holdable: bool) -> MappedFile | None:
    """Bring an adapter into host memory, as the host tier does. Its threads have ended then."""
    with ThreadPoolExecutor(2) as threads:
        return await populate(source.reopen(key), threads, holdable=holdable)


class HoldingWorld(World, Protocol):
    holds: bool
    """Its adapters can be held: `AdapterFile.holdable`, and readers with a `file` method."""


class PopulateConformance:
    """What a source opens again, the host tier can map, or else read ahead."""

    async def test_a_map_is_what_the_opened_file_promised(self, world: HoldingWorld) -> None:
        content = weights(1)
        key = await resolved(world, content)
        file = await world.source.open(key, FetchControl())
        file.reader.close()
        assert file.holdable is world.holds
        with mapped(await held(world.source, key, holdable=file.holdable)) as pages:
            assert (pages.nbytes if pages else 0) == (len(content) if world.holds else 0)

    async def test_maps_are_closed_once_each_in_any_thread(self, world: HoldingWorld) -> None:
        key = await resolved(world, weights(1))
        found = [await held(world.source, key, holdable=world.holds) for _ in range(6)]
        maps = [pages for pages in found if pages is not None]
        assert len(maps) == 6 * world.holds
        with ThreadPoolExecutor(3) as threads:
            closings = [threads.submit(pages.close) for pages in (*maps[:5], *maps[:5])]
            assert [closing.result() for closing in closings] == [None] * len(closings)
        for pages in 2 * maps[5:]:
            pages.close()

    @pytest.mark.parametrize("closed", [False, True])
    async def test_a_map_leaves_readers_alone(self, world: HoldingWorld, closed: bool) -> None:
        content = weights(1)
        file, key = await fetch_content(world, content)
        with mapped(await held(world.source, key, holdable=world.holds)) as pages:
            if closed and pages is not None:
                pages.close()
            for reader in (file.reader, world.source.reopen(key)):
                assert read(reader, 0, len(content)) == content
                reader.close()

    async def test_a_mapped_adapter_may_be_replaced(self, world: HoldingWorld) -> None:
        contents = weights(1), weights(2, {"note": "longer"})
        with ExitStack() as maps:
            for content in contents:
                pages = await held(
                    world.source, await resolved(world, content), holdable=world.holds
                )
                maps.enter_context(mapped(pages))
                assert (pages.nbytes if pages else 0) == (len(content) if world.holds else 0)

    @VERSIONS
    async def test_another_version_is_not_held(
        self, world: HoldingWorld, config: bytes, content: bytes
    ) -> None:
        key = await resolved(world, weights(1))
        world.put("one", config, content)
        with pytest.raises(IntegrityError, match="again"):
            await held(world.source, key, holdable=world.holds)

    @pytest.mark.parametrize("late", [0.0, 0.003])
    async def test_populate_cancelled_at_any_await(self, world: HoldingWorld, late: float) -> None:
        key = await resolved(world, weights(1))
        calls = (held(world.source, key, holdable=world.holds) for _ in range(12))
        ends = [await was_cancelled(call, at, late) for at, call in enumerate(calls)]
        assert ends.count(True) >= 1
        assert ends == sorted(ends, reverse=True)


def mapped(pages: MappedFile | None) -> AbstractContextManager[MappedFile | None]:
    """Close the map, if there is one, at the end."""
    return nullcontext() if pages is None else closing(pages)
