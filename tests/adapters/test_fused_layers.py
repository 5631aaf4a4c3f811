"""LoraWeights.load for LoRAX's own layers: each adapter is compared with its part of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import lorax_models as lorax
from adapters.lorax_models import GATE_UP, HIDDEN, INTERMEDIATE, KEY_VALUE, QKV, SHAPES, Linear
from adapters.small_base import config
from lorax_async.adapters import LoraConfig, LoraWeights, WeightsFile
from lorax_async.errors import IncompatibleAdapterError, UsageError

WORLDS = [1, 2]
SCALE = 2.0  # of small_base.config: alpha 16, r 8


def load(model: Any, made: dict[str, Tensor], layer_type: str) -> LoraWeights | None:
    module_map, names = config().map_weights_for_model(made, model.weight_names)
    return LoraWeights.load(config(), model, module_map, layer_type, names)


def loaded(model: Any, made: dict[str, Tensor], layer_type: str) -> LoraWeights:
    weights = load(model, made, layer_type)
    assert weights is not None
    return weights


# -- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", SHAPES)
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_weights_are_the_files_own(layer_type: str, world_size: int, rank: int) -> None:
    made = lorax.tensors()
    weights = loaded(lorax.llama(rank, world_size), made, layer_type)
    padded = 8 * world_size
    for layer in lorax.layers_of(layer_type):
        module = lorax.module_name(layer, layer_type)
        a, b = made[lorax.key(module, "A")].T, made[lorax.key(module, "B")].T * SCALE
        a = torch.cat([a, a.new_zeros(len(a), padded - 8)], 1)
        b = torch.cat([b, b.new_zeros(padded - 8, b.shape[1])], 0)
        split = 0 if layer_type in lorax.ROW_PARALLEL else 1
        # the decode form: A [r, in], B [out, r]
        a_t = a.chunk(world_size, split)[rank].T
        assert torch.equal(weights.weights_a_t[layer], a_t)
        assert torch.equal(weights.weights_b_t[layer], b.chunk(world_size, 1)[rank].T)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linears = {
            name: nn.Linear(*SHAPES[name], bias=False) for name in SHAPES if name != "lm_head"
        }
        self.self_attn = nn.ModuleDict({n: linears[n] for n in (*QKV, "o_proj")})
        self.mlp = nn.ModuleDict({n: linears[n] for n in (*GATE_UP, "down_proj")})


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([_Block() for _ in range(lorax.LAYERS)])
        self.model = nn.ModuleDict({"layers": layers})
        self.lm_head = nn.Linear(*SHAPES["lm_head"], bias=False)


@pytest.mark.parametrize("world_size", WORLDS)
def test_deltas_are_those_of_peft(tmp_path: Path, world_size: int) -> None:
    import peft

    settings = peft.LoraConfig(
        r=12,
        lora_alpha=30,
        target_modules=list(SHAPES),
        init_lora_weights=False,
        rank_pattern={"k_proj": 4},
        alpha_pattern={"up_proj": 6},
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(_Base(), settings)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ours = LoraConfig.load(tmp_path)
    models = [lorax.llama(rank, world_size) for rank in range(world_size)]
    with WeightsFile.at(tmp_path / "adapter_model.safetensors") as file:
        module_map, names = ours.map_weights_for_model(file, models[0].weight_names)
        unused = set(names)
        parts = {
            layer_type: [
                LoraWeights.load(ours, model, module_map, layer_type, unused) for model in models
            ]
            for layer_type in SHAPES
        }
    assert unused == set()
    assert len(names) == 2 * (7 * lorax.LAYERS + 1)
    for layer_type, ranks in parts.items():
        weights = [one for one in ranks if one is not None]
        assert len(weights) == world_size
        split = 1 if layer_type in lorax.ROW_PARALLEL else 0  # of A [r, in]
        for layer in lorax.layers_of(layer_type):
            a = torch.cat([one.weights_a_t[layer] for one in weights], split)
            b = torch.cat([one.weights_b_t[layer] for one in weights], 0)
            module: Any = wrapped.get_submodule(
                f"base_model.model.{lorax.module_name(layer, layer_type)}"
            )
            expected = module.get_delta_weight("default").detach()
            torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [QKV, GATE_UP])
def test_parts_are_found_by_name_in_any_order(names: tuple[str, ...]) -> None:
    """Qwen's second half comes first."""
    model = lorax.llama()
    for layer in range(lorax.LAYERS):
        fused = model.target_to_layer[layer, names[0]][1]
        fused.layer_names, fused.sizes = fused.layer_names[::-1], fused.sizes[::-1]
    for name in names:
        assert load(model, lorax.tensors(name), name) is not None


