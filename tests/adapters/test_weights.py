"""LoraWeights.load and LayoutModel: scale, padding, orientation, shares; and what is refused."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import small_base as base
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_adapters import llama, wrapped
from safetensors.torch import save_file
from small_base import HIDDEN, KEY_VALUE, QKV, SHAPES, Linear, load, loaded
from torch import Tensor

from lorax_async import errors, layouts
from lorax_async.adapters.layers import LayoutModel, padded_rank
from lorax_async.adapters.lora import LoraConfig, LoraWeights
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
MODELS = [base.lorax_model(), LayoutModel(base.layout(), FLOAT32, 1)]


@pytest.fixture(params=MODELS, ids=lambda model: type(model).__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("alpha", "r", "rslora", "scale"),
    [(16, 4, False, 4.0), (16, 4, True, 8.0), (16, 16, True, 4.0), (8, 32, False, 0.25)],
)
def test_each_load_scales_b(model: Any, alpha: int, r: int, rslora: bool, scale: float) -> None:
    """LoRAX scales by the padded rank, and pads the config once more with each load."""
    config, made = base.config(r, alpha, use_rslora=rslora), base.tensors(r)
    made = {name: torch.ones_like(tensor) for name, tensor in made.items()}
    for layer_type in base.TYPES * 2:
        weights = loaded(config, model, made, layer_type)
        assert torch.unique(weights.weights_b[:, :r]).tolist() == [scale]
        assert not weights.weights_b[:, r:].any()
        assert weights.weights_a.max() == 1
        assert (weights.adapter_config, config.r) == (config, r)
        assert weights.adapter_config.padded_rank == padded_rank(r, 1)
    assert config.padded_rank is None


@pytest.mark.parametrize("stored", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("rank", [8, 40])
def test_b_is_cast_and_then_scaled(stored: torch.dtype, dtype: torch.dtype, rank: int) -> None:
    """In bf16, 3 · (1 + 2⁻⁹) is 3 if it is rounded before, and 3.015625 if after."""
    made = base.tensors(rank, types=["q_proj"], dtype=stored)
    made[base.key(0, "q_proj", "B")][0, 0] = 1 + 2**-9
    training = {name: tensor.clone().requires_grad_() for name, tensor in made.items()}
    weights = loaded(base.config(rank, 3 * rank), base.lorax_model(dtype), training, "q_proj")
    assert not any(one.requires_grad for one in (weights.weights_a, weights.weights_b))
    for layer in range(base.LAYERS):
        b = made[base.key(layer, "q_proj", "B")].to(dtype).T * 3.0
        a = made[base.key(layer, "q_proj", "A")].to(dtype)
        assert torch.equal(weights.weights_b[layer, :rank], b)
        assert torch.equal(weights.weights_a_t[layer, :rank], a)
    if (stored, dtype) == (FLOAT32, BFLOAT16):
        assert weights.weights_b[0, 0, 0] == 3.0
    assert weights.weights_a.dtype == weights.weights_b.dtype == dtype


def test_a_scale_that_takes_b_beyond_its_dtype(tmp_path: Path) -> None:
    for dtype, largest, alpha in [
        (FLOAT16, 100.0, 8000.0),  # B 100 x scale 1000, above 65504
        (FLOAT16, 1.0, -8 * 65536.0),
        (BFLOAT16, 1e3, 8e36),
        (FLOAT32, 1e3, 8e36),
    ]:
        model, name = base.lorax_model(dtype), base.key(2, "q_proj", "B")
        made = {k: torch.full_like(t, 2.0**-10) for k, t in base.tensors(types=["q_proj"]).items()}
        made[name][-1, -1] = largest
        save_file(made, tmp_path / "weights")
        problem = f"{base.module_name(2, 'q_proj')}.*B times the scale .* {dtype} holds"
        with WeightsFile.at(tmp_path / "weights") as file:
            for content in (made, file):
                with pytest.raises(AdapterFormatError, match=problem):
                    load(base.config(8, alpha), model, content, "q_proj")
        made[name][-1, -1] = torch.inf  # its author's own
        weights = loaded(base.config(8, 16), model, made, "q_proj")
        assert weights.weights_b.isinf().sum() == 1
        made[name][-1, -1] = 0  # B 2⁻¹⁰ x scale 2¹² fits all of them
        assert loaded(base.config(8, 2.0**15), model, made, "q_proj").weights_b.max() == 4


def test_ranks_are_padded() -> None:
    for rank, world_size, padded in [
        *[(8, 1, 8), (12, 1, 16), (12, 2, 16), (33, 1, 48), (65, 8, 80)],  # the contract's
        *[(1, 1, 8), (9, 1, 16), (16, 1, 16), (17, 1, 32), (256, 1, 256), (1, 8, 64), (64, 8, 64)],
        *[(1, 3, 24), (24, 3, 24), (33, 3, 48), (40, 5, 40), (65, 5, 80), (100, 7, 112)],
    ]:
        assert padded_rank(rank, world_size) == padded


def test_ranks_that_the_processes_cannot_share_are_refused() -> None:
    refused = 0
    for rank, world_size in product(range(1, 257), range(1, 9)):
        try:
            padded = padded_rank(rank, world_size)
        except IncompatibleAdapterError as error:
            refused += 1
            if (rank, world_size) == (41, 5):
                assert "41 is padded to 48, which 5 processes cannot share" in str(error)
        else:
            assert (padded >= rank, padded % world_size) == (True, 0)
    assert refused == 632
    for no_world in (0, -1, 1.0, True, "2", None):
        with pytest.raises(errors.ConfigError, match="world size"):
            padded_rank(8, no_world)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "padded", "by_rank"),
    [(8, 8, False), (9, 16, True), (16, 16, True), (128, 128, True), (129, 144, False)],
)
def test_orientation(model: Any, rank: int, padded: int, by_rank: bool) -> None:
    """A kernel may keep every address: it is contiguous, made once, and shared where it can be."""
    made = base.tensors(rank, types=["v_proj"])
    weights = loaded(base.config(rank, rank), model, made, "v_proj")
    assert (weights.lora_a_r, weights.lora_b_r) == (padded, padded)
    turned = (3, padded, 840)
    shapes = {"weights_b": (3, padded, 1680), "weights_b_t": (3, 1680, padded)}
    shapes |= {"weights_a_t": turned, "weights_a": turned if by_rank else (3, 840, padded)}
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        assert (name, tensor.shape, tensor.is_contiguous()) == (name, shape, True)
        assert tensor.data_ptr() == getattr(weights, name).data_ptr()
    assert (weights.weights_a.data_ptr() == weights.weights_a_t.data_ptr()) == by_rank
    a_t, b = weights.weights_a_t, weights.weights_b
    assert torch.equal(weights.weights_a, a_t if by_rank else a_t.mT)
    assert torch.equal(weights.weights_b_t, b.mT)
    assert torch.equal(a_t[1, :rank], made[base.key(1, "v_proj", "A")])
    assert torch.equal(b[1, :rank].T, made[base.key(1, "v_proj", "B")])
    assert not a_t[:, rank:].any()
    assert not b[:, rank:].any()


def test_layers_may_be_told_by_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LoRAX's vision models do: the result has the order of the ids."""
    model = base.lorax_model()
    monkeypatch.setattr(model, "get_num_layers_for_type", lambda _: [2, 0])
    made = base.tensors(types=["q_proj"], skip=[(1, "q_proj")])
    weights = loaded(base.config(), model, made, "q_proj")
    for place, layer in enumerate([2, 0]):
        assert torch.equal(weights.weights_b[place].T, 2 * made[base.key(layer, "q_proj", "B")])


