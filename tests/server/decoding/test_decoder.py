"""Rows that are computed beside others are what each would be alone, as PEFT and transformers say."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.variants import PEFT_WARNING, active, logits_of, prompt, serving
from lorax_async.engines.transformers import Attached
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from server.solo_runs import Play, Sequence_, alone, base_alone

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING), pytest.mark.slow]

PLACES = 4


def tokens_of(shuffled: random.Random, length: int) -> list[int]:
    return [shuffled.randrange(64) for _ in range(length)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(3))
async def test_each_row_is_its_solo_run(
    small: Any, adapters: list[Path], attention: str, seed: int
) -> None:
    """Prompts whole or in parts, beside whoever decodes; rows come, go, and begin again."""
    small = copy.deepcopy(small)
    small.set_attn_implementation(attention)
    shuffled = random.Random(seed)

    async def main(play: Play, handles: dict[str | None, Any]) -> None:
        there = list[Sequence_]()
        for number in range(60):
            if len(there) < PLACES and shuffled.random() < 0.5:
                name = shuffled.choice(["most", "some", None])
                length = shuffled.choice([1, 3, 3, 7, 70])
                there.append(Sequence_(number, name, handles[name], tokens_of(shuffled, length)))
            rows = shuffled.sample(there, shuffled.randint(0, len(there)))
            if rows:
                await play.step([(one, shuffled.choice([one.wants, 1])) for one in rows])
            for one in tuple(there):
                if shuffled.random() < 0.1:
                    there.remove(one)
                    play.decoder.forget(one.number)
                elif shuffled.random() < 0.05:
                    one.computed = 0

    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        async with (
            serving(small) as (loader, attached),
            await loader.load(adapters[0]) as most,
            await loader.load(adapters[1]) as some,
        ):
            with alone(peft_model) as solo:
                play = Play(TransformersDecoder(small, attached, PLACES), solo)
                await main(play, {"most": most, "some": some, None: None})


async def test_rows_that_decode_together_are_what_generate_says(small: Any) -> None:
    """Of other lengths, long enough that their places grow; whoever is longer stays longer."""
    lengths, new = (3, 9, 60), 12
    prompts = [tokens_of(random.Random(n), n) for n in lengths]

    def generated(row: Sequence[int]) -> list[int]:
        ids = torch.tensor([row])
        ones = torch.ones_like(ids)
        found: list[int] = small.generate(
            input_ids=ids, attention_mask=ones, max_new_tokens=new, do_sample=False
        )[0].tolist()
        return found

    expected = [generated(row) for row in prompts]
    base = copy.deepcopy(small)
    async with serving(small) as (_, attached):
        play = Play(TransformersDecoder(small, attached, 3), base_alone(base))
        rows = [Sequence_(n, None, None, list(row)) for n, row in enumerate(prompts)]
        for _ in range(new):
            await play.step([(row, row.wants) for row in rows])
        assert [row.tokens for row in rows] == expected


async def test_the_trained_adapters_answer_in_one_batch_as_alone(
    model: Any, theirs: Any, examples: Path
) -> None:
    names = ("pirate", "shout", "json")
    with active(theirs, **{name: examples / name for name in names}) as peft_model:
        async with serving(model) as (loader, attached):
            handles = {name: await loader.load(examples / name) for name in names}
            rows = [
                Sequence_(n, name, handles.get(name or ""), list(range(1000, 1005 + n % 2)))
                for n, name in enumerate([*names, None, "pirate"])
            ]
            with alone(peft_model) as solo:
                play = Play(TransformersDecoder(model, attached, 5), solo, atol=1e-3)
                for _ in range(4):
                    await play.step([(row, row.wants) for row in rows])
            for handle in handles.values():
                handle.release()


def family(name: str) -> Any:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    older = {"bos_token_id": 1, "eos_token_id": 2}
    config: Any = getattr(transformers, f"{name}Config")
    given = sizes | older if name == "GPT2" else sizes | more | older
    torch.manual_seed(5)
    auto: Any = transformers.AutoModelForCausalLM  # untyped
    return auto.from_config(config(**given)).eval()


@pytest.mark.parametrize("name", ["GPT2", "Qwen2", "Qwen3", "Gemma"])
async def test_models_of_several_families(name: str) -> None:
    model = family(name)
    base = copy.deepcopy(model)
    async with serving(model) as (_, attached):
        play = Play(TransformersDecoder(model, attached, 3), base_alone(base))
        rows = [Sequence_(n, None, None, list(range(2, 4 + n))) for n in range(3)]
        await play.step([(rows[0], 2), (rows[2], 3)])
        await play.step([(rows[0], 1), (rows[1], 3), (rows[2], 1)])
        for _ in range(3):
            await play.step([(row, row.wants) for row in rows])


async def test_what_was_at_a_place_never_matters(small: Any) -> None:
    """Not even keys and values that are no numbers: beside a longer row they are masked."""
    broken = copy.deepcopy(small)

    def step_of(one: Sequence_) -> Any:
        from lorax_async.server.ports import Part, Step

        return Step([Part(one.number, 0, one.tokens, None)], 0.0, lambda: False)

    async with serving(broken) as (_, attached):
        decoder = TransformersDecoder(broken, attached, 2)
        play = Play(decoder, base_alone(small))
        long = Sequence_(0, None, None, list(range(1, 41)))
        await play.step([(long, 40)])
        weight = broken.model.layers[0].self_attn.v_proj.weight
        sound = weight.clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        bad = Sequence_(1, None, None, list(range(1, 31)))
        computed = decoder.compute(step_of(bad))
        assert computed.logits.isnan().all()
        with torch.no_grad():
            weight.copy_(sound)
        decoder.forget(1)
        short = Sequence_(2, None, None, [5, 6, 7])
        await play.step([(short, 3)])
        for _ in range(3):
            await play.step([(short, 1), (long, 1)])
        assert decoder.sequences == 2


async def test_a_row_beside_others_has_the_same_logits_when_it_is_moved(small: Any) -> None:
    """Rows in another order than their places are copied once, and then are neighbours."""
    base = copy.deepcopy(small)
    async with serving(small) as (_, attached):
        play = Play(TransformersDecoder(small, attached, 4), base_alone(base))
        rows = [Sequence_(n, None, None, [n + 1] * (n + 2)) for n in range(4)]
        for row in rows:
            await play.step([(row, row.wants)])
        for order in ([2, 0, 3], [2, 0, 3], [2, 0, 3], [1, 2], [1, 2], [1, 2], [3, 2, 1, 0]):
            await play.step([(rows[n], 1) for n in order])


async def test_heads_of_a_whole_batch_are_computed_for_last_tokens_only(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = list[torch.Size]()
    hook = small.lm_head.register_forward_hook(lambda _, __, y: shapes.append(y.shape))

    async def main(attached: Attached) -> None:
        play = Play(TransformersDecoder(small, attached, 2), base_alone(base))
        rows = [Sequence_(n, None, None, prompt(1, 9)["input_ids"][0].tolist()) for n in (0, 1)]
        await play.step([(row, 9) for row in rows])

    base = copy.deepcopy(small)
    base.lm_head._forward_hooks.clear()
    try:
        async with serving(small) as (_, attached):
            await main(attached)
    finally:
        hook.remove()
    assert shapes == [torch.Size([2, 1, 64])]
    assert logits_of(small, prompt(1)).shape == (1, 5, 64)
