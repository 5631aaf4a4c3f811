"""Rows that are computed beside others are what each would be alone, as PEFT and transformers say."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from engines.gate_inputs import source
from engines.variants import PEFT_WARNING, active, logits_of, serving, streaming
from lorax_async import AdapterHandle, AdapterTimeoutError, ConfigError, FetchError, UsageError
from lorax_async.engines.transformers import Attached
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.ports import Computed, Part, Step
from lorax_async.testing import FakeSource

__all__ = ["source"]

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

Solo = Callable[[str | None, Sequence[int]], torch.Tensor]
"""Logits after these tokens, computed alone with the adapter of that name."""


@dataclass(eq=False)
class Row:
    """What a decoder was given of a sequence so far, and what it will be given."""

    number: int
    name: str | None
    handle: AdapterHandle | None
    tokens: list[int]
    computed: int = 0

    @property
    def wants(self) -> int:
        return len(self.tokens) - self.computed

    def part(self, count: int) -> Part:
        tokens = self.tokens[self.computed : self.computed + count]
        return Part(self.number, self.computed, tokens, self.handle)


def row(number: int, length: int, name: str | None = None, handle: Any = None) -> Row:
    return Row(number, name, handle, list(range(number + 1, number + 1 + length)))


@dataclass(eq=False)
class Play:
    """Computes steps, and compares each row with its solo run."""

    decoder: TransformersDecoder
    solo: Solo
    atol: float = 2e-5

    async def step(self, *rows: tuple[Row, int], budget: float = 0.0) -> Computed:
        """Compute so many tokens of each; whoever has all its tokens gets the likeliest next one."""
        step = Step([one.part(count) for one, count in rows], budget, lambda: False)
        computed = await asyncio.to_thread(self.decoder.compute, step)
        for number, (one, count) in enumerate(rows):
            if number in computed.out:
                one.computed = 0
                continue
            one.computed += count
            expected = self.solo(one.name, one.tokens[: one.computed])
            torch.testing.assert_close(computed.logits[number], expected, atol=self.atol, rtol=1e-4)
            assert computed.logits[number].argmax() == expected.argmax()
            if not one.wants:
                one.tokens.append(int(expected.argmax()))
        return computed

    async def whole(self, *rows: Row, budget: float = 0.0) -> Computed:
        """Compute all that each wants."""
        return await self.step(*((one, one.wants) for one in rows), budget=budget)


@contextmanager
def alone(model: Any, **adapters: Path) -> Iterator[Solo]:
    """PEFT's, with the adapter; None is the base."""
    with active(model, **adapters) as peft_model:

        def solo(name: str | None, tokens: Sequence[int]) -> torch.Tensor:
            inputs = {"input_ids": torch.tensor([list(tokens)])}
            if name is None:
                with peft_model.disable_adapter():
                    return logits_of(peft_model, inputs)[0, -1]
            peft_model.set_adapter(name)
            return logits_of(peft_model, inputs)[0, -1]

        yield solo


def base_alone(model: Any) -> Solo:
    return lambda _, tokens: logits_of(model, {"input_ids": torch.tensor([list(tokens)])})[0, -1]


def tokens_of(shuffled: random.Random, length: int) -> list[int]:
    return [shuffled.randrange(64) for _ in range(length)]


@pytest.mark.parametrize(
    ("attention", "seed"),
    [
        ("sdpa", 0),
        *(pytest.param("sdpa", seed, marks=pytest.mark.slow) for seed in (1, 2)),
        *(pytest.param("eager", seed, marks=pytest.mark.slow) for seed in range(3)),
    ],
)
async def test_each_row_is_its_solo_run(
    small: Any, adapters: list[Path], attention: str, seed: int
) -> None:
    """Prompts whole or in parts, beside whoever decodes; rows come, go, move, and begin again."""
    small = copy.deepcopy(small)
    small.set_attn_implementation(attention)
    shuffled, there = random.Random(seed), list[Row]()
    with alone(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as solo:
        async with (
            serving(small) as (loader, attached),
            await loader.load(adapters[0]) as most,
            await loader.load(adapters[1]) as some,
        ):
            handles = {"most": most, "some": some, None: None}
            play = Play(TransformersDecoder(small, attached, 4), solo)
            for number in range(60):
                if len(there) < 4 and shuffled.random() < 0.5:
                    name = shuffled.choice(["most", "some", None])
                    length = shuffled.choice([1, 3, 3, 7, 70])
                    there.append(Row(number, name, handles[name], tokens_of(shuffled, length)))
                rows = shuffled.sample(there, shuffled.randint(0, len(there)))
                if rows:
                    await play.step(*((one, shuffled.choice([one.wants, 1])) for one in rows))
                for one in tuple(there):
                    if shuffled.random() < 0.1:
                        there.remove(one)
                        play.decoder.forget(one.number)
                    elif shuffled.random() < 0.05:
                        one.computed = 0


async def test_rows_that_decode_together_are_what_generate_says(small: Any) -> None:
    """Long enough that their places grow; of a whole batch, last tokens alone have heads."""
    prompts, new = [tokens_of(random.Random(n), n) for n in (3, 9, 60)], 12
    expected = [
        small.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
        )[0].tolist()
        for prompt in prompts
    ]
    base, shapes = copy.deepcopy(small), set[torch.Size]()
    hook = small.lm_head.register_forward_hook(lambda _, __, y: shapes.add(y.shape))
    try:
        async with serving(small) as (_, attached):
            play = Play(TransformersDecoder(small, attached, 3), base_alone(base))
            rows = [Row(n, None, None, list(prompt)) for n, prompt in enumerate(prompts)]
            for _ in range(new):
                await play.whole(*rows)
            assert [row.tokens for row in rows] == expected
    finally:
        hook.remove()
    assert {shape[1] for shape in shapes} == {1}


