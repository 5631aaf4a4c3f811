"""Adapters of which one comes when it is told to, for tests of the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from engines.variants import llama, save
from lorax_async.testing import FakeSource


@pytest.fixture(scope="module")
def adapters(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two on the same linears, of scales that no dtype rounds: kernels may take them together."""
    lora = {"r": 2, "target_modules": ["q_proj", "k_proj", "o_proj"]}
    return [adapters[0], save(llama(), lora, tmp_path_factory.mktemp("gate") / "some")]


@pytest.fixture
def source(adapters: list[Path]) -> FakeSource:
    """ "warm" comes at once, "cold" as far as it is allowed to."""
    source = FakeSource()
    for id, folder in (("warm", adapters[1]), ("cold", adapters[0])):
        source.put(id, *tiny.files(folder))
    source.hold("cold")
    return source
