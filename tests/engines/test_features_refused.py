"""Adapters with features that are refused: on this base, in this computation, or at the load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engines.variants import (
    FEATURE_WARNINGS,
    PEFT_WARNING,
    llama,
    logits_of,
    logits_with,
    prompt,
    save,
    serving,
    wrapped,
)
from lorax_async import AdapterFormatError, UnsupportedAdapterError, UsageError

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
WEIGHTS = "adapter_model.safetensors"
DORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
TOKENS = {"r": 4, "target_modules": ["embed_tokens"]}


class Packed(nn.Linear):
    """As a quantised linear: its weight is packed in integers."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = plain.weight.detach().abs().max() / 127
        packed = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


class Told(torch.Tensor):
    """As torchao's: it says that it is floating-point."""


def packed(linear: nn.Linear) -> nn.Module:
    return Packed(linear)


def told(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    plain = linear.weight.detach().as_subclass(Told)
    del linear._parameters["weight"]
    linear.weight = plain
    return linear


@pytest.mark.parametrize("pack", [packed, told])
def test_dora_on_packed_weights_is_refused_and_lora_is_not(
    pack: Callable[[nn.Linear], nn.Module], tmp_path: Path
) -> None:
    model = llama()
    dora = save(model, DORA, tmp_path / "dora")
    plain = save(model, {**DORA, "use_dora": False}, tmp_path / "plain")
    model.model.layers[1].mlp.down_proj = pack(model.model.layers[1].mlp.down_proj)
    assert asyncio.run(logits_with(model, plain, prompt(1))).isfinite().all()
    with pytest.raises(UsageError, match=r"'model.layers.1.mlp.down_proj' is a .*plain weights"):
        asyncio.run(logits_with(model, dora, prompt(1)))


@pytest.mark.parametrize("lora", [DORA, TOKENS, {**DORA, "use_dora": False, "lora_bias": True}])
def test_autocast_is_refused_rather_than_rounded(
    lora: dict[str, Any], small: Any, tmp_path: Path
) -> None:
    adapter = save(llama(), lora, tmp_path / "adapter")

    async def main() -> None:
        async with serving(small) as (loader, attached), await loader.load(adapter) as handle:
            with (
                attached.batch([handle]),
                torch.autocast("cpu", torch.bfloat16),
                pytest.raises(UsageError, match="autocast"),
            ):
                logits_of(small, prompt(1))

    asyncio.run(main())


def changed(adapter: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    file = adapter / WEIGHTS
    made = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in made.items() if tensor is not None}, file)
    return adapter


def with_nan(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("layers.1.mlp.down_proj.lora_magnitude_vector"):
        tensor[3] = torch.nan
    return tensor


def without_one(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if name.endswith("layers.1.mlp.down_proj.lora_magnitude_vector") else tensor


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (with_nan, "'model.layers.1.mlp.down_proj' has NaN or infinite"),
        (without_one, "use_dora is set, and module 'model.layers.1.mlp.down_proj' has no magn"),
        (None, "bytes"),
    ],
)
async def test_what_a_load_refuses(
    device: str, change: Any, text: str, small: Any, tmp_path: Path
) -> None:
    """A magnitude that is no number, one that is not there, and a file that ends within one."""
    adapter = save(llama(), DORA, tmp_path / "adapter")
    if change is None:
        content = (adapter / WEIGHTS).read_bytes()
        (adapter / WEIGHTS).write_bytes(content[:-40])
    else:
        changed(adapter, change)
    async with serving(small, device=device, check_finite=True) as (loader, _):
        with pytest.raises(AdapterFormatError, match=text):
            await loader.load(adapter)


def test_a_file_with_the_bases_embedding_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """What PEFT writes unless it is told not to."""
    model = llama()
    with_base = tmp_path / "adapter"
    with (
        wrapped(model, TOKENS) as peft_model,
        pytest.warns(UserWarning, match="save_embedding_layers"),
    ):
        peft_model.save_pretrained(with_base)
    with pytest.raises(
        UnsupportedAdapterError,
        match=r"embed_tokens.base_layer.weight.*save_embedding_layers=False",
    ):
        asyncio.run(logits_with(model, with_base, prompt(1)))
