"""Models and steps of which a row could depend on those beside it are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from engines.variants import serving
from lorax_async import ConfigError, UsageError
from lorax_async.engines.transformers import Attached
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.ports import Part, Step

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


def rope(kind: str) -> PreTrainedConfig:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
        parameters["original_max_position_embeddings"] = 32
    return LlamaConfig(**SIZES, rope_parameters=parameters, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: MistralConfig(**SIZES, sliding_window=8), "DynamicSlidingWindowLayer"),
        (lambda: Qwen3NextConfig(**SIZES, num_experts=0), "LinearAttention"),
        (lambda: BertConfig(**SIZES), "attend to later ones"),
        (lambda: rope("dynamic"), "rope_type is dynamic"),
        (lambda: rope("longrope"), "rope_type is longrope"),
    ],
    ids=["sliding window", "linear attention", "encoder", "dynamic", "longrope"],
)
def test_models_whose_rows_are_not_their_own(
    config: Callable[[], PreTrainedConfig], words: str
) -> None:
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    model = auto.from_config(config()).eval()
    attached: Any = None  # it is not looked at
    with pytest.raises(ConfigError, match=words):
        TransformersDecoder(model, attached, 4)


def test_a_model_in_training_mode(small: Any) -> None:
    attached: Any = None
    with pytest.raises(ConfigError, match="training mode"):
        TransformersDecoder(copy.deepcopy(small).train(), attached, 4)


@pytest.mark.parametrize(
    "numbers", [(0, None), (4, 0), (4, 2049)], ids=["no places", "no length", "no such positions"]
)
def test_numbers_out_of_range(small: Any, numbers: tuple[int, int | None]) -> None:
    attached: Any = None
    with pytest.raises(ConfigError):
        TransformersDecoder(small, attached, *numbers)


def test_a_models_limits_are_told(small: Any) -> None:
    attached: Any = None
    decoder = TransformersDecoder(small, attached, 4)
    assert (decoder.max_length, decoder.vocabulary) == (2048, 64)
    assert TransformersDecoder(small, attached, 4, 100).max_length == 100


async def test_steps_that_do_not_follow_change_nothing(small: Any) -> None:
    def step(*parts: tuple[int, int, list[int]]) -> Step:
        made = [Part(number, start, tokens, None) for number, start, tokens in parts]
        return Step(made, 0.0, lambda: False)

    async def main(attached: Attached) -> None:
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

    async with serving(small) as (_, attached):
        await main(attached)
