"""Code written for `lorax_server.adapters.lora` runs with the import changed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from adapters import small_base as base
from lorax_async import adapters
from lorax_async.adapters import LayoutModel, WeightsFile, lora, require_all_used
from lorax_async.errors import IncompatibleAdapterError


def test_the_names() -> None:
    assert set(lora.__all__) == {
        *("AdapterBatchMetadata", "AdapterConfig", "AdapterWeights", "BatchAdapterWeights"),
        *("BatchLoraWeights", "LORA", "LoraConfig", "LoraWeights", "ModuleMap", "RankSegments"),
        "get_scaling_factor",
    }
    for name in (*lora.__all__, "LORA"):
        assert hasattr(lora, name)
    assert all(hasattr(adapters, name) for name in adapters.__all__)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (
            lora.LoraConfig,
            "base_model_name_or_path r target_modules fan_in_fan_out lora_alpha use_rslora",
        ),
        (lora.LoraConfig.load, "adapter_id api_token"),
        (lora.LoraConfig.load_async, "adapter_id api_token"),
        (lora.LoraConfig.map_weights_for_model, "self adapter_weights weight_names"),
        (
            lora.LoraConfig.load_batched_adapter_weights,
            "self model module_map layer_type unused_weight_names dynamic",
        ),
        (lora.LoraWeights, "weights_a weights_b adapter_config"),
        (lora.LoraWeights.load, "config model module_map layer_type unused_weight_names"),
        (lora.LoraWeights.load_async, "config model module_map layer_type unused_weight_names"),
        (lora.LoraWeights.from_adapter, "handle layer_type"),
        (LayoutModel, "layout dtype world_size rank"),
        (lora.get_scaling_factor, "lora_alpha r uses_rslora"),
    ],
)
def test_the_signatures(call: object, names: str) -> None:
    signature = inspect.signature(call)  # type: ignore[arg-type]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    given = [name for name, one in signature.parameters.items() if one.kind in kinds]
    assert given == names.split()


def test_the_calls_of_loraxs_models(tmp_path: Path) -> None:
    """As `Model.load_adapter` makes them."""
    folder = base.write(tmp_path / "sql", base.tensors(types=["q_proj", "lm_head"]))
    model = base.FakeModel(torch.float16)
    weight_names = tuple(v[0] for v in model.target_to_layer.values())
    adapter_config = lora.LoraConfig.load(str(folder), "")
    layer_to_weights = {}
    with WeightsFile.open(str(folder), "") as adapter_weights:
        module_map, names = adapter_config.map_weights_for_model(adapter_weights, weight_names)
        unused_weight_names = names.copy()
        for layer_name in model.adapter_layers:
            weights = adapter_config.load_batched_adapter_weights(
                model, module_map, layer_name, unused_weight_names, True
            )
            if weights is not None:
                layer_to_weights[layer_name] = weights
    assert unused_weight_names == set()
    require_all_used(unused_weight_names)
    assert set(layer_to_weights) == {"q_proj", "lm_head"}
    (batch_type,) = layer_to_weights["q_proj"].get_batch_types()
    assert batch_type is lora.BatchLoraWeights
    assert issubclass(batch_type, lora.BatchAdapterWeights)
    assert batch_type.key() == lora.LORA == "lora"
    meta = lora.AdapterBatchMetadata(
        adapter_indices=torch.tensor([7, 7, 0]),
        adapter_set={7, 0},
        adapter_segments=torch.tensor([0, 2, 3]),
        segment_indices=[7, 0],
    )
    data = lora.BatchLoraWeights.load({7: layer_to_weights["q_proj"]}, meta, "q_proj", False, None)
    assert data is not None
    assert data.has_adapter(7)
    assert not data.has_adapter(0)
    indices = data.rank_data[8].indices
    assert indices is not None
    assert indices.tolist() == [0, 0, -1]
    assert data.adapter_index_configs[7].padded_rank == 8


def test_tensors_left_over_at_the_end() -> None:
    require_all_used(set())
    with pytest.raises(IncompatibleAdapterError, match=r"loaded a, b, c, … \(4 tensors in all\)"):
        require_all_used(set("abcd"))


def test_the_scaling_factor() -> None:
    assert lora.get_scaling_factor(16, 4) == 4.0
    assert lora.get_scaling_factor(16, 4, uses_rslora=True) == 8.0
