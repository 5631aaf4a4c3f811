"""What tests of the late device start with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from late_device import build

LATE = "late:0"  # no torch.device, which knows the name only once it is loaded
SIZE = 1000

T = TypeVar("T")


def loaded() -> Iterator[None]:
    """For a fixture: the device is there, and afterwards as it was; not run where it cannot be."""
    try:
        build.load()
    except build.NotBuilt as missing:
        pytest.skip(str(missing))
    yield
    build.reset()


def pinned(value: int) -> torch.Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8, pin_memory=True)


def on_device(value: int | None = None) -> torch.Tensor:
    made = torch.empty(SIZE, dtype=torch.uint8, device=LATE)
    if value is not None:
        made.fill_(value)
        torch.accelerator.synchronize(LATE)
    return made


def bytes_now(tensor: torch.Tensor) -> set[int]:
    """What memory holds at this moment, whatever streams have yet to do."""
    return set(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def new_stream() -> torch.Stream:
    return torch.Stream(device=LATE)


def in_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(30)
