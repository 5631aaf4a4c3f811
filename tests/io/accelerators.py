"""`CudaDevice` on what there is: the late device always, CUDA in a process that has it."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from device_groups import ARENA, EXTENT, SHAPES, Group, made_by

from late_device import build
from late_device.world import loaded
from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import StagedPiece

Made = Callable[..., CudaDevice]

KINDS = ["late", pytest.param("cuda", marks=pytest.mark.gpu)]
"""One in a process: where the late device is loaded, it is the accelerator that torch sees."""

_PRODUCTS = 200  # some tenths of a second


def one_layer(modules: int) -> ModelLayout:
    return ModelLayout(
        tuple(Module(f"layers.0.{n}", 16, 16, 0, Parallel.COLUMN) for n in range(modules)), 1, "F32"
    )


def devices_of(kind: str) -> Iterator[Made]:
    """For a fixture `new_device`."""
    if kind == "late":
        with contextmanager(loaded)():
            yield from made_by(partial(CudaDevice, device=kind))
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != kind:
        pytest.skip(f"{kind} is not this process's accelerator")
    yield from made_by(partial(CudaDevice, device=kind))


def opened_devices(kind: str) -> Iterator[CudaDevice]:
    """For a fixture `device`."""
    for make in devices_of(kind):
        device = make()
        device.open()
        yield device


class _Witness(torch.Tensor):
    """Staged bytes that note on which stream they are copied."""

    seen: torch.Stream

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "copy_":
            cls.seen = torch.accelerator.current_stream()
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


_copy_streams: weakref.WeakKeyDictionary[CudaDevice, torch.Stream] = weakref.WeakKeyDictionary()


def copy_stream(device: CudaDevice) -> torch.Stream:
    """The stream that the device's copies run on: the first look copies some bytes."""
    if device not in _copy_streams:
        piece = StagedPiece(device.staging_memory(64).as_subclass(_Witness), 0)
        device.copy(piece, (), Extent(ARENA - EXTENT, EXTENT), 0).result(10)
        _copy_streams[device] = _Witness.seen
    return _copy_streams[device]


def compute_stream(device: CudaDevice) -> torch.Stream:
    return torch.Stream(device=device.name)


@contextmanager
def held(stream: torch.Stream) -> Iterator[None]:
    """The stream starts nothing more until the block ends; on CUDA it computes for a while."""
    if stream.device.type == "late":
        with build.held(stream):
            yield
        return
    with stream:
        square = torch.ones(4096, 4096, device=stream.device)
        for _ in range(_PRODUCTS):
            square = square @ square
    yield


def a_of_module_0(device: CudaDevice, made: Group, offset: int) -> torch.Tensor:
    """Where A of module 0 is, or will be, whatever the device says of it."""
    want = made.weights[0][0]
    found = device.view(Extent(offset + made.rows[0].a, want.nbytes))
    return found.view(want.dtype).view(want.shape)


def read_on(stream: torch.Stream, source: torch.Tensor, into: torch.Tensor) -> None:
    """Stands for a kernel: reads `source` when the stream gets there. Allocates nothing."""
    with stream:
        into.copy_(source, non_blocking=True)


def waits(stream: torch.Stream) -> None:
    """What is on it does not run, however much time it has."""
    for _ in range(30):
        assert not stream.query()
        time.sleep(0.001)


def eventually(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")


Column = tuple[list[list[int]], list[float], list[int]]


def column_now(device: CudaDevice, slot: int) -> Column:
    """Addresses `[modules][A, B]`, scales and ranks, whatever streams have yet to do."""
    return (
        _now(device.address)[:, :, slot].T.tolist(),
        _now(device.scale)[:, slot].tolist(),
        _now(device.rank)[:, slot].tolist(),
    )


def _now(table: torch.Tensor) -> torch.Tensor:
    content = table.untyped_storage()
    words = torch.frombuffer(
        bytearray(ctypes.string_at(content.data_ptr(), content.nbytes())), dtype=table.dtype
    )
    return words.as_strided(table.shape, table.stride(), table.storage_offset())


def column_of(device: CudaDevice, made: Group, offset: int) -> Column:
    """What the column of a slot is to be that has this group alone."""
    base = device.view(Extent(offset, 1)).data_ptr()
    addresses, scales, ranks = [[0, 0]] * len(SHAPES), [0.0] * len(SHAPES), [0] * len(SHAPES)
    for row in made.rows:
        addresses[row.module] = [base + row.a, base + row.b]
        scales[row.module] = float(torch.tensor(row.scale, dtype=torch.float32))
        ranks[row.module] = row.padded_rank
    return addresses, scales, ranks


EMPTY_COLUMN: Column = ([[0, 0]] * len(SHAPES), [0.0] * len(SHAPES), [0] * len(SHAPES))


def step(device: CudaDevice) -> None:
    """Let the copy stream of a late device, which is held, do one thing."""
    left = build.pending() - 1
    build.allow(1, copy_stream(device))
    eventually(lambda: build.pending() == left)
