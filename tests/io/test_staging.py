"""The staging ring keeps to its port. It is memory and nothing else, so that it needs no fake."""

from __future__ import annotations

import pytest
import torch
from staging_conformance import BUFFER, POISON, NewStaging, StagingConformance

from lorax_async.core.moves import Zero
from lorax_async.io.staging import StagingRing, zero


class TestStagingRing(StagingConformance):
    @pytest.fixture
    def new_staging(self) -> NewStaging:
        def make(nbytes: int = 2 * BUFFER, move_bytes: int = BUFFER) -> StagingRing:
            return StagingRing(nbytes, move_bytes)

        return make


def test_zeros_go_where_they_belong() -> None:
    extent = torch.full((100,), POISON, dtype=torch.uint8)
    zero((Zero(10, 5), Zero(40, 0), Zero(90, 10)), extent)
    expected = [POISON] * 10 + [0] * 5 + [POISON] * 75 + [0] * 10
    assert extent.tolist() == expected
