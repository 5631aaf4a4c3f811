"""What tests of the late device start with."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from late_device import build

LATE = "late:0"  # no torch.device, which knows the name only once it is loaded


def loaded() -> Iterator[None]:
    """For a fixture: the device is there, and afterwards as it was; not run where it cannot be."""
    try:
        build.load()
    except build.NotBuilt as missing:
        pytest.skip(str(missing))
    yield
    build.reset()


def bytes_now(tensor: torch.Tensor) -> set[int]:
    """What memory holds at this moment, whatever streams have yet to do."""
    return set(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def new_stream() -> torch.Stream:
    return torch.Stream(device=LATE)