@pytest.mark.parametrize("rank", [8, 32])
def test_made_by_hand_of_a_tensor_for_each_layer(rank: int) -> None:
    a, b = [torch.randn(5, rank) for _ in range(2)], [torch.randn(rank, 3) for _ in range(2)]
    weights = LoraWeights(a, b, base.config(rank))
    assert torch.equal(weights.weights_a, torch.stack([w.T for w in a] if rank == 32 else a))
    assert torch.equal(weights.weights_b, torch.stack(b))
    assert torch.equal(weights.weights_a_t[1], a[1].T)
    assert torch.equal(weights.weights_b_t[1], b[1].T)
    assert (weights.lora_a_r, weights.lora_b_r, weights.speculative_tokens) == (rank, rank, 0)
    assert weights.adapter_config == base.config(rank)
    stacks = torch.stack(a), torch.stack(b)
    stacked = LoraWeights(*stacks, base.config(rank))
    for stack in stacks:
        stack.zero_()  # the caller's memory is not the weights'
    for name in ("weights_a", "weights_b"):
        assert torch.equal(getattr(stacked, name), getattr(weights, name))
    empty = LoraWeights(stacks[0][:0], stacks[1][:0], base.config(rank))
    assert empty.weights_a.shape == (0, *weights.weights_a.shape[1:])
    flat, one = torch.zeros(8), torch.tensor(1.0)
    for these, those in (([], []), (a, []), ([a[0], a[0].T], b), ([flat], [flat]), (one, one)):
        with pytest.raises(errors.UsageError, match="of every layer"):
            LoraWeights(these, those, base.config())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 256), world=st.integers(1, 8), layer_type=st.sampled_from(base.TYPES))