@pytest.mark.parametrize(
    ("layer_type", "outputs", "sizes"),
    [
        ("Wqkv", HIDDEN + 2 * KEY_VALUE, None),  # DBRX, Phi-3, Bloom: no sizes
        ("c_attn", 3 * HIDDEN, [3 * HIDDEN]),  # GPT-2, Qwen
        ("gate_proj", INTERMEDIATE, [INTERMEDIATE]),  # Gemma, not fused
        ("fc1", 4 * HIDDEN, [HIDDEN]),  # Phi, Mllama: LoRAX's size is the input's
    ],
)
def test_a_layer_with_one_name_is_compared_as_a_whole(
    layer_type: str, outputs: int, sizes: list[int] | None
) -> None:
    model = lorax.one_layer(Linear(lorax.weight(outputs, HIDDEN)), layer_type, sizes)
    module = f"model.layers.0.{layer_type}"
    made = lorax.pair(module, HIDDEN, outputs)
    weights = loaded(model, made, layer_type)
    assert torch.equal(weights.weights_a[0], made[lorax.key(module, "A")].T)
    assert torch.equal(weights.weights_b[0], made[lorax.key(module, "B")].T * SCALE)
    for wrong in (HIDDEN // 2, outputs - KEY_VALUE):
        with pytest.raises(IncompatibleAdapterError, match=f"{module}.*{HIDDEN} → {wrong}"):
            load(model, lorax.pair(module, HIDDEN, wrong), layer_type)


@pytest.mark.parametrize("vocabulary", [80, 81])
def test_a_head_is_split_by_vocabulary_or_not_at_all(vocabulary: int) -> None:
    model = lorax.llama(1, 2, vocabulary)
    right, wrong = (lorax.pair("lm_head", HIDDEN, size) for size in (vocabulary, 2 * vocabulary))
    if vocabulary == 80:
        assert loaded(model, right, "lm_head").weights_b.shape == (1, 16, 40)
    else:  # it fits, but LoRAX cannot share it out evenly
        with pytest.raises(IncompatibleAdapterError, match="even share"):
            load(model, right, "lm_head")
    with pytest.raises(IncompatibleAdapterError, match=f"{HIDDEN} → {2 * vocabulary} .*{HIDDEN} →"):
        load(model, wrong, "lm_head")


# -- what does not --------------------------------------------------------------------------------

FUSED_SIZE = {"q_proj": HIDDEN + 2 * KEY_VALUE, "gate_proj": 2 * INTERMEDIATE}


@pytest.mark.parametrize(
    ("layer_type", "inputs", "outputs"),
    [
        ("q_proj", HIDDEN, KEY_VALUE),
        ("q_proj", HIDDEN, FUSED_SIZE["q_proj"]),
        ("k_proj", HIDDEN, HIDDEN),
        ("v_proj", HIDDEN, FUSED_SIZE["q_proj"]),
        ("v_proj", HIDDEN, KEY_VALUE // 2),
        ("k_proj", KEY_VALUE, HIDDEN),
        ("q_proj", HIDDEN // 2, HIDDEN),
        ("gate_proj", HIDDEN, FUSED_SIZE["gate_proj"]),
        ("gate_proj", HIDDEN, INTERMEDIATE // 2),
        ("up_proj", INTERMEDIATE, HIDDEN),
        ("up_proj", HIDDEN // 2, INTERMEDIATE),
        ("o_proj", HIDDEN // 2, HIDDEN),
        ("o_proj", HIDDEN, HIDDEN // 2),
        ("down_proj", HIDDEN, INTERMEDIATE),
        ("down_proj", INTERMEDIATE // 2, HIDDEN),
        ("lm_head", lorax.VOCABULARY, HIDDEN),
        ("lm_head", HIDDEN, lorax.VOCABULARY // 2),
    ],
)
@pytest.mark.parametrize("world_size", WORLDS)
def test_other_sizes_than_the_parts_are_refused(
    layer_type: str, inputs: int, outputs: int, world_size: int
) -> None:
    layer = lorax.layers_of(layer_type)[-1]
    module = lorax.module_name(layer, layer_type)
    made = lorax.tensors(layer_type) | lorax.pair(module, inputs, outputs)
    own = SHAPES[layer_type]
    for rank in range(world_size):
        with pytest.raises(IncompatibleAdapterError) as caught:
            load(lorax.llama(rank, world_size), made, layer_type)
        text = str(caught.value)
        assert module in text
        assert f"{inputs} → {outputs}" in text
        assert f"{own[0]} → {own[1]}" in text


def test_all_layers_of_a_type_that_are_wrong_alike_are_refused() -> None:
    """They could be stacked."""
    made: dict[str, Tensor] = {}
    for layer in range(lorax.LAYERS):
        made |= lorax.pair(lorax.module_name(layer, "q_proj"), HIDDEN, FUSED_SIZE["q_proj"])
    with pytest.raises(IncompatibleAdapterError, match=r"layers\.0\.self_attn\.q_proj"):
        load(lorax.llama(), made, "q_proj")


def test_a_type_that_a_fused_layer_does_not_name_is_the_models_fault() -> None:
    model = lorax.llama()
    for layer in range(lorax.LAYERS):
        model.target_to_layer[layer, "v_proj"][1].layer_names = ("q_proj", "k_proj", "other")
    with pytest.raises(UsageError, match=r"'v_proj' is fused of .*other \(16\)"):
        load(model, lorax.tensors("v_proj"), "v_proj")


# -- quantized weights ----------------------------------------------------------------------------


class _QuantState:
    shape = torch.Size([HIDDEN + 2 * KEY_VALUE, HIDDEN])


def _four_bits() -> Tensor:
    packed = torch.zeros((HIDDEN + 2 * KEY_VALUE) * HIDDEN // 2, 1, dtype=torch.uint8)
    packed.quant_state = _QuantState()  # type: ignore[attr-defined]
    return packed


ALL = HIDDEN + 2 * KEY_VALUE
INT32, INT8, FLOAT8 = torch.int32, torch.int8, torch.float8_e4m3fn
QUANTIZED = {
    "awq": lambda: Linear(lorax.weight(HIDDEN, ALL // 8, INT32), in_features=64, out_features=96),
    "gptq": lambda: Linear(lorax.weight(HIDDEN // 8, ALL, INT32), infeatures=64, outfeatures=96),
    "bitsandbytes-nf4": lambda: Linear(_four_bits()),
    "fp8": lambda: Linear(lorax.weight(HIDDEN, ALL, FLOAT8)),
    "eetq": lambda: Linear(lorax.weight(HIDDEN, ALL, INT8)),
    "bitsandbytes": lambda: Linear(lorax.weight(ALL, HIDDEN, INT8)),
}
SILENT_ON_INPUTS = {"eetq", "bitsandbytes"}


@pytest.mark.parametrize("method", QUANTIZED)
def test_sizes_tell_the_parts_of_quantized_layers(method: str) -> None:
    model = lorax.llama()
    for layer in range(lorax.LAYERS):
        model.target_to_layer[layer, "q_proj"][1].base_layer.linear = QUANTIZED[method]()
    for name in QKV:
        assert load(model, lorax.tensors(name), name) is not None
    module = lorax.module_name(1, "k_proj")
    inputs = "?" if method in SILENT_ON_INPUTS else HIDDEN
    for wrong in (HIDDEN, ALL):
        made = lorax.tensors("k_proj") | lorax.pair(module, HIDDEN, wrong)
        with pytest.raises(IncompatibleAdapterError) as caught:
            load(model, made, "k_proj")
        assert f"the base's maps {inputs} → {KEY_VALUE};" in str(caught.value)
    narrow: dict[str, Tensor] = {}
    for layer in range(lorax.LAYERS):
        narrow |= lorax.pair(lorax.module_name(layer, "k_proj"), HIDDEN // 2, KEY_VALUE)
    if method in SILENT_ON_INPUTS:
        assert load(model, narrow, "k_proj") is not None
    else:
        with pytest.raises(IncompatibleAdapterError, match=r"layers\.0\.self_attn\.k_proj"):
            load(model, narrow, "k_proj")
