"""Fixtures for tests of the late device."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from late_device import build

LATE = "late:0"  # no torch.device, which knows the name only once it is loaded


def loaded() -> Iterator[None]:
    """Load the device for a fixture and reset it afterwards; skip where it cannot be built."""
    try:
        build.load()
    except build.NotBuilt as missing:
        pytest.skip(str(missing))
    yield
    build.reset()


def bytes_now(tensor: torch.Tensor) -> set[int]:
    """Return memory's present bytes, without waiting for streams."""
    return set(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def new_stream() -> torch.Stream:
    return torch.Stream(device=LATE)
