"""What was measured for one pass is there for the next one, whatever stream that computes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from late_device.world import LATE, bytes_now, loaded, new_stream
from lorax_async.core.layout import Module, Parallel
from lorax_async.engines import features
from lorax_async.engines.features import Adapted, Factors


class Stay:
    """In place of a stay's vectors, by which factors are known."""


@pytest.fixture(autouse=True)
def late() -> Iterator[None]:
    yield from loaded()


def test_factors_are_there_when_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> torch.Tensor:
        return torch.empty(1000, dtype=torch.uint8, device=LATE).fill_(7)

    monkeypatch.setattr(features, "_factor", measured)
    module = Module("layers.0.q", 4, 4, 0, Parallel.COLUMN)
    stay: Any = Stay()
    nothing: Any = None
    factors, adapted = Factors(), Adapted(nn.Linear(4, 4), module, 0)
    with new_stream():
        first = factors.of(stay, nothing, nothing, adapted)
        assert bytes_now(first) == {7}
    assert factors.of(stay, nothing, nothing, adapted) is first
