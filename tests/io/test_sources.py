"""Every source of adapters in this process keeps to the port; and the fake does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_world import LIMITS, LocalWorld, nothing_left_open
from populate_conformance import PopulateConformance
from source_conformance import SourceConformance, bring_all
from source_inputs import CONFIG, groups_of, read, weights

import tiny
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.errors import (
    FetchError,
    IntegrityError,
    InternalError,
)
from lorax_async.io.ports import AdapterFile, Demand, Source
from lorax_async.io.sources.from_memory import MemorySource
from lorax_async.io.sources.local import LocalSource
from lorax_async.io.sources.merged import MergedSource
from lorax_async.testing import FakeSource
from lorax_async.verification import Verification


class FakeWorld:
    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds
        self.inner = FakeSource(holdable=holds)
        self.source: Source = self.inner

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        self.inner.put(name, config, weights)
        return AdapterRef(name)

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name)


@contextmanager
def made(kind: str, folder: Path) -> Iterator[FakeWorld | LocalWorld]:
    held = kind.endswith(" held")
    if kind.startswith("local"):
        with nothing_left_open(folder, immutable=held) as local:
            yield local
        return
    if kind == "hashed":
        with nothing_left_open(folder) as local, ThreadPoolExecutor(2) as threads:
            hashing = LocalSource(roots=local.roots, limits=LIMITS, threads=threads, hashes=True)
            local.source = hashing
            yield local
        return
    with ThreadPoolExecutor(2) as threads:
        fake = FakeWorld(holds=held)
        if kind == "tensors":  # whatever is none of its own, the other source answers
            fake.source = MemorySource(fake.inner, nbytes=1 << 20, limits=Limits(), threads=threads)
        if kind.startswith("merges"):
            fake.source = MergedSource(
                fake.inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads
            )
        yield fake
    counts = fake.inner.counts
    assert (counts.open_readers, counts.open_holds) == (0, 0)


KINDS = ["fake", "fake held", "local", "local held", "hashed", "merges held", "tensors"]


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeWorld | LocalWorld]:
    with made(request.param, tmp_path) as world:
        yield world


class TestConformance(SourceConformance):
    pass


class TestPopulate(PopulateConformance):
    pass


@pytest.fixture
def source() -> Iterator[FakeSource]:
    source = FakeSource(holdable=True)
    yield source
    assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)


async def opened(source: FakeSource, content: bytes, name: str = "one") -> AdapterFile:
    return await source.open(source.put(name, CONFIG, content), Demand())


async def test_the_fake_counts(source: FakeSource) -> None:
    content = weights(1)
    source.put("one", CONFIG, content)
    key = await source.resolve(AdapterRef("one"))
    files = [await source.open(key, Demand()) for _ in range(2)]
    readers = [source.reopen(key) for _ in range(3)]
    await bring_all(source, files[0], content)
    hold = await source.populate(key)
    assert (source.counts.open_readers, source.counts.open_holds, hold.locked) == (5, 1, True)
    hold.close()
    read(files[0].reader, 0, 10)
    read(readers[0], 5, 7)
    for reader in [*readers, *(file.reader for file in files)]:
        reader.close()
    counts = source.counts
    assert (counts.resolves, counts.opens, counts.reopens) == (1, 2, 3)
    assert (counts.brings, counts.populates, counts.bytes_read) == (1, 1, 12)


async def test_the_fakes_bytes_that_have_not_arrived_cannot_be_read(source: FakeSource) -> None:
    content = weights(1)
    file = await opened(source, content)
    (first,), (middle,), _ = groups_of(content)
    late = [(first.start, first.stop), (0, len(content)), (middle.start, middle.start + 1)]
    for start, stop in late:
        with pytest.raises(InternalError, match="before they arrived"):
            read(file.reader, start, stop)
    await source.bring(file, [[middle]], lambda _: None, Demand())
    assert read(file.reader, 0, middle.stop) == content[: middle.stop]
    with pytest.raises(InternalError, match="before they arrived"):
        read(file.reader, middle.start, middle.stop + 1)
    file.reader.close()


async def test_the_fakes_groups_wait_until_they_are_allowed(source: FakeSource) -> None:
    """But not for who gives up."""
    content = weights(1)
    file = await opened(source, content)
    source.hold("one")
    demand, seen = Demand(), list[int]()
    asyncio.get_running_loop().call_later(0.01, demand.end)
    with pytest.raises(FetchError):
        await source.bring(file, groups_of(content), seen.append, demand)
    bringing = asyncio.ensure_future(bring_all(source, file, content))
    source.allow("one", 0, 2)
    await asyncio.sleep(0.02)
    assert not bringing.done()
    source.allow("one")
    assert await bringing == [0, 1, 2]
    demand = Demand()

    def arrived(group: int) -> None:
        seen.append(group)
        demand.end()

    with pytest.raises(FetchError):
        await source.bring(file, groups_of(content), arrived, demand)
    assert seen == [0]
    source.remove("one")
    with pytest.raises(IntegrityError):
        await bring_all(source, file, content)
    file.reader.close()


@pytest.mark.parametrize("step", ["resolve", "open", "digest", "populate"])
async def test_the_fakes_steps_fail_to_order(source: FakeSource, step: Any) -> None:
    order = FetchError("the disk is on fire")
    ref, other = AdapterRef("one"), AdapterRef("two")
    for name in ("one", "two"):
        source.put(name, CONFIG, weights(1))
    key, other_key = [await source.resolve(each) for each in (ref, other)]
    source.fail(step, order, id="one", times=2)
    call = getattr(source, step)
    more = (Demand(),) if step == "open" else ()
    for _ in range(2):
        with pytest.raises(FetchError, match="on fire") as caught:
            await call(ref if step == "resolve" else key, *more)
        assert caught.value is not order
    for each in (other, ref) if step == "resolve" else (other_key, key):
        close_if_open(await call(each, *more))


def close_if_open(opened: object) -> None:
    reader = getattr(opened, "reader", opened)
    if hasattr(reader, "close"):
        reader.close()


async def test_the_fakes_groups_and_reads_fail_to_order(source: FakeSource) -> None:
    content = weights(1)
    file = await opened(source, content)
    source.fail("bring", FetchError("cut off"), at=1)
    seen: list[int] = []
    with pytest.raises(FetchError, match="cut off"):
        await source.bring(file, groups_of(content), seen.append, Demand())
    assert seen == [0]
    assert await bring_all(source, file, content) == [0, 1, 2]
    source.fail("read", OSError("a foreign error"), at=100)
    assert read(file.reader, 0, 100) == content[:100]
    assert read(file.reader, 101, 200) == content[101:200]
    with pytest.raises(OSError, match="foreign"):
        read(file.reader, 90, 101)
    assert read(file.reader, 90, 101) == content[90:101]
    file.reader.close()


async def test_a_file_of_the_fake_that_is_here_is_verified_to_order(source: FakeSource) -> None:
    content, known = weights(1), Verification("transport", "0" * 64)
    seen = list[int]()
    file = await opened(source, content)
    source.hold_verification("one")
    source.verifications["one"] = known
    source.fail("verify", IntegrityError("other bytes"))
    for _ in range(2):
        seen.clear()
        demand = Demand()
        bringing = asyncio.ensure_future(
            source.bring(file, groups_of(content), seen.append, demand)
        )
        await asyncio.sleep(0.02)
        assert seen == [0, 1, 2]
        assert not bringing.done()
        demand.end()
        with pytest.raises(FetchError, match="nobody waits"):
            await bringing
    source.allow_verification("one")
    with pytest.raises(IntegrityError, match="other bytes"):
        await bring_all(source, file, content)
    with pytest.raises(InternalError, match="before they arrived"):
        read(file.reader, len(content) - 8, len(content))
    assert await source.bring(file, groups_of(content), seen.append, Demand()) == known
    assert read(file.reader, len(content) - 8, len(content)) == content[-8:]
    file.reader.close()
