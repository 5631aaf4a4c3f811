"""Adapters of which one comes when it is told to, for tests of the gate."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engines.variants import llama, logits_of, prompt, save, serving
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


async def expected(small: Any, adapters: list[Path], **settings: Any) -> torch.Tensor:
    """Of the rows [warm, cold, None] with everything there."""
    async with (
        serving(small, **settings) as (loader, attached),
        await loader.load(adapters[1]) as warm,
        await loader.load(adapters[0]) as cold,
    ):
        with attached.batch([warm, cold, None]):
            return logits_of(small, prompt(3))


def forward(small: Any) -> Coroutine[Any, Any, torch.Tensor]:
    return asyncio.to_thread(logits_of, small, prompt(3))
