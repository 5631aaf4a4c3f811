"""Plans are made once for batches of the same rows, and not kept for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.variants import PEFT_WARNING, logits_of, prompt, serving
from lorax_async.engines.last_plans import LastPlans
from lorax_kernels import Plan

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


def test_the_one_that_was_used_longest_ago_goes_first() -> None:
    plans, made = LastPlans[str](2), list[str]()

    def get(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return plans.get(key, make)

    assert [get(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"]
    plans.forget()
    get("a")
    assert made == ["a", "b", "c", "b", "a"]


def test_the_next_batch_of_the_same_rows_has_the_same_plan(
    small: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    original = Plan.from_segments.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Plan], /, bounds: Any, slots: Any, **more: Any) -> Plan:
        made.append(tuple(slots))
        plan: Plan = original(cls, bounds, slots, **more)
        return plan

    async def main() -> None:
        async with serving(small, max_slots=1) as (loader, attached):
            for adapter in (adapters[0], adapters[0], adapters[1], adapters[0]):
                async with await loader.load(adapter) as handle:
                    for _ in range(2):
                        with attached.batch([handle, None]):
                            seen = logits_of(small, prompt(2))
                        with attached.batch([handle, None], budget=1.0):
                            assert torch.equal(seen, logits_of(small, prompt(2)))

    monkeypatch.setattr(Plan, "from_segments", classmethod(noted))
    asyncio.run(main())
    # The slot has three tenants, one after the other.
    assert made == [(0, -1)] * 3
