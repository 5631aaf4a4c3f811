"""Tensors that are no adapter for this base: refused as a file is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import tiny
from given import used
from lorax_async import (
    AdapterFormatError,
    IncompatibleAdapterError,
    Limits,
    LoraxError,
    UnsupportedAdapterError,
)
from tiny_loaders import loader

Given = Mapping[str, torch.Tensor]
NEW = tiny.tensors(2)

pytestmark = pytest.mark.usefixtures("nothing_left")


def _without(name: str) -> dict[str, torch.Tensor]:
    return {other: tensor for other, tensor in NEW.items() if name not in other}


def _with(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return NEW | {f"base_model.model.{name}": tensor}


LAYER = "model.layers.0.self_attn.q_proj"


REFUSED: list[tuple[Given, dict[str, object], type[LoraxError], str]] = [
    (NEW, {"peft_type": None}, AdapterFormatError, "no 'peft_type'"),
    (NEW, {"r": 5}, AdapterFormatError, "rank|shape"),
    (NEW, {"bias": "all"}, UnsupportedAdapterError, "trained biases"),
    (NEW, {"lora_alpha": float("nan")}, AdapterFormatError, "cannot be written.*JSON"),
    (NEW, {"what": object()}, AdapterFormatError, "object is nothing that JSON has"),
    (NEW, {"x": "y" * (256 << 10)}, AdapterFormatError, "adapter_config.json"),
    ({}, {}, AdapterFormatError, "no tensor"),
    (_without("0.self_attn.q_proj.lora_A"), {}, AdapterFormatError, "no A beside it"),
    (_with("x.lora_A.weight", torch.ones(4, 3)), {}, LoraxError, "x"),
    (_with(f"{LAYER}.lora_A.default.weight", torch.ones(4, 32)), {}, UnsupportedAdapterError,
     "get_peft_model_state_dict"),
    (_with("lm_head.weight", torch.ones(4, 32)), {}, UnsupportedAdapterError, "vocabulary"),
    (_with(f"{LAYER}.lora_A.weight", torch.ones(4, 31)), {}, IncompatibleAdapterError, "31"),
    (_with(f"{LAYER}.lora_A.weight", torch.ones(4, 32).double()), {}, UnsupportedAdapterError,
     "float64; give it as torch.float32, torch.float16, torch.bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "changes", "kind", "problem"), REFUSED)
async def test_what_is_no_adapter_for_this_base_is_refused(
    given: Given, changes: dict[str, object], kind: type[LoraxError], problem: str
) -> None:
    async with loader() as there:
        with pytest.raises(kind, match=problem) as caught:
            await there.replace("mine", given, tiny.config(**changes))  # type: ignore[arg-type]
        assert caught.value.id == "mine"
        assert not there.residency()
        assert used(there) == 0


async def test_limits_are_those_of_files() -> None:
    async def body(limits: Limits, problem: str) -> None:
        async with loader(limits=limits) as there:
            with pytest.raises(UnsupportedAdapterError, match=problem):
                await there.load_tensors("mine", NEW, tiny.config())
            assert used(there) == 0

    await body(Limits(max_tensors=15), "16 tensors are over the limit of 15")
    await body(Limits(max_rank=3), "r is 4, above the limit of 3")
    await body(Limits(max_adapter_bytes=9000), "bytes in its tensors, over the limit of 9,000")