def test_the_delta_is_the_same_split_over_any_world(rank: int, world: int, layer_type: str) -> None:
    made = base.tensors(rank, types=[layer_type], dtype=torch.float64)
    config = base.config(rank, 2 * rank)
    ours: list[Any] = [LayoutModel(base.layout(), torch.float64, world, n) for n in range(world)]
    theirs = [base.lorax_model(torch.float64, world, n) for n in range(world)]
    try:
        padded = padded_rank(rank, world)
    except IncompatibleAdapterError:
        for model in (ours[0], theirs[0]):
            with pytest.raises(IncompatibleAdapterError):
                load(config, model, made, layer_type)
        return
    parts = [loaded(config, model, made, layer_type) for model in ours]
    for part, model in zip(parts, theirs, strict=True):
        other = loaded(config, model, made, layer_type)
        assert torch.equal(part.weights_a, other.weights_a)
        assert torch.equal(part.weights_b, other.weights_b)
    row, (inputs, outputs) = layer_type in base.ROW_PARALLEL, SHAPES[layer_type]
    x = torch.randn(2, inputs, dtype=torch.float64)
    for layer in base.layers_of(layer_type):
        # Each process has a piece of x, and their products are summed; or it has one of the rank.
        pieces = x.chunk(world, 1) if row else [x] * world
        shrunk = [xs @ part.weights_a_t[layer].T for xs, part in zip(pieces, parts, strict=True)]
        hidden = torch.stack(shrunk).sum(0) if row else torch.cat(shrunk, 1)
        a, b = (made[base.key(layer, layer_type, part)] for part in "AB")
        turned = [part.weights_b_t[layer].T for part in parts]
        for expanding in ([part.weights_b[layer] for part in parts], turned):
            found = torch.cat([hidden @ b_part for b_part in expanding], 1)
            torch.testing.assert_close(found, 2 * x @ a.T @ b.T, rtol=1e-9, atol=1e-9)
    local, features = (padded, inputs // world) if row else (padded // world, inputs)
    for part in parts:
        assert (part.lora_a_r, part.lora_b_r) == (local, padded)
        assert part.adapter_config.padded_rank == padded
        assert part.weights_b.shape[1:] == (padded, outputs // world)
        stored = (local, features) if 16 <= local <= 128 else (features, local)
        assert part.weights_a.shape[1:] == stored


@pytest.mark.parametrize("world_size", [1, 2])
def test_deltas_are_those_of_peft(tmp_path: Path, world_size: int) -> None:
    """A layer of a high rank leaves nothing behind in the next one, and an absent layer is zero."""
    every = [*QKV, *base.GATE_UP, *base.ROW_PARALLEL]
    lora: Any = {"r": 12, "lora_alpha": 30, "target_modules": every}
    lora |= {"rank_pattern": {"k_proj": 4, "layers.0.self_attn.q_proj": 40}}
    lora |= {"alpha_pattern": {"up_proj": 6, "layers.1.self_attn.q_proj": 5}}
    lora |= {"exclude_modules": ["layers.1.self_attn.v_proj"]}
    decoder = llama()
    layout = layouts.from_module(decoder)
    models = [LayoutModel(layout, FLOAT32, world_size, rank) for rank in range(world_size)]
    with wrapped(decoder, lora) as peft_model:
        peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
        named = peft_model.base_model.model.named_modules()
        tuned = {name: module for name, module in named if hasattr(module, "get_delta_weight")}
        deltas = {n: module.get_delta_weight("default").detach() for n, module in tuned.items()}
    config, (first, *_) = LoraConfig.load(tmp_path), models
    assert len(deltas) == 7 * 2
    with WeightsFile.open(tmp_path) as file:
        for layer_type in first.adapter_layers:
            parts = [loaded(config, model, file, layer_type) for model in models]
            split = 1 if first.is_row_parallel(layer_type) else 0  # of A [r, in]
            named = first.target_to_layer.items()
            names = [name for (_, of), (name, _) in named if of == layer_type]
            for layer, name in enumerate(names):
                a = torch.cat([part.weights_a_t[layer] for part in parts], split)
                b = torch.cat([part.weights_b_t[layer] for part in parts], 0)
                expected = deltas.pop(name, torch.zeros(len(b), a.shape[1]))
                torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)
    assert not deltas


def test_a_module_map_of_the_contract(model: Any) -> None:
    config, made = base.config(), base.tensors()
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    assert names == set(made)
    a, b = base.key(0, "lm_head", "A"), base.key(0, "lm_head", "B")
    assert a == "base_model.model.lm_head.lora_A.weight"
    assert module_map["lm_head"]["lora_A"][0] is made[a]
    assert module_map["lm_head"]["lora_B"][0] is made[b]
    assert [key for _, key in module_map["lm_head"].values()] == [a, b]
    names.add("somebody else's")
    config.load_batched_adapter_weights(model, module_map, "q_proj", names, True)
    assert names == {n for n in made if "q_proj" not in n} | {"somebody else's"}
    for layer_type in base.TYPES:
        config.load_batched_adapter_weights(model, module_map, layer_type, names, False)
    assert names == {"somebody else's"}


A, B = base.key(1, "q_proj", "A"), base.key(1, "q_proj", "B")
MODULE = base.module_name(1, "q_proj")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_module_map_has_both_factors(model: Any, factor: str) -> None:
    config, made = base.config(), base.tensors(types=["q_proj"])
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    halved = {other: place for other, place in module_map[MODULE].items() if other != factor}
    with pytest.raises(errors.UsageError, match=f"{MODULE}.* has no {factor} in the module map"):
        LoraWeights.load(config, model, {**module_map, MODULE: halved}, "q_proj", names)


def test_what_does_not_fit_is_refused_and_leaves_the_names(model: Any) -> None:
    refused: list[tuple[Any, Any, str, type[errors.LoraxError], str]] = [
        ((), {A: torch.zeros(8, 839)}, "q_proj", IncompatibleAdapterError, MODULE),
        ((), {B: torch.zeros(841, 8)}, "q_proj", IncompatibleAdapterError, MODULE),
        ((), {B: torch.ones(840, 8).char()}, "q_proj", UnsupportedAdapterError, "B torch.int8"),
        ((8, -1e40), {}, "q_proj", AdapterFormatError, r"q_proj.*-1.25e\+39.*lora_alpha"),
        ((4,), {}, "q_proj", AdapterFormatError, "rank 4, which the config says"),
        ((), {}, "x_proj", errors.UsageError, "no layer.* type 'x_proj'"),
    ]
    for config, changed, layer_type, kind, problem in refused:
        lora, made = base.config(*config), base.tensors() | changed
        module_map, names = lora.map_weights_for_model(made, model.weight_names)
        with pytest.raises(kind, match=problem):
            LoraWeights.load(lora, model, module_map, layer_type, names)
        assert names == set(made)


def test_layers_of_a_type_are_alike_and_on_one_device() -> None:
    for weight, inputs, kind, problem in [
        (torch.zeros(840, 420), 420, IncompatibleAdapterError, "cannot be stacked"),
        (torch.zeros(840, 840, device="meta"), 840, errors.UsageError, "2 devices"),
    ]:
        model = base.lorax_model()
        name, layer = model.target_to_layer[1, "o_proj"]
        linear = base.BaseLayer(linear=Linear(weight=weight))
        other = base.ParallelLayer(base_layer=linear, layer_name="o_proj")
        assert layer.base_layer.linear.weight.shape == (840, 840)
        model.target_to_layer[1, "o_proj"] = name, other
        made = base.tensors(types=["o_proj"]) | base.pair(name, inputs, 840)
        with pytest.raises(kind, match=problem):
            load(base.config(), model, made, "o_proj")


def test_a_model_that_drops_a_remainder_is_found_out() -> None:
    model, made = base.lorax_model(world_size=8), dict[str, Tensor]()
    for layer in range(base.LAYERS):
        name, fused = model.target_to_layer[layer, "q_proj"]
        fused.sizes = [841, *fused.sizes[1:]]
        made |= base.pair(name, 840, 841)
    with pytest.raises(
        IncompatibleAdapterError, match=r"'q_proj': \[64, 105\] is not an even share"
    ):
        load(base.config(), model, made, "q_proj")


def _transposed(*types: str) -> LayoutModel:
    layout = base.layout()
    turned = [(module, module.name.rpartition(".")[2] in types) for module in layout.modules]
    modules = tuple(dataclasses.replace(one, transposed=is_turned) for one, is_turned in turned)
    return LayoutModel(dataclasses.replace(layout, modules=modules), FLOAT32, 1)


def test_fan_in_fan_out_says_how_a_base_is_stored_and_not_the_file() -> None:
    made, said = base.tensors(types=["q_proj", "v_proj"]), base.config(fan_in_fan_out=True)
    plain = loaded(base.config(), MODELS[1], made, "v_proj")
    for config in (base.config(), said):
        turned = loaded(config, _transposed(*SHAPES), made, "v_proj")
        assert torch.equal(plain.weights_a, turned.weights_a)
        assert torch.equal(plain.weights_b, turned.weights_b)
    assert load(said, _transposed("v_proj"), made, "q_proj") is not None
    only_q = base.tensors(types=["q_proj"])
    for model, content in ((MODELS[1], made), (_transposed("v_proj"), only_q)):
        with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out is true"):
            load(said, model, content, "q_proj")


ALL, INTERMEDIATE = HIDDEN + 2 * KEY_VALUE, base.INTERMEDIATE


class _FourBits(Tensor):
    """As bitsandbytes' packed weights, which keep their old shape beside them."""

    class quant_state:
        shape = torch.Size([ALL, HIDDEN])


def _fused(*names: str) -> dict[str, object]:
    return {"layer_names": names, "sizes": [SHAPES[name][1] for name in names]}


INT32, INT8, FLOAT8 = torch.int32, torch.int8, torch.float8_e4m3fn
AWQ = Linear(weight=base.weight(HIDDEN, ALL // 8, INT32), in_features=HIDDEN, out_features=ALL)
GPTQ = Linear(weight=base.weight(HIDDEN // 8, ALL, INT32), infeatures=HIDDEN, outfeatures=ALL)
NF4 = Linear(weight=torch.zeros(9, 1, dtype=torch.uint8).as_subclass(_FourBits))
FP8, EETQ = (Linear(weight=base.weight(HIDDEN, ALL, dtype)) for dtype in (FLOAT8, INT8))
PACKED = Linear(weight=torch.zeros(7, 1, dtype=torch.uint8))


def _linear(inputs: int, outputs: int) -> Any:
    return Linear(weight=base.weight(outputs, inputs))


@pytest.mark.parametrize(
    ("layer_type", "linear", "attributes", "inputs", "outputs"),
    [
        *[
            (name, linear, _fused(*order), HIDDEN, SHAPES[name][1])
            for order in (QKV, QKV[::-1])  # Qwen's second half comes first
            for linear in (_linear(HIDDEN, ALL), AWQ, GPTQ, NF4, FP8)
            for name in QKV
        ],
        ("up_proj", _linear(HIDDEN, 2 * INTERMEDIATE), _fused(*base.GATE_UP), HIDDEN, INTERMEDIATE),
        ("k_proj", EETQ, _fused(*QKV), None, KEY_VALUE),  # which says outputs alone
        # DBRX, Phi-3; GPT-2, Qwen; Phi and Mllama, where LoRAX's size is the input's
        ("Wqkv", _linear(HIDDEN, ALL), {"layer_names": ["Wqkv"], "sizes": None}, HIDDEN, ALL),
        ("c_attn", _linear(HIDDEN, ALL), {"layer_names": ["c_attn"], "sizes": [ALL]}, HIDDEN, ALL),
        ("fc1", _linear(HIDDEN, ALL), {"layer_names": ["fc1"], "sizes": [HIDDEN]}, HIDDEN, ALL),
        ("plain", _linear(HIDDEN, KEY_VALUE), {}, HIDDEN, KEY_VALUE),
        ("o_proj", _linear(HIDDEN, KEY_VALUE), {"layer_name": "o_proj"}, HIDDEN, KEY_VALUE),
        ("fc", PACKED, {}, None, None),  # nobody knows
    ],
)
def test_shapes_decide_by_what_a_layer_says(
    layer_type: str, linear: Any, attributes: Any, inputs: int | None, outputs: int | None
) -> None:
    model, module = base.LoraxModel(), f"model.layers.0.{layer_type}"
    layer = base.ParallelLayer(base_layer=base.BaseLayer(linear=linear), **attributes)
    model.target_to_layer[0, layer_type] = module, layer
    right = inputs or HIDDEN, outputs or 40
    assert load(base.config(), model, base.pair(module, *right), layer_type) is not None
    words = " → ".join(str(size or r"\?") for size in (inputs, outputs))
    for other in ((right[0] // 2, right[1]), (right[0], right[1] - 40), (right[0], 3 * right[1])):
        made = base.pair(module, *other)
        if (inputs in (None, other[0]) and outputs in (None, other[1])) or 0 in other:
            continue
        problem = f"{module}.*{other[0]} → {other[1]} .*the base's maps {words};"
        with pytest.raises(IncompatibleAdapterError, match=problem):
            load(base.config(), model, made, layer_type)


def test_a_layer_fused_of_other_types_and_one_that_may_be_a_share() -> None:
    model = base.lorax_model()
    model.target_to_layer[0, "q_proj"][1].layer_names = ("other", *QKV[1:])
    with pytest.raises(errors.UsageError, match="'q_proj' is fused of other"):
        load(base.config(), model, base.tensors(types=QKV), "q_proj")
    share = base.LoraxModel(world_size=2)
    layer = base.ParallelLayer(base_layer=base.BaseLayer(linear=_linear(7, 7)))
    share.target_to_layer[0, "fc"] = "model.layers.0.fc", layer
    made = base.pair("model.layers.0.fc", 64, 32)
    assert load(base.config(), share, made, "fc") is not None


@pytest.mark.parametrize("vocabulary", [3360, 3361])
def test_a_head_is_split_by_vocabulary_or_not_at_all(vocabulary: int) -> None:
    model = base.lorax_model(FLOAT32, 2, 1, vocabulary)
    right, wrong = (base.pair("lm_head", HIDDEN, size) for size in (vocabulary, 2 * vocabulary))
    if vocabulary == 3360:
        assert loaded(base.config(), model, right, "lm_head").weights_b.shape == (1, 16, 1680)
    else:  # it fits, but LoRAX cannot share it out evenly
        with pytest.raises(IncompatibleAdapterError, match="even share"):
            load(base.config(), model, right, "lm_head")
    with pytest.raises(IncompatibleAdapterError, match=f"{HIDDEN} → {2 * vocabulary} .*{HIDDEN} →"):
        load(base.config(), model, wrong, "lm_head")


@pytest.mark.parametrize("layer_type", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_other_sizes_than_the_parts_are_refused(layer_type: str, world_size: int) -> None:
    own, other = SHAPES[layer_type], base.INTERMEDIATE // 2
    wrong = [(own[0], other), (own[0], 2 * own[1]), (other, own[1]), (2 * own[0], own[1])]
    layers = base.layers_of(layer_type)
    for rank, sizes, some in product(range(world_size), wrong, (layers, layers[-1:])):
        made = base.tensors(types=[layer_type])
        for layer in some:
            made |= base.pair(base.module_name(layer, layer_type), *sizes)
        name, model = base.module_name(some[0], layer_type), base.lorax_model(FLOAT32, world_size)
        model.rank = rank
        problem = f"{name}.*{sizes[0]} → {sizes[1]} .* {own[0]} → {own[1]}"
        with pytest.raises(IncompatibleAdapterError, match=problem):
            load(base.config(), model, made, layer_type)


COLUMN, ROW, REPLICATED = Parallelism.COLUMN, Parallelism.ROW, Parallelism.REPLICATED


def model_of(*modules: Module, layers: int = 1, world_size: int = 1, rank: int = 0) -> LayoutModel:
    return LayoutModel(ModelLayout(modules, layers, "F32"), torch.float32, world_size, rank)


def shared(model: LayoutModel, layer_type: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (part_a,), (part_b,) = model.shard_lora_weights([a], [b], layer_type)
    return part_a, part_b


def numbered(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


def test_types_are_the_last_component() -> None:
    model = LayoutModel(base.layout(), torch.bfloat16, 2, 1)
    assert model.adapter_layers == ["q_proj", "v_proj", "down_proj", "lm_head"]
    assert model.get_num_layers_for_type("q_proj") == 3
    assert model.get_num_layers_for_type("lm_head") == 1
    name, layer = model.target_to_layer[2, "down_proj"]
    assert name == "model.layers.2.mlp.down_proj"
    assert model.target_to_layer[0, "lm_head"][0] == "lm_head"
    assert len(model.target_to_layer) == 10
    weight = layer.base_layer.linear.weight
    assert (weight.shape, weight.dtype) == ((840, 2520), torch.bfloat16)
    assert weight.untyped_storage().nbytes() == 2
    assert (model.dtype, model.world_size, model.rank) == (torch.bfloat16, 2, 1)
    with pytest.raises(errors.UsageError, match="'k_proj'; it has down_proj, lm_head, q_proj, v"):
        model.get_num_layers_for_type("k_proj")


def test_more_components_and_ids_where_the_last_and_a_count_do_not_tell() -> None:
    """GPT-2's two c_proj, under the names that LoRAX gives them; embeddings are not linear."""
    places = product((3, 1), ("attn.c_attn", "attn.c_proj", "mlp.c_proj"))
    modules = [Module(f"h.{n}.{name}", 4, 12, n, COLUMN, transposed=True) for n, name in places]
    embedding = Module("embed_tokens", 100, 4, -1, COLUMN, embedding=True)
    model = model_of(embedding, *modules, layers=4)
    assert sorted(model.adapter_layers) == ["attn.c_proj", "c_attn", "mlp.c_proj"]
    name, layer = model.target_to_layer[1, "mlp.c_proj"]
    assert (name, layer.base_layer.linear.weight.shape) == ("h.1.mlp.c_proj", (4, 12))
    assert model.get_num_layers_for_type("attn.c_proj") == [1, 3]
    assert set(model.weight_names) == {module.name for module in modules}


def test_what_is_no_model_is_refused() -> None:
    for rank, world_size in ((2, 2), (-1, 2), (0, 0), (True, 2), (0, 1.0)):
        with pytest.raises(errors.ConfigError, match=r"rank|world size"):
            LayoutModel(base.layout(), torch.float32, world_size, rank)  # type: ignore[arg-type]
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(errors.ConfigError, match="floating point"):
            LayoutModel(base.layout(), dtype, 1)  # type: ignore[arg-type]
    modules = [Module("a.0.q", 4, 4, 0, COLUMN), Module("a.1.q", 4, 4, 1, ROW)]
    with pytest.raises(errors.ConfigError, match="'q'"):
        model_of(*modules, layers=2)


def test_replicated_modules_are_whole_everywhere() -> None:
    modules = [Module(f"l.{n}.gate", 6, 10, n, REPLICATED) for n in range(2)]
    model = model_of(*modules, layers=2, world_size=4, rank=3)
    a, b = numbered(6, 8), numbered(8, 10)
    assert shared(model, "gate", a, b) == (a, b)
    made = {k: t for n in range(2) for k, t in base.pair(f"l.{n}.gate", 6, 10, seed=n).items()}
    weights = base.loaded(base.config(8, 8), model, made, "gate")
    assert weights.weights_a_t.shape == (2, 32, 6)
    b_of_second = made["base_model.model.l.1.gate.lora_B.weight"]
    assert torch.equal(weights.weights_b_t[1, :, :8], b_of_second)


THIRDS = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
HEADS = [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]


def test_fused_modules_are_shared_part_by_part() -> None:
    for layer_type, parts, got in [
        ("c_attn", (FusedPart(4), FusedPart(4), FusedPart(4)), THIRDS),  # Qwen's
        # Phi-3's: 4 heads and 2 of keys and values, of 2 features each; and two halves
        ("qkv_proj", (FusedPart(8, 2), FusedPart(4, 2), FusedPart(4, 2)), HEADS),
        ("gate_up_proj", (FusedPart(4), FusedPart(4)), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ]:
        out, world = sum(part.size for part in parts), len(got)
        module = Module(f"l.0.{layer_type}", 16, out, 0, COLUMN, parts=parts)
        for place in range(world):
            model = model_of(module, world_size=world, rank=place)
            b = torch.arange(out).float().expand(8, out)
            _, part = shared(model, layer_type, torch.zeros(16, 8), b)
            assert part.tolist() == [got[place]] * 8


def q(inputs: int, outputs: int, cut: Parallelism = COLUMN, *parts: FusedPart) -> Module:
    return Module("l.0.q", inputs, outputs, 0, cut, parts=parts)


def test_sizes_that_do_not_divide_are_refused() -> None:
    """LoRAX drops the remainder, and with it features that the adapter changes."""
    for module, out, what in [
        (q(16, 10), 10, "B of q: 10 cannot"),
        (q(16, 8, COLUMN, FusedPart(4, 2), FusedPart(4)), 8, "B of q: 4 in units of 2"),
        (q(10, 8, ROW), 8, "A of q: 10 cannot"),
        (q(16, 10, ROW), 10, "B of q: 10 cannot"),
        (q(16, 8, COLUMN, FusedPart(4), FusedPart(4)), 6, "has 6 output features, and its parts 8"),
    ]:
        model = model_of(module, world_size=4)
        with pytest.raises(IncompatibleAdapterError, match=what):
            shared(model, "q", torch.zeros(module.in_features, 32), torch.zeros(32, out))
