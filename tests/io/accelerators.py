"""`CudaDevice` on what there is: the late device always, CUDA in a process that has it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from device_groups import SHAPES, START, Group, made_by

from late_device import build
from late_device.world import loaded
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.io.devices.cuda import CudaDevice

Made = Callable[..., CudaDevice]

KINDS = ["late", pytest.param("cuda", marks=pytest.mark.gpu)]
"""One in a process: where the late device is loaded, it is the accelerator that torch sees."""

_SLEEP_CYCLES = 800_000_000  # some tenths of a second


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


def copy_stream(device: CudaDevice) -> torch.Stream:
    return device._memory.stream


def compute_stream(device: CudaDevice) -> torch.Stream:
    return torch.Stream(device=device.name)


@contextmanager
def held(stream: torch.Stream) -> Iterator[None]:
    """The stream starts nothing more until the block ends; on CUDA it sleeps for a while."""
    if stream.device.type == "late":
        with build.held(stream):
            yield
        return
    with stream:
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    yield


def a_of_module_0(device: CudaDevice, made: Group, offset: int) -> torch.Tensor:
    """Where A of module 0 is, or will be, whatever the device says of it."""
    want = made.weights[0][0]
    start = offset + made.rows[0].a
    assert made.rows[0].module == 0
    assert made.rows[0].a >= START
    found = device._memory.arena[start : start + want.nbytes]
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
    columns = device._memory.columns
    entries = _now(columns._entries[slot], torch.int64).view(-1, 3)
    scales = entries.view(torch.float32)[:, 4]
    return (
        entries[:, :2].tolist(),
        scales.tolist(),
        _now(columns._ranks[slot], torch.int32).tolist(),
    )


def _now(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    content = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def column_of(device: CudaDevice, made: Group, offset: int) -> Column:
    """What the column of a slot is to be that has this group alone."""
    base = device._memory.arena.data_ptr() + offset
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
