"""Steps that wait for adapters: within a budget that is the whole step's, and out if they are late."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from engines.gate_inputs import source
from engines.variants import PEFT_WARNING, active, streaming
from lorax_async import AdapterTimeoutError, FetchError
from lorax_async.engines.transformers import Attached
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.ports import Part, Step
from lorax_async.testing import FakeSource
from server.solo_runs import Play, Sequence_, alone

__all__ = ["source"]

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


def prompt_of(number: int, name: str | None, handle: Any, length: int) -> Sequence_:
    return Sequence_(number, name, handle, list(range(number + 1, number + 1 + length)))


async def test_rows_that_are_late_begin_again_and_the_others_go_on(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    with active(copy.deepcopy(small), warm=adapters[1], cold=adapters[0]) as peft_model:
        async with streaming(small, source) as (attached, warm, cold):
            with alone(peft_model) as solo:
                decoder = TransformersDecoder(small, attached, 3)
                play = Play(decoder, solo)
                source.allow("cold", 0)
                await cold.layer_ready(0)
                fast, base = prompt_of(0, "warm", warm, 5), prompt_of(1, None, None, 5)
                late = prompt_of(2, "cold", cold, 5)
                computed = await play.step([(late, 5), (fast, 5), (base, 5)], budget=0.01)
                assert set(computed.out) == {0}
                assert isinstance(computed.out[0], AdapterTimeoutError)
                assert decoder.sequences == 2
                source.allow("cold")
                await cold.layer_ready(cold.layers[-1])
                for _ in range(3):
                    rows = [(late, late.wants), (base, 1), (fast, 1)]
                    assert not (await play.step(rows, budget=0.01)).out


async def test_a_prompt_alone_in_its_pass_is_not_alone_in_its_step(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    """Others decode: nobody waits for its adapter for as long as the loader would."""
    with active(copy.deepcopy(small), warm=adapters[1], cold=adapters[0]) as peft_model:
        async with streaming(small, source) as (attached, warm, cold):
            with alone(peft_model) as solo:
                play = Play(TransformersDecoder(small, attached, 2), solo)
                fast, late = prompt_of(0, "warm", warm, 5), prompt_of(1, "cold", cold, 7)
                await play.step([(fast, 5)])
                computed = await play.step([(late, 7), (fast, 1)], budget=0.01)
                assert set(computed.out) == {0}
                assert "the pass had waited 0.01 s" in str(computed.out[0])


async def test_what_one_pass_has_waited_is_missing_for_the_next(
    small: Any, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = list[float]()
    original = Attached.batch

    def batch(self: Attached, rows: Any, budget: float, *more: Any, **named: Any) -> Any:
        budgets.append(budget)
        return original(self, rows, budget, *more, **named)

    monkeypatch.setattr(Attached, "batch", batch)
    async with streaming(small, source) as (attached, warm, cold):
        decoder = TransformersDecoder(small, attached, 3)
        fast, late = prompt_of(0, "warm", warm, 3), prompt_of(1, "cold", cold, 4)
        later = prompt_of(2, "cold", cold, 5)
        parts = [Part(each.number, 0, each.tokens, each.handle) for each in (late, fast, later)]
        step = Step(parts, 0.02, lambda: False)
        computed = await asyncio.to_thread(decoder.compute, step)
        assert set(computed.out) == {0, 2}
    assert budgets == [0.02, 0.02, 0.0]  # who is there first; then one waits, and one no more


async def test_an_adapter_that_fails_takes_out_its_own_rows(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    with active(copy.deepcopy(small), warm=adapters[1], cold=adapters[0]) as peft_model:
        async with streaming(small, source) as (attached, warm, cold):
            with alone(peft_model) as solo:
                play = Play(TransformersDecoder(small, attached, 3), solo)
                source.fail("bring", FetchError("lost on the way"), id="cold")
                source.allow("cold")
                with pytest.raises(FetchError):
                    await cold.layer_ready(cold.layers[-1])
                rows = [prompt_of(0, "warm", warm, 5), prompt_of(1, "cold", cold, 5)]
                computed = await play.step([(row, 5) for row in rows], budget=5.0)
                assert {number: type(error) for number, error in computed.out.items()} == {
                    1: FetchError
                }
                await play.step([(rows[0], 1)])
