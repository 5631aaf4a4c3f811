"""Features on tiny models of other makes: what is applied, how long it is kept, what is refused."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engines.variants import (
    FEATURE_WARNINGS,
    PEFT_WARNING,
    llama,
    logits_of,
    logits_with,
    pefts,
    prompt,
    save,
    serving,
)
from lorax_async import UsageError
from lorax_async.engines import features
from lorax_async.testing import FakeSource

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
WEIGHTS = "adapter_model.safetensors"
DORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
TOKENS = {"r": 4, "target_modules": ["embed_tokens"]}


# -- other makes -------------------------------------------------------------------------------


def gpt2() -> Any:
    """Its weights are `[in, out]`, its linear modules have biases."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model: Any = transformers.GPT2LMHeadModel(config)
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
    return model


def gemma() -> Any:
    """Its embedding multiplies what it looks up by √32."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(2)
    model: Any = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads))
    return model.eval()


CONV = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (gpt2, {**CONV, "use_dora": True}),
        (gpt2, {**CONV, "lora_bias": True}),
        (gpt2, {"r": 4, "target_modules": ["wte"]}),
        (gpt2, {"r": 4, "target_modules": ["wte"], "use_dora": True}),
        (gemma, TOKENS),
        (gemma, {**TOKENS, "use_dora": True}),
        (llama, {**DORA, "target_modules": "all-linear", "use_rslora": True}),
    ],
)
def test_logits_are_pefts(make: Callable[[], Any], lora: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    adapter = save(model, lora, tmp_path / "adapter")
    inputs = prompt(2) | {"attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])}
    expected = pefts(model, adapter, inputs)
    assert (expected - logits_of(model, inputs)).abs().max() > 1e-3
    assert torch.equal(asyncio.run(logits_with(model, adapter, inputs)), expected)


def test_positions_of_one_row_are_pefts_and_of_more_are_refused(tmp_path: Path) -> None:
    """GPT-2 looks the positions up once for all rows: nobody can say whose they are."""
    model = gpt2()
    adapter = save(model, {"r": 4, "target_modules": ["wpe"]}, tmp_path / "adapter")
    other = save(model, {"r": 4, "target_modules": ["wte"]}, tmp_path / "other")
    expected = pefts(model, adapter, prompt(1))
    assert torch.equal(asyncio.run(logits_with(model, adapter, prompt(1))), expected)
    with pytest.raises(UsageError, match=r"'transformer.wpe' got .*\[1, 5\].* batch of 2 cannot"):
        asyncio.run(logits_with(model, adapter, prompt(2)))
    assert asyncio.run(logits_with(model, other, prompt(2))).shape == (2, 5, 64)


def test_other_numbers_of_rows_are_refused_for_an_embedding(small: Any, tmp_path: Path) -> None:
    adapter = save(llama(), TOKENS, tmp_path / "adapter")

    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapter) as handle:
            with (
                attached.batch([handle]),
                pytest.raises(UsageError, match=r"\[rows, tokens\] only"),
            ):
                logits_of(small, prompt(2))

    asyncio.run(main())


@pytest.mark.parametrize("lora", [DORA, {**DORA, "use_dora": False, "lora_bias": True}, TOKENS])
def test_bf16_is_as_near_to_float32_as_pefts(lora: dict[str, Any], tmp_path: Path) -> None:
    """PEFT keeps A and B in float32 there, which are rounded here; magnitudes are not."""
    adapter = save(llama(), lora, tmp_path / "adapter")
    exact = pefts(llama(), adapter, prompt(2))
    theirs = pefts(llama().bfloat16(), adapter, prompt(2))
    ours = asyncio.run(logits_with(llama().bfloat16(), adapter, prompt(2)))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 1.5 * (theirs.float() - exact).norm()


# -- a stay in a slot --------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modules whose rows were measured, in order."""
    seen: list[int] = []
    measure = features._factor

    def noted(*args: Any) -> torch.Tensor:
        seen.append(args[2].index)
        return measure(*args)

    monkeypatch.setattr(features, "_factor", noted)
    return seen


async def test_rows_are_measured_once_in_a_stay(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters take turns in one slot: neither gets what was measured for the other."""
    first = save(llama(), DORA, tmp_path / "first")
    second = save(llama(), {**DORA, "r": 6}, tmp_path / "second")
    expected = [pefts(llama(), adapter, prompt(2)) for adapter in (first, second)]
    seen = counted(monkeypatch)
    async with serving(small, max_slots=1) as (loader, attached):
        kept = attached._place.factors._known
        for turn in range(4):
            async with await loader.load((first, second)[turn % 2]) as handle:
                for _ in range(3):
                    with attached.batch([handle, handle]):
                        logits = await asyncio.to_thread(logits_of, small, prompt(2))
                    assert torch.equal(logits, expected[turn % 2])
            assert len(seen) == 4 * (turn + 1)  # q and down of two layers
            gc.collect()
            assert len(kept) == 1
        await loader.unload(second)
        gc.collect()
        assert len(kept) == 0
        assert handle.released  # and still there
        async with await loader.load(first) as handle:
            with attached.batch([handle]):
                logits_of(small, prompt(1))
            assert len(kept) == 1
            attached.detach()
            assert len(kept) == 0


def test_a_handle_released_inside_the_block_keeps_its_vectors(small: Any, tmp_path: Path) -> None:
    adapter = save(llama(), DORA, tmp_path / "adapter")
    expected = pefts(llama(), adapter, prompt(1))

    async def main() -> None:
        async with serving(small, max_slots=1) as (loader, attached):
            handle = await loader.load(adapter)
            with attached.batch([handle]):
                handle.release()
                assert torch.equal(logits_of(small, prompt(1)), expected)

    asyncio.run(main())


@pytest.mark.parametrize("lora", [DORA, {**TOKENS, "use_dora": True}], ids=["linear", "embedding"])
async def test_layers_are_waited_for(small: Any, tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter = save(llama(), lora, tmp_path / "adapter")
    expected = pefts(llama(), adapter, prompt(1))
    source = FakeSource()
    files = [(adapter / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)]
    source.put("streamed", files[0], files[1])
    source.hold("streamed")
    async with (
        serving(small, source=source) as (loader, attached),
        loader.stream("streamed") as handle,
    ):
        with attached.batch([handle]):
            if lora is not DORA:
                with pytest.raises(UsageError, match="to_thread"):
                    logits_of(small, prompt(1))
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            await asyncio.sleep(0.1)
            assert not forward.done()
            source.allow("streamed")
            assert torch.equal(await forward, expected)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_answer(
    grad: Callable[[], Any], small: Any, tmp_path: Path
) -> None:
    """What was measured in one mode serves in the others."""
    adapter = save(llama(), {**DORA, "target_modules": ["embed_tokens", "q_proj"]}, tmp_path / "x")

    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapter) as handle:
            with attached.batch([handle, None]):
                with grad():
                    first = small(**prompt(2)).logits.detach().clone()
                assert torch.equal(logits_of(small, prompt(2)), first)
                with torch.enable_grad():
                    loss = small(**prompt(2)).logits.sum()
            with pytest.raises(UsageError, match="gradient"):
                loss.backward()

    asyncio.run(main())
    small.zero_grad(set_to_none=True)
