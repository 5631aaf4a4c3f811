"""Tensors in host memory, copied as they are, as a source has them."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from typing import Any

import pytest
import safetensors.torch
import torch
from late_device import build
from late_device.world import LATE
from source_conformance import fetch_all, held
from source_inputs import CONFIG, cannot_read, groups_of, read, read_rows, rows_of, tensors

from lorax_async import Limits, errors
from lorax_async.concurrency import FetchControl
from lorax_async.formats.safetensors import parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.sources import tensors as snapshot_module
from lorax_async.sources.base import SourceRouter
from lorax_async.sources.tensors import STEP_BYTES, HostCopies, MemorySource, TensorSnapshot
from lorax_async.testing import FakeSource
from lorax_async.types import AdapterKey

ROOM = 1 << 20
SIZE = len(safetensors.torch.save(tensors(1)))


class World:
    """A fake source; tensors in memory for `room` bytes."""

    def __init__(self, threads: ThreadPoolExecutor, room: int) -> None:
        self.inner = FakeSource(holdable=True)
        self.copies = HostCopies(room)
        self.memory = MemorySource(self.copies, Limits(), threads)
        self.source = SourceRouter(self.inner, self.inner)
        self.source.memory = self.memory

    async def take(self, seed: int = 1) -> AdapterKey:
        return await self.memory.take(tensors(seed), CONFIG, lambda: None)


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(threads, ROOM)
        yield world
        world.copies.clear()
    assert world.copies.used == 0
    assert world.inner.counts.open_readers == 0


async def test_tensors_are_opened_like_a_file(world: World) -> None:
    key = await world.take()
    await world.take(2)
    file = await world.source.open(key, FetchControl())
    content = read(file.reader, 0, file.reader.nbytes)
    assert_equal(safetensors.torch.load(content), tensors(1))
    assert (file.config, file.holdable) == (CONFIG, False)
    assert content.startswith(file.prefix)
    await fetch_all(world.source, file, content)
    again, apart = world.source.reopen(key), ByteSpan(50, 55, 7, 11)
    parts = [memoryview(bytearray(n)) for n in (0, 5, 1, 64)]
    again.read_into(parts, 7)
    assert b"".join(parts) == content[7:77]
    assert await held(world.source, key, holdable=False) is None
    assert await world.source.digest(key) == sha256(content).hexdigest()
    control = FetchControl()
    control.cancel()
    with pytest.raises(errors.FetchError, match="no caller waits"):
        await world.source.fetch_groups(file, groups_of(content), lambda _: None, control)
    world.copies.drop(key)
    assert read(again, 0, len(content)) == content, "open readers stay valid"
    beyond = ByteSpan(len(content) - 20, len(content) - 16, 3, 9)
    for reader in (file.reader, again):
        assert read_rows(reader, apart) == rows_of(content, apart)
        cannot_read(reader, beyond, errors.IntegrityError, "ends before byte")
        reader.close()
        reader.close()
        cannot_read(reader, apart, errors.FetchError, "was closed")


async def test_dropped_tensors_are_gone_when_their_readers_are_closed(world: World) -> None:
    key = await world.take()
    file = await world.source.open(key, FetchControl())
    nbytes = world.copies.used
    world.copies.drop(key)
    world.copies.drop(key)
    assert world.copies.used == nbytes
    with pytest.raises(errors.AdapterNotFoundError, match="pass them again") as caught:
        await world.source.open(key, FetchControl())
    assert caught.value.stage == "fetch"
    with pytest.raises(errors.FetchError, match="pass them again"):
        await held(world.source, key, holdable=False)
    with pytest.raises(errors.FetchError, match="load_tensors") as refused:
        await world.source.digest(key)
    assert not refused.value.retryable
    late = world.source.reopen(key)
    with closing(late), pytest.raises(errors.FetchError, match="pass them again"):
        read(late, 0, 1)
    assert (await world.take(), world.copies.used) == (key, 2 * nbytes)
    file.reader.close()
    assert world.copies.used == nbytes


async def test_the_budget_counts_what_is_being_copied(world: World) -> None:
    large = {"x": torch.zeros(ROOM // 8)}  # F32: half of it, and the header besides
    takes = [world.memory.take(large, CONFIG + b" " * n, lambda: None) for n in range(6)]
    keys = await asyncio.gather(*takes, return_exceptions=True)
    (key,) = (key for key in keys if isinstance(key, AdapterKey))
    assert sum(isinstance(key, errors.CapacityError) for key in keys) == 5
    assert world.copies.used == world.copies.sizes[key] < ROOM


async def test_bytes_keep_their_room_while_they_are_read(world: World) -> None:
    """A call that fits beside what stays waits for the rest, in the order of the calls."""
    key = await world.take(1)
    large = {"x": torch.zeros((ROOM - SIZE // 2) // 4)}
    with closing(world.source.reopen(key)) as reader:
        world.copies.drop(key)
        content, order = read(reader, 0, reader.nbytes), list[int]()

        async def take(number: int, tensors: dict[str, torch.Tensor]) -> AdapterKey:
            taken = await world.memory.take(tensors, CONFIG, lambda: None)
            order.append(number)
            return taken

        waiting = asyncio.create_task(take(1, large))
        await asyncio.sleep(0.05)  # its tensors are measured in a thread first
        later = asyncio.create_task(take(2, {"y": torch.zeros(ROOM // 5)}))
        await asyncio.sleep(0.05)
        assert order == []
        assert read(reader, 0, len(content)) == content
    assert isinstance(await waiting, AdapterKey)
    with pytest.raises(errors.CapacityError):  # beside the first one
        await later
    assert order == [1]


def begun(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> TensorSnapshot:
    snapshot = TensorSnapshot(tensors, config, Limits())
    snapshot.measure()
    return snapshot


def steps(snapshot: TensorSnapshot) -> int:
    return sum(1 for _ in snapshot.copy())


def taken(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> TensorSnapshot:
    steps(snapshot := begun(tensors, config))
    return snapshot


def read_back(file: TensorSnapshot) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(bytes(file.content.tolist()))


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_the_file_is_the_one_that_safetensors_reads() -> None:
    """Of every kind of view and of all three dtypes, in odd sizes."""
    base = torch.arange(7 * 9, dtype=torch.float32).view(7, 9)
    with torch.inference_mode():
        unversioned = torch.ones(3, 5)
    tensors = {
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
    file = taken(tensors)
    assert_equal(read_back(file), tensors)
    assert not file.content.requires_grad
    header = parse_header(file.prefix, file.content.nbytes)
    assert all(span.start % (4 if span.dtype == "F32" else 2) == 0 for span in header.tensors)
    assert len(file.prefix) % 64 == 0
    assert bytes(file.content[: len(file.prefix)].tolist()) == file.prefix


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
    assert steps(begun({"large": torch.zeros(3 * STEP_BYTES // 4 + 5, 4)})) == 12
    assert steps(begun({str(n): torch.zeros(1) for n in range(1000)})) == 3
    wide = torch.randn(2, STEP_BYTES // 4 + 3)
    assert_equal(read_back(taken({"wide": wide})), {"wide": wide})


def test_what_is_not_to_be_copied_is_refused_before_it_is() -> None:
    vast = torch.zeros(1).expand(1 << 31)
    for refused, named in (
        ({"x": torch.zeros(3, dtype=torch.int8)}, "torch.int8; pass it as"),
        ({"x": vast}, "over the limit of 4,294,967,296"),
        ({"x": vast, "y": vast}, "2 tensors are over the limit of 1"),
    ):
        with pytest.raises(errors.UnsupportedAdapterError, match=named):
            TensorSnapshot(refused, CONFIG, Limits(max_tensors=1)).measure()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_write_at_any_time_is_noticed(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(snapshot_module, "STEP_BYTES", 8)
    tensors = {name: torch.zeros(2) for name in "abc"}
    copying = begun(tensors).copy()
    for _ in range(at):
        next(copying)
    tensors["a"][0] = 1
    with pytest.raises(errors.IntegrityError, match="tensor 'a' was written to"):
        list(copying)


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
    with pytest.raises(errors.FetchError, match="tensor 'gone' has no memory behind it") as caught:
        steps(snapshot)
    assert not caught.value.retryable
    snapshot = begun({"fine": torch.zeros(3), "odd": torch.zeros(3).as_subclass(_Broken)})
    with pytest.raises(errors.FetchError, match="'odd' could not be copied: of its own") as caught:
        steps(snapshot)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("late")
def test_what_its_stream_has_yet_to_write_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, was_done = threading.Event(), list[bool]()

    class Told(torch.Event):
        def synchronize(self) -> None:
            was_done.append(self.query())
            begun.set()
            super().synchronize()

    monkeypatch.setattr(snapshot_module, "new_event", lambda device: Told(device=device))
    source = torch.arange(64, dtype=torch.float32).pin_memory()
    stream = torch.Stream(device=LATE)
    with ThreadPoolExecutor(1) as thread, build.held(stream):
        with stream:  # the zeros as well, or they may come last
            there = torch.zeros(64, dtype=torch.float32, device=LATE)
            there.copy_(source, non_blocking=True)
            snapshot = TensorSnapshot({"x": there, "y": source}, CONFIG, Limits())
        snapshot.measure()
        copying = thread.submit(steps, snapshot)
        assert begun.wait(20)
        assert was_done == [False]
        assert not copying.done()
    copying.result()
    assert_equal(read_back(snapshot), {"x": source, "y": source})
