"""LoraWeights.load: what does not fit, and what contradicts itself, is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters import small_base as base
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights, WeightsFile
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    UsageError,
)

MODELS = [base.FakeModel(), LayoutModel(base.layout(), torch.float32, 1)]


@pytest.fixture(params=MODELS, ids=lambda model: type(model).__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


def load(
    config: LoraConfig, model: Any, made: dict[str, Tensor] | WeightsFile, layer_type: str
) -> LoraWeights | None:
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    return LoraWeights.load(config, model, module_map, layer_type, names)


# -- what does not fit ----------------------------------------------------------------------------


def test_a_failed_load_leaves_the_names(model: Any) -> None:
    config, made = base.config(4), base.tensors(8)
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    with pytest.raises(AdapterFormatError, match="rank 4, which the config says"):
        LoraWeights.load(config, model, module_map, "q_proj", names)
    assert names == set(made)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_module_map_has_both_factors(model: Any, factor: str) -> None:
    config, made = base.config(), base.tensors(types=["q_proj"])
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    module = base.module_name(1, "q_proj")
    halved = {other: place for other, place in module_map[module].items() if other != factor}
    with pytest.raises(UsageError, match=f"{module}.* has no {factor} in the module map"):
        LoraWeights.load(config, model, {**module_map, module: halved}, "q_proj", names)


@pytest.mark.parametrize("part", ["A", "B"])
def test_shapes_decide(model: Any, part: str) -> None:
    made = base.tensors(types=["q_proj"])
    name = base.key(1, "q_proj", part)
    made[name] = torch.zeros(8, 839) if part == "A" else torch.zeros(841, 8)
    with pytest.raises(IncompatibleAdapterError, match=base.module_name(1, "q_proj")):
        load(base.config(), model, made, "q_proj")


def test_a_weight_that_does_not_say_its_sizes_is_not_asked() -> None:
    """A quantised one: LoRAX's layers hold packed integers."""
    model = base.FakeModel()
    for _, layer in model.target_to_layer.values():
        layer.base_layer.linear.weight = torch.zeros(7, 1, dtype=torch.uint8)
    assert load(base.config(), model, base.tensors(), "q_proj") is not None


def test_layers_of_different_sizes_cannot_be_stacked() -> None:
    model = base.FakeModel()
    made = base.tensors(types=["q_proj"])
    made[base.key(1, "q_proj", "A")] = torch.zeros(8, 420)
    model.target_to_layer[1, "q_proj"][1].base_layer.linear.weight = torch.zeros(840, 420)
    with pytest.raises(IncompatibleAdapterError, match="cannot be stacked"):
        load(base.config(), model, made, "q_proj")


def test_a_type_lies_on_one_device() -> None:
    model = base.FakeModel()
    meta = torch.zeros(840, 840, device="meta")
    model.target_to_layer[1, "q_proj"][1].base_layer.linear.weight = meta
    with pytest.raises(UsageError, match="2 devices"):
        load(base.config(), model, base.tensors(), "q_proj")


def test_a_scale_that_no_float32_holds(model: Any) -> None:
    with pytest.raises(AdapterFormatError, match="lora_alpha"):
        load(base.config(8, 1e40), model, base.tensors(), "q_proj")


def test_a_scale_of_one_module_that_no_float32_holds(tmp_path: Path, model: Any) -> None:
    folder = base.write(tmp_path / "a", alpha_pattern={"layers.1.self_attn.q_proj": -1e40})
    config = LoraConfig.load(folder)
    with pytest.raises(AdapterFormatError, match=r"layers\.1\.self_attn\.q_proj.*-1.25e\+39"):
        load(config, model, base.tensors(), "q_proj")
    assert load(config, model, base.tensors(), "v_proj") is not None


