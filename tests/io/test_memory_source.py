"""Tensors as a source has them: copied into the file that safetensors reads, within a budget."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from source_conformance import bring_all
from source_inputs import CONFIG, groups_of, read, read_rows, rows_of, tensors

from late_device import build
from late_device.world import LATE, loaded
from lorax_async.adapter import AdapterKey, TensorsKey
from lorax_async.config import Limits
from lorax_async.core.header import parse_header
from lorax_async.core.runs import Span
from lorax_async.errors import (
    AdapterNotFoundError,
    CapacityError,
    FetchError,
    IntegrityError,
    LoaderClosedError,
    UnsupportedAdapterError,
)
from lorax_async.io import snapshot as snapshot_module
from lorax_async.io.ports import Demand
from lorax_async.io.snapshot import STEP_BYTES, Snapshot, TensorsFile
from lorax_async.io.sources.from_memory import MemorySource
from lorax_async.testing import FakeSource

ROOM = 1 << 20


class World:
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.inner = FakeSource()
        self.source = MemorySource(self.inner, nbytes=ROOM, limits=Limits(), threads=threads)

    async def take(self, seed: int = 1) -> AdapterKey:
        return await self.source.take(tensors(seed), CONFIG, lambda: None)

    @property
    def used(self) -> int:
        return self.source.copies.used


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(threads)
        yield world
        world.source.copies.clear()
    assert world.used == 0
    assert world.inner.counts.open_readers == 0


async def test_it_is_opened_like_a_file(world: World) -> None:
    key = await world.take()
    assert isinstance(key, TensorsKey)
    file = await world.source.open(key, Demand())
    content = read(file.reader, 0, file.reader.nbytes)
    loaded = safetensors.torch.load(content)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1).items())
    assert loaded.keys() == tensors(1).keys()
    assert file.config == CONFIG
    assert content.startswith(file.prefix)
    assert not file.holdable
    await bring_all(world.source, file, content)
    again = world.source.reopen(key)
    assert read(again, 3, 40) == content[3:40]
    parts = [memoryview(bytearray(n)) for n in (0, 5, 1, 64)]
    again.read_into(parts, 7)
    assert b"".join(parts) == content[7:77]
    apart = Span(50, 55, 7, 11)
    assert read_rows(again, apart) == rows_of(content, apart)
    for reader in (file.reader, again):
        with pytest.raises(IntegrityError, match="ends before byte"):
            read(reader, len(content) - 3, len(content) + 1)
        with pytest.raises(IntegrityError, match="ends before byte"):
            read_rows(reader, Span(len(content) - 20, len(content) - 16, 3, 9))
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="was closed"):
            read(reader, 0, 1)
        with pytest.raises(FetchError, match="was closed"):
            read_rows(reader, apart)
    assert world.used == len(content)
    hold = await world.source.populate(key)
    assert (hold.nbytes, hold.locked) == (0, False)
    hold.close()
    assert await world.source.digest(key) == sha256(content).hexdigest()
    file, demand = await world.source.open(key, Demand()), Demand()
    demand.end()
    with pytest.raises(FetchError, match="nobody waits"):
        await world.source.bring(file, groups_of(content), lambda _: None, demand)
    file.reader.close()


async def test_what_was_dropped_is_read_to_its_end_and_no_more(world: World) -> None:
    key = await world.take()
    file = await world.source.open(key, Demand())
    nbytes = world.used
    world.source.copies.drop(key)
    world.source.copies.drop(key)
    assert world.source.copies.sizes == {}
    assert world.used == nbytes, "who reads has the bytes"
    assert len(read(file.reader, 0, nbytes)) == nbytes
    with pytest.raises(AdapterNotFoundError, match="give them again") as caught:
        await world.source.open(key, Demand())
    assert caught.value.stage == "fetch"
    with pytest.raises(FetchError, match="give them again"):
        await world.source.populate(key)
    with pytest.raises(FetchError, match="load_tensors") as refused:
        await world.source.digest(key)
    assert not refused.value.retryable
    late = world.source.reopen(key)
    with pytest.raises(FetchError, match="give them again"):
        read(late, 0, 1)
    late.close()
    again = await world.take()
    assert (again, world.used) == (key, 2 * nbytes)
    file.reader.close()
    assert world.used == nbytes


async def test_the_budget_counts_what_is_being_copied(world: World) -> None:
    large = {"x": torch.zeros(ROOM // 8)}  # F32: half of it, and the header besides
    keys = await asyncio.gather(
        *(world.source.take(large, CONFIG + b" " * n, lambda: None) for n in range(6)),
        return_exceptions=True,
    )
    (key,) = (key for key in keys if isinstance(key, AdapterKey))
    assert sum(isinstance(key, CapacityError) for key in keys) == 5
    assert world.used == world.source.copies.sizes[key] < ROOM


@pytest.mark.parametrize("late", [0.0, 0.003])
async def test_cancelled_at_any_await(world: World, late: float) -> None:
    ends = [await was_cancelled(_forget(world), at, late) for at in range(8)]
    assert ends.count(True) >= 2
    assert ends == sorted(ends, reverse=True)


async def _forget(world: World) -> None:
    world.source.copies.drop(await world.take())


async def test_nothing_begins_once_it_is_closed(world: World) -> None:
    def closed() -> None:
        raise LoaderClosedError("the loader is closed")

    with pytest.raises(LoaderClosedError):
        await world.source.take(tensors(1), CONFIG, closed)
    assert world.used == 0


# -- the copy: safetensors' own reader reads it ----------------------------------------------------


def begun(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> Snapshot:
    snapshot = Snapshot(tensors, config, Limits())
    snapshot.measure()
    return snapshot


def taken(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> TensorsFile:
    snapshot = begun(tensors, config)
    while snapshot.step():
        pass
    return snapshot.file()


def read_back(file: TensorsFile) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(bytes(file.content.tolist()))


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def awkward() -> dict[str, torch.Tensor]:
    """Of every kind of view and of all three dtypes, in odd sizes."""
    base = torch.arange(7 * 9, dtype=torch.float32).view(7, 9)
    with torch.inference_mode():
        unversioned = torch.ones(3, 5)
    return {
        "z odd half": torch.arange(5).half(),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 3, dtype=torch.bfloat16).expand(5, 3),
        "shared": base[1:3],
        "shared again": base[2:4],
        "a parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "of inference": unversioned,
        "a number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "negated": torch.view_as_real(torch.tensor([1 + 2j, 3 - 4j]).conj().resolve_conj())[:, 1],
        "a line": torch.randn(11, dtype=torch.bfloat16),
        "naïve ✓": torch.zeros(2, dtype=torch.float16),
    }


def test_the_file_is_the_one_that_safetensors_reads() -> None:
    tensors = awkward()
    file = taken(tensors)
    assert_equal(read_back(file), tensors)
    assert not file.content.requires_grad
    header = parse_header(file.prefix, file.content.nbytes)
    for span in header.tensors:
        dtype = {"F32": 4, "F16": 2, "BF16": 2}[span.dtype]
        assert span.start % dtype == 0
    assert len(file.prefix) % 64 == 0
    assert bytes(file.content[: len(file.prefix)].tolist()) == file.prefix
    assert file.config == CONFIG


def test_the_key_tells_config_names_shapes_and_bytes() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    others = [
        one | {"b": torch.tensor([4.0])},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(1, 2), "b": one["b"]},
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])},
        {"a": one["a"].view(torch.float16), "b": one["b"]},
    ]
    keys = {taken(each).key for each in [one, *others]} | {taken(one, CONFIG + b" ").key}
    assert len(keys) == 7
    assert taken({name: tensor.clone() for name, tensor in one.items()}).key in keys


def test_a_step_is_some_milliseconds_of_work() -> None:
    """Whatever the sizes: one large tensor, or very many small ones. A row is not cut."""
    large = begun({"large": torch.zeros(3 * STEP_BYTES // 4 + 5, 4)})
    assert sum(1 for _ in iter(large.step, False)) == 12
    small = begun({str(n): torch.zeros(1) for n in range(1000)})
    assert sum(1 for _ in iter(small.step, False)) == 3
    wide = torch.randn(2, STEP_BYTES // 4 + 3)
    assert_equal(read_back(taken({"wide": wide})), {"wide": wide})


def test_what_is_not_to_be_copied_is_refused_before_it_is() -> None:
    with pytest.raises(UnsupportedAdapterError, match="torch.int8; give it as"):
        begun({"x": torch.zeros(3, dtype=torch.int8)})
    vast = torch.zeros(1).expand(1 << 31)
    with pytest.raises(UnsupportedAdapterError, match="over the limit of 4,294,967,296"):
        begun({"x": vast})
    with pytest.raises(UnsupportedAdapterError, match="2 tensors are over the limit of 1"):
        Snapshot({"x": vast, "y": vast}, CONFIG, Limits(max_tensors=1))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_write_at_any_time_is_noticed(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(snapshot_module, "STEP_BYTES", 8)
    tensors = {name: torch.zeros(2) for name in "abc"}
    snapshot = begun(tensors)
    for _ in range(at):
        assert snapshot.step()
    tensors["a"][0] = 1
    with pytest.raises(IntegrityError, match="tensor 'a' was written to"):
        while snapshot.step():
            pass


class _Broken(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "copy_":
            raise ValueError("of its own")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_a_tensor_that_cannot_be_read_is_named() -> None:
    gone = torch.zeros(4)
    snapshot = begun({"gone": gone})
    gone.untyped_storage().resize_(0)
    with pytest.raises(FetchError, match="tensor 'gone' has no memory behind it") as caught:
        snapshot.step()
    assert not caught.value.retryable
    snapshot = begun({"fine": torch.zeros(3), "odd": torch.zeros(3).as_subclass(_Broken)})
    with pytest.raises(FetchError, match="tensor 'odd' could not be copied: of its own") as caught:
        snapshot.step()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


@pytest.mark.usefixtures("late")
def test_what_its_stream_has_yet_to_write_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    was_done: list[bool] = []

    class Told(torch.Event):
        def synchronize(self) -> None:
            was_done.append(self.query())
            begun.set()
            super().synchronize()

    monkeypatch.setattr(snapshot_module, "new_event", lambda device: Told(device=device))
    source = torch.arange(64, dtype=torch.float32).pin_memory()
    stream = torch.Stream(device=LATE)
    with build.held(stream):
        with stream:  # the zeros as well, or they may come last
            there = torch.zeros(64, dtype=torch.float32, device=LATE)
            there.copy_(source, non_blocking=True)
            snapshot = Snapshot({"x": there, "y": source}, CONFIG, Limits())
        snapshot.measure()

        def copy() -> None:
            while snapshot.step():
                pass
            ended.set()
            begun.set()

        thread = threading.Thread(target=copy)
        thread.start()
        assert begun.wait(20)
        assert was_done == [False]
        assert not ended.is_set()
    thread.join(20)
    assert_equal(read_back(snapshot.file()), {"x": source, "y": source})
