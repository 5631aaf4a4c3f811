"""Local files that are hashed before they are used, and when a caller says what they come to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from local_world import LIMITS, WEIGHTS_NAME, LocalWorld, nothing_left_open
from source_inputs import CONFIG, groups_of, weights

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io import hashing
from lorax_async.io.ports import Demand
from lorax_async.io.sources import local
from lorax_async.io.sources.checked_open import FileReader
from lorax_async.io.sources.local import LocalSource
from lorax_async.verification import Verification

CONTENT = weights(1, {"note": "x" * 3000})


class HashingWorld(LocalWorld):
    def __init__(self, base: Path, threads: ThreadPoolExecutor) -> None:
        super().__init__(base, threads)
        self.source = LocalSource(roots=self.roots, limits=LIMITS, threads=threads, hashes=True)

    @property
    def path(self) -> Path:
        return self.roots[0] / "one" / WEIGHTS_NAME

    async def key(self) -> AdapterKey:
        return await self.source.resolve(self.put("one", CONFIG, CONTENT))

    async def bring(
        self, key: AdapterKey, seen: list[int] | None = None, demand: Demand | None = None
    ) -> Verification:
        file = await self.source.open(key, Demand())
        arrived: Callable[[int], None] = ([] if seen is None else seen).append
        try:
            return await self.source.bring(file, groups_of(CONTENT), arrived, demand or Demand())
        finally:
            file.reader.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[HashingWorld]:
    with nothing_left_open(tmp_path), ThreadPoolExecutor(2) as threads:
        (tmp_path / "more").mkdir()
        yield HashingWorld(tmp_path / "more", threads)


class Reading:
    """Reads of any file; `before` is called with the number of each."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.count = 0
        self._before = before
        self._read = FileReader.read_into

    def __get__(self, reader: Any, _: Any) -> Callable[..., None]:
        def read_into(buffers: Any, offset: int) -> None:
            self._before(self.count)
            self.count += 1
            self._read(reader, buffers, offset)

        return read_into


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("call", ["bring", "digest"])
@pytest.mark.parametrize("piece", [0, 2])
async def test_a_file_that_changes_meanwhile_is_refused(
    world: HashingWorld, monkeypatch: pytest.MonkeyPatch, call: str, piece: int
) -> None:
    """Also by other bytes of the same length, put in their place."""

    def change(number: int) -> None:
        if number == first + piece:
            with world.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")

    first = 1 if call == "bring" else 0  # opening reads the header
    reading = Reading(change)
    key = await world.key()
    monkeypatch.setattr(FileReader, "read_into", reading)
    with pytest.raises(IntegrityError, match="changed or replaced meanwhile"):
        await (world.bring(key) if call == "bring" else world.source.digest(key))


async def test_a_digest_is_the_same_at_every_open(
    world: HashingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that forgets changes no time of change; here every look at the file is the first."""
    key = await world.key()
    first = await world.bring(key)
    assert await world.bring(key) == first
    read_into = FileReader.read_into

    def forgotten(reader: FileReader, buffers: Sequence[memoryview], offset: int) -> None:
        read_into(reader, buffers, offset)
        if offset:
            buffers[-1][-1] ^= 1

    monkeypatch.setattr(hashing, "PIECE_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_into", forgotten)
        for call in (world.bring(key), world.source.digest(key)):
            with pytest.raises(IntegrityError, match="other bytes than before"):
                await call
    newer = await world.key()
    assert newer != key
    assert await world.bring(newer) == first
    monkeypatch.setattr(local, "MAX_DIGESTS", 1)  # what is not remembered is not compared
    for name in ("two", "three"):
        await world.source.digest(await world.source.resolve(world.put(name, CONFIG, CONTENT)))
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_into", forgotten)
        assert await world.bring(newer) != first


@pytest.mark.usefixtures("small_pieces")
async def test_hashing_ends_when_nobody_wants_it(
    world: HashingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = Demand()
    reading = Reading(lambda number: demand.end() if number == 2 else None)
    key = await world.key()
    monkeypatch.setattr(FileReader, "read_into", reading)
    with pytest.raises(FetchError, match="nobody waits"):
        await world.bring(key, demand=demand)
    assert reading.count == 3


async def test_others_have_the_threads_in_between(
    world: HashingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the file is: its pieces queue behind what was asked for meanwhile."""
    monkeypatch.setattr(hashing, "PIECE_BYTES", 64)
    key, others = await world.key(), 0
    hashed = asyncio.ensure_future(world.bring(key))
    while not hashed.done():
        await world.source.resolve(AdapterRef("./one"))
        others += 1
    assert (await hashed).kind == "transport"
    assert others > 10