@pytest.mark.parametrize(
    ("dtype", "largest", "alpha"),
    [
        (torch.float16, 100.0, 8000.0),  # B 100 x scale 1000, above 65504
        (torch.float16, 1.0, -8 * 65536.0),
        (torch.bfloat16, 1e3, 8e36),
        (torch.float32, 1e3, 8e36),
    ],
)
def test_a_scale_that_takes_b_beyond_its_dtype(
    tmp_path: Path, dtype: torch.dtype, largest: float, alpha: float
) -> None:
    model, made = base.FakeModel(dtype), base.tensors(types=["q_proj"])
    name = base.key(2, "q_proj", "B")
    for key, tensor in made.items():
        made[key] = torch.full_like(tensor, 2.0**-10)
    made[name][-1, -1] = largest
    module = base.module_name(2, "q_proj")
    with pytest.raises(AdapterFormatError, match=f"{module}.*B times the scale .* {dtype} holds"):
        load(base.config(8, alpha), model, made, "q_proj")
    save_file(made, tmp_path / "adapter_model.safetensors")
    with (
        WeightsFile.at(tmp_path / "adapter_model.safetensors") as file,
        pytest.raises(AdapterFormatError, match=f"{module}.*B times the scale"),
    ):
        load(base.config(8, alpha), model, file, "q_proj")
    made[name][-1, -1] = torch.inf  # its author's own
    weights = load(base.config(8, 16), model, made, "q_proj")
    assert weights is not None
    assert weights.weights_b.isinf().sum() == 1


def test_small_b_with_a_large_scale_fits_float16() -> None:
    made = {k: torch.full_like(t, 2.0**-14) for k, t in base.tensors(types=["q_proj"]).items()}
    weights = load(base.config(8, 8 * 2.0**20), base.FakeModel(torch.float16), made, "q_proj")
    assert weights is not None
    assert torch.unique(weights.weights_b).tolist() == [64.0]


def test_types_that_the_model_does_not_have(model: Any) -> None:
    module_map, names = base.config().map_weights_for_model(base.tensors(), model.weight_names)
    with pytest.raises(UsageError, match=r"no layer.* type 'k_proj'"):
        LoraWeights.load(base.config(), model, module_map, "k_proj", names)


def test_integers_are_no_weights(model: Any) -> None:
    made = base.tensors(types=["q_proj"])
    made[base.key(1, "q_proj", "B")] = torch.ones(840, 8, dtype=torch.int8)
    with pytest.raises(UnsupportedAdapterError, match=r"layers.1.*B torch.int8"):
        load(base.config(), model, made, "q_proj")


def test_weights_in_training_are_copied_without_their_gradients(model: Any) -> None:
    made = {
        name: tensor.requires_grad_() for name, tensor in base.tensors(types=["q_proj"]).items()
    }
    weights = load(base.config(), model, made, "q_proj")
    assert weights is not None
    assert not weights.weights_a.requires_grad
    assert not weights.weights_b.requires_grad


# -- fan_in_fan_out -------------------------------------------------------------------------------


def _transposed(*types: str) -> LayoutModel:
    layout = base.layout()
    modules = tuple(
        dataclasses.replace(module, transposed=module.name.rpartition(".")[2] in types)
        for module in layout.modules
    )
    return LayoutModel(dataclasses.replace(layout, modules=modules), torch.float32, 1)


@pytest.mark.parametrize("said", [True, False])
def test_the_file_is_the_same_whatever_the_base_stores(said: bool) -> None:
    made = base.tensors()
    plain = load(base.config(), MODELS[1], made, "v_proj")
    turned = load(base.config(fan_in_fan_out=said), _transposed(*base.SHAPES), made, "v_proj")
    assert plain is not None
    assert turned is not None
    assert torch.equal(plain.weights_a, turned.weights_a)
    assert torch.equal(plain.weights_b, turned.weights_b)


def test_one_module_of_the_adapter_is_enough() -> None:
    made = base.tensors(types=["q_proj", "v_proj"])
    assert load(base.config(fan_in_fan_out=True), _transposed("v_proj"), made, "q_proj") is not None


def test_true_for_a_base_that_stores_no_module_so_is_refused() -> None:
    with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out is true"):
        load(base.config(fan_in_fan_out=True), MODELS[1], base.tensors(), "q_proj")
    made = base.tensors(types=["q_proj"])
    with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out is true"):
        load(base.config(fan_in_fan_out=True), _transposed("v_proj"), made, "q_proj")
