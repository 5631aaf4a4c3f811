"""What attaching does to a model, and what it refuses. The oracle of answers is the model itself."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.variants import PEFT_WARNING, llama, logits_of, prompt, save, serving
from lorax_async import AdapterLoader, ConfigError, LoaderConfig, UsageError, layouts
from lorax_async.engines.transformers import attach

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]

Run = Callable[[Coroutine[Any, Any, Any]], Any]


# -- what is attached to -----------------------------------------------------------------------


class Flat(nn.Module):
    """As some decoders do: the second linear's input has lost its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(8, 8), "flat": nn.Linear(8, 8)})]
        )
        self.config = {"model_type": "custom"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layers[0]
        flat: torch.Tensor = layer["flat"](layer["up"](x).view(-1, 8))
        return flat.view(x.shape)


def test_rows_that_cannot_be_told_apart_are_refused_where_an_adapter_applies(
    tmp_path: Path,
) -> None:
    model = Flat()
    up, flat = [save(model, {"r": 2, "target_modules": [n]}, tmp_path / n) for n in ("up", "flat")]
    x = torch.ones(2, 3, 8)

    async def main() -> None:
        async with serving(model) as (loader, attached):
            async with await loader.load(up) as handle:
                with torch.no_grad(), attached.batch([handle, None]):
                    assert not torch.equal(*model(x))
            async with await loader.load(flat) as handle:
                with attached.batch([handle, None]), pytest.raises(UsageError, match="told apart"):
                    model(x)

    asyncio.run(main())


async def refusal(model: Any, layout_of: Any, **settings: Any) -> str:
    """Attach a loader made for another base, and say why that is refused."""
    settings = {"device_bytes": 1 << 20} | settings
    async with AdapterLoader(layouts.from_module(layout_of), LoaderConfig(**settings)) as loader:
        before = {name: vars(module).copy() for name, module in model.named_modules()}
        with pytest.raises(ConfigError) as caught:
            attach(model, loader)
        assert {name: vars(module) for name, module in model.named_modules()} == before
    return str(caught.value)


def test_another_base_is_refused_before_anything_is_replaced(small: Any) -> None:
    wide, deep = llama(intermediate_size=64), llama(num_hidden_layers=3)
    text = asyncio.run(refusal(wide, small))
    assert "'model.layers.0.mlp.gate_proj' is 32 → 64, not 32 → 48" in text
    assert "(and 3 more)" in text  # gate, up and down of two layers, of which three are named
    text = asyncio.run(refusal(small, deep))
    assert "no module 'model.layers.2.self_attn.q_proj'" in text
    odd = llama()
    odd.model.layers[1].mlp.up_proj = nn.Bilinear(1, 1, 1)
    assert "'model.layers.1.mlp.up_proj' is a Bilinear" in asyncio.run(refusal(odd, small))


def test_an_embedding_that_does_more_than_look_up_is_refused(small: Any) -> None:
    """An adapter's layout may have one (OPT's positions); what it computes nobody here knows."""

    class Doubled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    for embedding in (Doubled(64, 32), nn.Embedding(64, 32, max_norm=1.0)):
        model = llama()
        model.model.embed_tokens = embedding
        text = asyncio.run(refusal(model, small))
        assert f"'model.embed_tokens' ({type(embedding).__name__}) does not just look" in text


def test_another_dtype_or_device_is_refused_with_the_one_to_set(small: Any) -> None:
    half, double, meta = llama().bfloat16(), llama().double(), llama().to("meta")
    assert "LoaderConfig(dtype='bfloat16')" in asyncio.run(refusal(half, small))
    assert "LoaderConfig(dtype='float32')" in asyncio.run(refusal(small, small, dtype="float16"))
    assert "float64" in asyncio.run(refusal(double, small))
    assert "the model is on meta" in asyncio.run(refusal(meta, small))


# -- detaching ---------------------------------------------------------------------------------


def anatomy(model: Any) -> list[object]:
    """Everything of a model that could change, by identity where there is one."""
    modules = [(name, id(m), type(m), vars(m).copy()) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    return [modules, parameters, list(model.state_dict()), [m.training for m in model.modules()]]


def test_names_parameters_and_hooks_stay_while_attached_and_all_else_after(small: Any) -> None:
    expected = logits_of(small, prompt(2))
    seen: list[torch.Size] = []
    linear = small.model.layers[1].mlp.up_proj
    hook = linear.register_forward_hook(lambda _, __, y: seen.append(y.shape))
    before = anatomy(small)

    async def main() -> None:
        async with serving(small) as (_, attached):
            assert anatomy(small)[1:] == before[1:]
            with attached.batch(None):
                logits_of(small, prompt(2))
            assert small.lm_head.weight is small.get_parameter("lm_head.weight")
            attached.detach()
            assert anatomy(small) == before
            attached.detach()

    asyncio.run(main())
    assert anatomy(small) == before
    assert torch.equal(logits_of(small, prompt(2)), expected)
    assert seen == [torch.Size([2, 5, 48])] * 2
    hook.remove()


def test_tied_weights_stay_tied() -> None:
    model = llama(tie_word_embeddings=True)

    async def main() -> None:
        async with serving(model):
            model.tie_weights()
            assert model.lm_head.weight is model.model.embed_tokens.weight

    asyncio.run(main())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_is_attached_once_at_a_time(small: Any) -> None:
    async def main() -> None:
        async with serving(small) as (loader, attached):
            with pytest.raises(UsageError, match="already"):
                attach(small, loader)
            attached.detach()
            with pytest.raises(UsageError, match="detached"), attached.batch(None):
                pass
            attach(small, loader).detach()

    asyncio.run(main())


def test_detaching_inside_a_batch_is_refused(small: Any) -> None:
    async def main() -> None:
        async with serving(small) as (_, attached):
            with attached.batch([None]):
                with pytest.raises(UsageError, match="open on this model: 1"):
                    attached.detach()
                with pytest.raises(UsageError, match="in a batch of 1"):
                    logits_of(small, prompt(2))  # still attached

    asyncio.run(main())


def test_a_forward_that_somebody_else_replaced_is_kept_and_called(small: Any) -> None:
    linear = small.model.layers[0].self_attn.q_proj
    calls: list[torch.Size] = []

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return type(linear).forward(linear, x)  # type: ignore[no-any-return]

    async def main() -> None:
        async with serving(small) as (_, attached):
            with attached.batch(None):
                logits_of(small, prompt(1))
            ours = linear.forward
            linear.forward = wrapped
            with pytest.raises(UsageError, match="replaced after attach"):
                attached.detach()
            linear.forward = ours

    linear.forward = wrapped
    asyncio.run(main())
    assert linear.forward is wrapped
    del linear.forward
    assert calls == [torch.Size([1, 5, 32])]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied_with_adapters(copied: Callable[[Any], Any], small: Any) -> None:
    async def main() -> None:
        async with serving(small):
            with pytest.raises(UsageError, match="detach first"):
                copied(small.lm_head.forward)

    asyncio.run(main())
