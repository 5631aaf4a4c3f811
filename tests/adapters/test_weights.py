"""LoraWeights.load: scale, absent layers, orientation and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters import small_base as base
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights
from lorax_async.errors import UsageError

MODELS = [base.FakeModel(), LayoutModel(base.layout(), torch.float32, 1)]


@pytest.fixture(params=MODELS, ids=lambda model: type(model).__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


def load(
    config: LoraConfig, model: Any, made: dict[str, Tensor], layer_type: str
) -> LoraWeights | None:
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    return LoraWeights.load(config, model, module_map, layer_type, names)


def ones(rank: int, layer_type: str = "q_proj") -> dict[str, Tensor]:
    return {name: torch.ones_like(t) for name, t in base.tensors(rank, types=[layer_type]).items()}


# -- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "r", "rslora", "scale"),
    [(16, 4, False, 4.0), (16, 4, True, 8.0), (16, 16, True, 4.0), (8, 32, False, 0.25)],
)
def test_the_scale_is_in_b(model: Any, alpha: int, r: int, rslora: bool, scale: float) -> None:
    weights = load(base.config(r, alpha, use_rslora=rslora), model, ones(r), "q_proj")
    assert weights is not None
    assert torch.unique(weights.weights_b).tolist() == sorted({scale, 0.0} if r == 4 else {scale})
    assert torch.unique(weights.weights_b[:, :r]).tolist() == [scale]
    assert weights.weights_a.max() == 1


def test_alpha_16_of_rank_4_is_4_for_every_type_and_every_load(model: Any) -> None:
    config = base.config(4, 16)
    made = {name: torch.ones_like(tensor) for name, tensor in base.tensors(4).items()}
    for _ in range(2):
        for layer_type in base.SHAPES:
            weights = load(config, model, made, layer_type)
            assert weights is not None
            assert weights.weights_b.max() == 4.0
            assert weights.adapter_config.padded_rank == 8
            assert weights.adapter_config.r == 4
            assert weights.adapter_config == config
    assert (config.r, config.padded_rank) == (4, None)


def test_patterns_scale_by_module_and_by_its_own_rank(tmp_path: Any, model: Any) -> None:
    ranks = {"": 4, base.module_name(1, "q_proj"): 16}
    folder = base.write(
        tmp_path / "a",
        {n: torch.ones_like(t) for n, t in base.tensors(ranks, types=["q_proj"]).items()},
        r=4,
        lora_alpha=16,
        rank_pattern={"layers.1.self_attn.q_proj": 16},
        alpha_pattern={r"layers\.2\..*q_proj": 2},
    )
    config = LoraConfig.load(folder)
    weights = load(config, model, load_file(folder / "adapter_model.safetensors"), "q_proj")
    assert weights is not None
    # 16 / 4, 16 / 16, 2 / 4; and all are padded to what the largest rank needs.
    assert weights.weights_b.amax((1, 2)).tolist() == [4.0, 1.0, 0.5]
    assert weights.weights_b.sum((1, 2)).tolist() == [4 * 4 * 840, 16 * 840, 0.5 * 4 * 840]
    assert (weights.lora_a_r, weights.adapter_config.padded_rank) == (16, 16)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 40])
def test_b_is_cast_first_and_scaled_then(
    stored: torch.dtype, dtype: torch.dtype, rank: int
) -> None:
    """In bf16, 3 · (1 + 2⁻⁹) is 3 if it is rounded before, and 3.015625 if after."""
    made = base.tensors(rank, types=["q_proj"], dtype=stored)
    made[base.key(0, "q_proj", "B")][0, 0] = 1 + 2**-9
    weights = load(base.config(rank, 3 * rank), base.FakeModel(dtype), made, "q_proj")
    assert weights is not None
    for layer in range(base.LAYERS):
        b = made[base.key(layer, "q_proj", "B")].to(dtype).T * 3.0
        a = made[base.key(layer, "q_proj", "A")].to(dtype)
        assert torch.equal(weights.weights_b[layer, :rank], b)
        assert torch.equal(weights.weights_a_t[layer, :rank], a)
    if (stored, dtype) == (torch.float32, torch.bfloat16):
        assert weights.weights_b[0, 0, 0] == 3.0
    assert weights.weights_a.dtype == weights.weights_b.dtype == dtype


def test_nothing_is_spread_by_values_that_are_not_finite(model: Any) -> None:
    made = base.tensors(8, types=["q_proj"])
    made[base.key(0, "q_proj", "B")][1, 2] = float("nan")
    made[base.key(0, "q_proj", "B")][3, 4] = float("-inf")
    weights = load(base.config(), model, made, "q_proj")
    assert weights is not None
    strange = (~weights.weights_b.isfinite()).nonzero().tolist()
    assert strange == [[0, 2, 1], [0, 4, 3]]


# -- absent layers --------------------------------------------------------------------------------


def test_no_layer_of_a_type_is_none(model: Any) -> None:
    made = base.tensors(types=["q_proj"])
    config = base.config()
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    assert LoraWeights.load(config, model, module_map, "v_proj", names) is None
    assert names == set(made)
    assert load(config, model, made, "q_proj") is not None


def test_absent_layers_are_zeros(model: Any) -> None:
    made = base.tensors(types=["q_proj"], skip=[(0, "q_proj"), (2, "q_proj")])
    weights = load(base.config(), model, made, "q_proj")
    assert weights is not None
    assert weights.weights_a.shape == (3, 840, 8)
    assert weights.weights_b.shape == (3, 8, 840)
    for layer in (0, 2):
        assert not weights.weights_a[layer].any()
        assert not weights.weights_b[layer].any()
    assert torch.equal(weights.weights_b[1].T, 2 * made[base.key(1, "q_proj", "B")])


def test_layers_may_be_told_by_their_ids() -> None:
    """As LoRAX's vision models do: the result has the order of the ids."""

    class Vision(base.FakeModel):
        def get_num_layers_for_type(self, layer_type: str) -> list[int]:
            return [2, 0]

    made = base.tensors(types=["q_proj"], skip=[(1, "q_proj")])
    weights = load(base.config(), Vision(), made, "q_proj")
    assert weights is not None
    for place, layer in enumerate([2, 0]):
        assert torch.equal(weights.weights_b[place].T, 2 * made[base.key(layer, "q_proj", "B")])