@pytest.mark.slow
async def test_the_trained_adapters_answer_in_one_batch_as_alone(
    model: Any, theirs: Any, examples: Path
) -> None:
    names = ("pirate", "shout", "json")
    with alone(theirs, **{name: examples / name for name in names}) as solo:
        async with serving(model) as (loader, attached):
            handles = {name: await loader.load(examples / name) for name in names}
            rows = [
                Row(n, name, handles.get(name or ""), list(range(1000, 1005 + n % 2)))
                for n, name in enumerate([*names, None, "pirate"])
            ]
            play = Play(TransformersDecoder(model, attached, 5), solo, atol=1e-3)
            for _ in range(4):
                await play.whole(*rows)
            for handle in handles.values():
                handle.release()


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def made(config: PreTrainedConfig) -> Any:
    torch.manual_seed(5)
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    return auto.from_config(config).eval()


@pytest.mark.parametrize("name", ["GPT2", "Qwen2", "Qwen3", "Gemma"])
async def test_models_of_several_families_are_decoded(name: str) -> None:
    old = {"intermediate_size", "num_key_value_heads", "head_dim", "pad_token_id"}
    sizes = {key: size for key, size in SIZES.items() if name != "GPT2" or key not in old}
    config: Any = getattr(transformers, f"{name}Config")
    model = made(config(**sizes, bos_token_id=1, eos_token_id=2))
    base = copy.deepcopy(model)
    async with serving(model) as (_, attached):
        play = Play(TransformersDecoder(model, attached, 3), base_alone(base))
        rows = [row(n, n + 2) for n in range(3)]
        await play.step((rows[0], 2), (rows[2], 3))
        await play.step((rows[0], 1), (rows[1], 3), (rows[2], 1))
        for _ in range(3):
            await play.whole(*rows)


async def test_what_was_at_a_place_never_matters(small: Any) -> None:
    """Not even keys and values that are no numbers: beside a longer row they are masked."""
    broken = copy.deepcopy(small)
    async with serving(broken) as (_, attached):
        decoder = TransformersDecoder(broken, attached, 2)
        play, long, short = Play(decoder, base_alone(small)), row(0, 40), row(2, 3)
        await play.whole(long)
        weight = broken.model.layers[0].self_attn.v_proj.weight
        sound = weight.clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        computed = decoder.compute(Step([row(1, 30).part(30)], 0.0, lambda: False))
        assert computed.logits.isnan().all()
        with torch.no_grad():
            weight.copy_(sound)
        decoder.forget(1)
        await play.whole(short)
        for _ in range(3):
            await play.step((short, 1), (long, 1))
        assert decoder.sequences == 2


# -- steps that wait for adapters: within a budget that is the whole step's -----------------------


