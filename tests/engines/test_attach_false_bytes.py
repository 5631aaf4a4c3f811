"""Requests of an attached batch whose adapter turns out to be another one than was promised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from common import until
from engines.variants import PEFT_WARNING, logits_of, prompt, serving
from false_bytes import told_false
from lorax_async import IntegrityError
from lorax_async.testing import FakeSource
from tiny_sources import state

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


async def test_they_fail_and_the_others_go_on(small: Any, adapters: list[Path]) -> None:
    source = FakeSource()
    for name, folder in zip(("a", "b"), adapters, strict=True):
        source.put(name, *tiny.files(folder))
    source.hold_verification("a")
    async with (
        serving(small, source=source) as (loader, attached),
        await loader.load("b") as good,
    ):
        false = await loader.load("a")
        with attached.batch([None, good, false]):
            before = await asyncio.to_thread(logits_of, small, prompt(3))
            told_false(source)
            with pytest.raises(IntegrityError, match="not what was promised"):
                await false.verified()
            with pytest.raises(IntegrityError, match="not what was promised"):
                await asyncio.to_thread(logits_of, small, prompt(3))
        with (
            pytest.raises(IntegrityError, match="not what was promised"),
            attached.batch([None, good, false]),
        ):
            await asyncio.to_thread(logits_of, small, prompt(3))
        with attached.batch([None, good, None]):
            after = await asyncio.to_thread(logits_of, small, prompt(3))
        assert torch.equal(after[:2], before[:2])
        assert not torch.equal(after[2], before[2])
        false.release()
        await until(lambda: state(loader, "a") == "nowhere")
