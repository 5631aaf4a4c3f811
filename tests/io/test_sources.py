"""Every source of adapters in this process keeps to the port; and the fake does as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_world import LIMITS, LocalWorld, nothing_left_open
from populate_conformance import PopulateConformance
from source_conformance import SourceConformance
from source_inputs import CONFIG, groups_of, read, weights

import tiny
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.errors import (
    InternalError,
)
from lorax_async.io.ports import AdapterFile, Demand, Source
from lorax_async.io.sources.from_memory import MemorySource
from lorax_async.io.sources.local import LocalSource
from lorax_async.io.sources.merged import MergedSource
from lorax_async.testing import FakeSource


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