async def test_rows_that_are_late_begin_again_and_the_others_go_on(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    """No prompt is waited for by those that decode, though it is alone in its pass."""
    with alone(copy.deepcopy(small), warm=adapters[1], cold=adapters[0]) as solo:
        async with streaming(small, source) as (attached, warm, cold):
            decoder = TransformersDecoder(small, attached, 4)
            play = Play(decoder, solo)
            source.allow("cold", 0)
            await cold.layer_ready(0)
            fast, base = row(0, 5, "warm", warm), row(1, 5)
            late, longer = row(2, 5, "cold", cold), row(3, 7, "cold", cold)
            computed = await play.whole(late, fast, base, budget=0.01)
            assert {n: type(each) for n, each in computed.out.items()} == {0: AdapterTimeoutError}
            assert decoder.sequences == 2
            computed = await play.step((longer, 7), (fast, 1), budget=0.01)
            assert set(computed.out) == {0}
            assert "the pass had waited 0.01 s" in str(computed.out[0])
            source.allow("cold")
            await cold.layer_ready(cold.layers[-1])
            for _ in range(3):
                assert not (await play.whole(late, base, fast, budget=0.01)).out


async def test_what_one_pass_has_waited_is_missing_for_the_next(
    small: Any, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets, original = list[float](), Attached.batch

    def batch(self: Attached, rows: Any, budget: float, *more: Any, **named: Any) -> Any:
        budgets.append(budget)
        return original(self, rows, budget, *more, **named)

    monkeypatch.setattr(Attached, "batch", batch)
    async with streaming(small, source) as (attached, warm, cold):
        decoder = TransformersDecoder(small, attached, 3)
        rows = (row(1, 4, "cold", cold), row(0, 3, "warm", warm), row(2, 5, "cold", cold))
        step = Step([each.part(each.wants) for each in rows], 0.02, lambda: False)
        computed = await asyncio.to_thread(decoder.compute, step)
        assert set(computed.out) == {0, 2}
    assert budgets == [0.02, 0.02, 0.0]  # who is there first; then one waits, and one no more


async def test_an_adapter_that_fails_takes_out_its_own_rows(
    small: Any, adapters: list[Path], source: FakeSource
) -> None:
    with alone(copy.deepcopy(small), warm=adapters[1], cold=adapters[0]) as solo:
        async with streaming(small, source) as (attached, warm, cold):
            play = Play(TransformersDecoder(small, attached, 3), solo)
            source.fail("bring", FetchError("lost on the way"), id="cold")
            source.allow("cold")
            with pytest.raises(FetchError):
                await cold.layer_ready(cold.layers[-1])
            fast, lost = row(0, 5, "warm", warm), row(1, 5, "cold", cold)
            computed = await play.whole(fast, lost, budget=5.0)
            assert {n: type(error) for n, error in computed.out.items()} == {1: FetchError}
            await play.whole(fast)


# -- what is refused: of which a row could depend on those beside it ------------------------------


def rope(kind: str) -> PreTrainedConfig:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
        parameters["original_max_position_embeddings"] = 32
    return LlamaConfig(**SIZES, rope_parameters=parameters, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(**SIZES, sliding_window=8), "DynamicSlidingWindowLayer"),
        (Qwen3NextConfig(**SIZES, num_experts=0), "LinearAttention"),
        (BertConfig(**SIZES), "attend to later ones"),
        (rope("dynamic"), "rope_type is dynamic"),
        (rope("longrope"), "rope_type is longrope"),
    ],
    ids=["sliding window", "linear attention", "encoder", "dynamic", "longrope"],
)
def test_models_whose_rows_are_not_their_own_are_refused(
    config: PreTrainedConfig, words: str
) -> None:
    attached: Any = None  # it is not looked at
    with pytest.raises(ConfigError, match=words):
        TransformersDecoder(made(config), attached, 4)


@pytest.mark.parametrize("numbers", [(0, None), (4, 0), (4, 2049)])
def test_numbers_are_limited_by_the_model(small: Any, numbers: tuple[int, int | None]) -> None:
    attached: Any = None
    with pytest.raises(ConfigError):
        TransformersDecoder(small, attached, *numbers)
    with pytest.raises(ConfigError, match="training mode"):
        TransformersDecoder(copy.deepcopy(small).train(), attached, 4)
    decoder = TransformersDecoder(small, attached, 4)
    assert (decoder.max_length, decoder.vocabulary) == (2048, 64)
    assert TransformersDecoder(small, attached, 4, 100).max_length == 100


async def test_steps_that_do_not_follow_change_nothing(small: Any) -> None:
    def step(*parts: tuple[int, int, list[int]]) -> Step:
        made = [Part(number, start, tokens, None) for number, start, tokens in parts]
        return Step(made, 0.0, lambda: False)

    async with serving(small) as (_, attached):
        decoder = TransformersDecoder(small, attached, 2)
        decoder.compute(step((0, 0, [1, 2, 3]), (1, 0, [4, 5, 6])))
        with pytest.raises(UsageError, match="goes on at 4, and has 3"):
            decoder.compute(step((0, 4, [1])))
        with pytest.raises(UsageError, match="max_begun"):
            decoder.compute(step((2, 0, [1])))
        assert decoder.sequences == 2
        found = decoder.compute(step((0, 3, [7])))
        with torch.no_grad(), attached.batch(None):
            expected = small(input_ids=torch.tensor([[1, 2, 3, 7]])).logits[:, -1]
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)
        decoder.forget(1)
        decoder.forget(1)
        decoder.compute(step((2, 0, [1])))
