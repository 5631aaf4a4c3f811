"""Every source of adapters in this process keeps to the port."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from leaks import mapped_files
from local_world import LocalWorld, nothing_left_open
from source_conformance import PopulateConformance, SourceConformance

from lorax_async import AdapterRef, Limits
from lorax_async.sources.base import Source, SourceRouter
from lorax_async.sources.tensors import HostCopies, MemorySource
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
        with nothing_left_open(folder, immutable=held, hashes="hashed" in kind) as local:
            yield local
        return
    with ThreadPoolExecutor(2) as threads:
        fake = FakeWorld(holds=held)
        if kind.startswith("memory"):  # what is none of its own, the other source answers
            memory = MemorySource(HostCopies(1 << 20), Limits(), threads)
            fake.source = SourceRouter(fake.inner, fake.inner)
            fake.source.memory = memory
        yield fake
    assert fake.inner.counts.open_readers == 0
    assert not mapped_files()


KINDS = ["fake", "fake held", "local", "local held", "local hashed", "memory", "memory held"]


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeWorld | LocalWorld]:
    with made(request.param, tmp_path) as world:
        yield world


class TestConformance(SourceConformance):
    pass


class TestPopulate(PopulateConformance):
    pass