# -- orientation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "padded", "by_rank"),
    [(8, 8, False), (9, 16, True), (16, 16, True), (128, 128, True), (129, 144, False)],
)
def test_orientation(model: Any, rank: int, padded: int, by_rank: bool) -> None:
    made = base.tensors(rank, types=["v_proj"])
    weights = load(base.config(rank, rank), model, made, "v_proj")
    assert weights is not None
    assert (weights.lora_a_r, weights.lora_b_r) == (padded, padded)
    assert weights.weights_a.shape == ((3, padded, 840) if by_rank else (3, 840, padded))
    assert weights.weights_a_t.shape == (3, padded, 840)
    assert weights.weights_b.shape == (3, padded, 1680)
    assert weights.weights_b_t.shape == (3, 1680, padded)
    a, b = made[base.key(1, "v_proj", "A")], made[base.key(1, "v_proj", "B")]
    assert torch.equal(weights.weights_a_t[1, :rank], a)
    assert torch.equal(weights.weights_b_t[1, :, :rank], b)
    assert torch.equal(
        weights.weights_a[1], weights.weights_a_t[1] if by_rank else weights.weights_a_t[1].T
    )
    assert torch.equal(weights.weights_b, weights.weights_b_t.transpose(1, 2))
    assert not weights.weights_a_t[:, rank:].any()
    assert not weights.weights_b[:, rank:].any()


@pytest.mark.parametrize("rank", [8, 16])
def test_kernels_may_keep_every_address(model: Any, rank: int) -> None:
    weights = load(base.config(rank), model, base.tensors(rank), "q_proj")
    assert weights is not None
    for name in ("weights_a", "weights_b", "weights_a_t", "weights_b_t"):
        first = getattr(weights, name)
        assert first.is_contiguous()
        assert getattr(weights, name).data_ptr() == first.data_ptr()
    assert (weights.weights_a_t.data_ptr() == weights.weights_a.data_ptr()) == (rank == 16)


@pytest.mark.parametrize("rank", [8, 32])
def test_made_by_hand_of_a_tensor_for_each_layer(rank: int) -> None:
    a, b = [torch.randn(5, rank) for _ in range(2)], [torch.randn(rank, 3) for _ in range(2)]
    weights = LoraWeights(a, b, base.config(rank))
    assert torch.equal(weights.weights_a, torch.stack([w.T for w in a] if rank == 32 else a))
    assert weights.weights_a.is_contiguous()
    assert torch.equal(weights.weights_b, torch.stack(b))
    assert torch.equal(weights.weights_a_t[1], a[1].T)
    assert torch.equal(weights.weights_b_t[1], b[1].T)
    assert (weights.lora_a_r, weights.lora_b_r) == (rank, rank)
    assert weights.adapter_config == base.config(rank)
    assert weights.speculative_tokens == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([], []),
        ([torch.zeros(4, 8)], []),
        ([torch.zeros(4, 8), torch.zeros(5, 8)], [torch.zeros(8, 2)] * 2),
        ([torch.zeros(8)], [torch.zeros(8)]),
    ],
)
def test_by_hand_of_layers_that_are_not_alike(a: list[Tensor], b: list[Tensor]) -> None:
    with pytest.raises(UsageError, match="of every layer"):
        LoraWeights(a, b, base.config())


# -- names ----------------------------------------------------------------------------------------


def test_a_module_map_of_the_contract(model: Any) -> None:
    made = base.tensors(types=["lm_head"])
    module_map, names = base.config().map_weights_for_model(made, model.weight_names)
    a, b = base.key(0, "lm_head", "A"), base.key(0, "lm_head", "B")
    assert a == "base_model.model.lm_head.lora_A.weight"
    assert names == {a, b}
    assert list(module_map) == ["lm_head"]
    assert module_map["lm_head"]["lora_A"][0] is made[a]
    assert module_map["lm_head"]["lora_B"][0] is made[b]
    assert [key for _, key in module_map["lm_head"].values()] == [a, b]


def test_used_names_are_taken_out(model: Any) -> None:
    config, made = base.config(), base.tensors()
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    names.add("somebody else's")
    config.load_batched_adapter_weights(model, module_map, "q_proj", names, True)
    assert names == {n for n in made if "q_proj" not in n} | {"somebody else's"}
    for layer_type in base.SHAPES:
        config.load_batched_adapter_weights(model, module_map, layer_type, names, False)
    assert names == {"somebody else's"}
