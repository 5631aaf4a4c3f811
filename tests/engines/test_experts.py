"""Adapters of experts and routers, beside what PEFT computes with each alone."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import event_loops
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion as conversions
from peft_adapters import WEIGHTS, logits_of, prompt, serving
from safetensors.torch import load_file, save_file

from lorax_async import layouts
from lorax_async.config import LoaderConfig, Shard
from lorax_async.engines.plugin_settings import BaseRequirements, fused_width
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    UsageError,
)
from lorax_async.loader import AdapterLoader
from lorax_async.planning.model_families import decoder_layout

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(did not match any|no module was|explicitly set RoPE)"
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
QWEN = SIZES | {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MIX = SIZES | {"num_local_experts": 4}
FULL = {"layer_types": ["full_attention"] * 2}
BASES: dict[str, tuple[Any, Any, Any]] = {
    "qwen2_moe": (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        QWEN | {"shared_expert_intermediate_size": 20},
    ),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, QWEN | {"head_dim": 8}),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, MIX),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig, SIZES | {"num_experts": 4}),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig, MIX | FULL | {"head_dim": 8}),
}
FROM_CONFIG = tuple(BASES)
SHARED = QWEN | {"head_dim": 8, "shared_expert_intermediate_size": 20}
GROUPED = SHARED | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
COMPRESSED = {f"{it}_rank": 8 for it in ("kv_lora", "q_lora")}
COMPRESSED |= {f"{it}_head_dim": 8 for it in ("qk_rope", "qk_nope", "v")}
RECURRENT = {f"linear_{it}_head_dim": 8 for it in ("key", "value")}
RECURRENT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
BASES |= {
    "deepseek_v3": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        GROUPED | COMPRESSED | {"num_key_value_heads": 4},
    ),
    "llama4": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        MIX | {"head_dim": 8, "intermediate_size_mlp": 24, "num_experts_per_tok": 1},
    ),
    "phimoe": (hf.PhimoeForCausalLM, hf.PhimoeConfig, MIX),
    "qwen3_5_moe": (
        hf.Qwen3_5MoeForCausalLM,
        hf.Qwen3_5MoeTextConfig,
        SHARED | RECURRENT | {"num_hidden_layers": 4},
    ),
}


def base(kind: str, **other: Any) -> Any:
    """The same weights each time, large enough for experts to matter."""
    model, config, sizes = BASES[kind]
    made = model(config(**sizes | other)).eval()
    random = torch.Generator().manual_seed(len(kind))
    for weight in made.parameters():
        weight.data.normal_(0, 0.2, generator=random)
    return made


FUSED = ["experts.gate_up_proj", "experts.down_proj"]
BIASES = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]


def save(kind: str, folder: Path, parameters: list[str], **other: Any) -> Path:
    lora: Any = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} | other
    peft: Any = get_peft_model(base(kind), LoraConfig(**lora, target_parameters=parameters))
    random = torch.Generator().manual_seed(len(parameters))
    for name, weight in peft.named_parameters():
        if ".lora_" in name:
            weight.data.normal_(0, 0.2, generator=random)
    peft.save_pretrained(folder)
    return folder


def pefts(kind: str, folder: Path, inputs: Any, **other: Any) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(base(kind, **other), folder).eval(), inputs)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """PEFT adds the delta to the weights first, so that the last bits differ."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-6 * size, rtol=0)


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "experts": ("qwen3_moe", FUSED, {}),
    "one of two": ("qwen3_moe", FUSED[1:], {"target_modules": []}),
    "the other": ("olmoe", FUSED[:1], {"use_rslora": True}),
    "router": ("qwen3_moe", ["mlp.gate.weight"], {"target_modules": []}),
    "both": ("mixtral", [*FUSED, "gate.weight"], {"rank_pattern": {"experts.down_proj": 2}}),
    "alphas": ("olmoe", [*FUSED, "gate.weight"], {"alpha_pattern": {"gate.weight": 9}}),
    "with biases": ("gpt_oss", [*FUSED, *BIASES], {}),
    "router beside": ("gpt_oss", [*FUSED, "router.weight"], {}),
    "one bias": ("gpt_oss", BIASES[1:], {"target_modules": []}),
    "shared expert": ("qwen2_moe", FUSED, {"target_modules": "all-linear"}),
    "compressed": ("deepseek_v3", [*FUSED, "gate.weight"], {"target_modules": "all-linear"}),
    "slabs": ("llama4", FUSED, {"target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "one slab": ("llama4", [FUSED[0], "router.weight"], {}),
    "linear router": ("phimoe", [*FUSED, "router.weight"], {}),
    "untouched router": ("phimoe", FUSED, {}),
    "recurrent": ("qwen3_5_moe", [*FUSED, "mlp.gate.weight"], {"target_modules": "all-linear"}),
    "linear's weight": ("qwen3_moe", ["k_proj.weight"], {"alpha_pattern": {"k_proj.weight": 5}}),
}


@pytest.mark.parametrize("case", CASES)
async def test_each_row_is_pefts(case: str, tmp_path: Path) -> None:
    """Alone, in a mixed batch, and the base beside it; once more after an eviction."""
    kind, parameters, lora = CASES[case]
    folder = save(kind, tmp_path / "adapter", parameters, **lora)
    inputs, model = prompt(3), base(kind)
    expected, plain = pefts(kind, folder, inputs), logits_of(base(kind), inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    async with serving(model) as (loader, attached):
        for _ in range(2):
            with await loader.load(folder) as handle:
                with attached.batch([handle] * 3):
                    close(await asyncio.to_thread(logits_of, model, inputs), expected)
                with attached.batch([handle, None, handle]):
                    mixed = await asyncio.to_thread(logits_of, model, inputs)
            close(mixed[[0, 2]], expected[[0, 2]])
            close(mixed[1:2], plain[1:2])
            await loader.unload(folder)
        with attached.batch(None):
            torch.testing.assert_close(logits_of(model, inputs), plain, atol=0, rtol=0)


@pytest.mark.parametrize("loop", event_loops.LOOPS)
def test_two_adapters_and_a_plain_one_in_a_stream(loop: str, tmp_path: Path) -> None:
    kind = "qwen3_moe"
    folders = [
        save(kind, tmp_path / "experts", FUSED),
        save(kind, tmp_path / "router", ["gate.weight", "experts.down_proj"]),
        save(kind, tmp_path / "plain", [], target_modules=["v_proj", "o_proj"]),
    ]
    inputs, model = prompt(5), base(kind)

    async def mixed() -> torch.Tensor:
        async with serving(model) as (loader, attached):
            handles = [loader.stream(folder) for folder in folders]
            async with handles[0] as a, handles[1] as b, handles[2] as c:
                with attached.batch([a, b, c, None, a]):
                    return await asyncio.to_thread(logits_of, model, inputs)

    with asyncio.Runner(loop_factory=event_loops.LOOPS[loop]) as runner:
        logits = runner.run(mixed())
    for row, folder in enumerate([*folders, None, folders[0]]):
        part = {"input_ids": inputs["input_ids"][row : row + 1]}
        own = logits_of(base(kind), part) if folder is None else pefts(kind, folder, part)
        close(logits[row : row + 1], own)


async def test_generation_is_pefts(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "adapter", [*FUSED, "gate.weight"])
    more: Any = {"max_new_tokens": 8, "do_sample": False}
    inputs, model = prompt(2), base("mixtral")
    peft: Any = PeftModel.from_pretrained(base("mixtral"), folder).eval()
    async with serving(model) as (loader, attached), await loader.load(folder) as handle:
        with attached.batch([handle, handle]):
            found = await asyncio.to_thread(model.generate, **inputs, **more)
    assert found.tolist() == peft.generate(**inputs, **more).tolist()


async def test_the_sums_are_those_of_float64(tmp_path: Path) -> None:
    """`handle.modules` has each expert's factors, of which the file's are the source."""
    folder = save("qwen3_moe", tmp_path / "adapter", FUSED)
    tensors = load_file(folder / WEIGHTS)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    a = tensors[f"{prefix}.base_layer.lora_A.weight"].double().view(4, 3, 32)
    b = tensors[f"{prefix}.base_layer.lora_B.weight"].double().view(48, 3, 4)
    async with serving(base("qwen3_moe")) as (loader, _), await loader.load(folder) as handle:
        weights = handle.modules["model.layers.1.mlp.experts.gate_up_proj"]
        assert handle.rank == 3
        for expert in range(4):
            own = weights.expert(expert)  # type: ignore[attr-defined]
            assert own.scale == 2.0
            torch.testing.assert_close(own.a.double(), a[expert], atol=0, rtol=0)
            torch.testing.assert_close(own.b.double(), b[:, :, expert], atol=0, rtol=0)
        with pytest.raises(UsageError, match="bare parameter"):
            _ = weights.a


def rewritten(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any
) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: it.contiguous() for name, it in tensors.items()}, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def swap(tensors: dict[str, torch.Tensor]) -> None:
    """In and out of experts as PEFT 0.18 had them: A holds Bᵀ, B holds Aᵀ."""
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].view(4, 3, -1), tensors[other].view(-1, 3, 4)
        tensors[name] = b.permute(2, 1, 0).reshape(12, -1)
        tensors[other] = a.permute(2, 1, 0).reshape(-1, 12)


async def test_the_axes_of_peft_018(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "adapter", FUSED)
    inputs, model = prompt(2), base("qwen3_moe")
    expected = pefts("qwen3_moe", folder, inputs)
    rewritten(folder, swap)
    async with serving(model) as (loader, attached), await loader.load(folder) as handle:
        with attached.batch([handle, handle]):
            close(await asyncio.to_thread(logits_of, model, inputs), expected)


async def test_axes_that_no_shape_tells_are_refused(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 16}
    peft: Any = get_peft_model(
        base("qwen3_moe", **sizes),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=FUSED[:1]),
    )
    peft.save_pretrained(tmp_path)
    async with serving(base("qwen3_moe", **sizes)) as (loader, _):
        with pytest.raises(UnsupportedAdapterError, match="as many inputs as outputs"):
            await loader.load(tmp_path)


NAMES = {"qwen3_moe": "mlp.experts {}.gate_proj {}.up_proj {}.down_proj mlp.gate"}
NAMES |= dict.fromkeys(("olmoe", "qwen2_moe"), NAMES["qwen3_moe"])
NAMES["mixtral"] = "block_sparse_moe.experts {}.w1 {}.w3 {}.w2 block_sparse_moe.gate"


def save_old(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter of transformers 4: a module for each expert, with random weights."""
    experts, *projections, gate = NAMES[kind].split()
    tensors: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(7)
    for layer in range(2):
        sizes = {"self_attn.q_proj": (32, 32), gate: (32, 4)}
        for expert in range(4):
            for projection, size in zip(projections, [(32, 24), (32, 24), (24, 32)], strict=True):
                sizes[f"{experts}.{projection.format(expert)}"] = size
        for name, (inputs, outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for factor, shape in {"A": (3, inputs), "B": (outputs, 3)}.items():
                values = torch.empty(shape).normal_(0, 0.2, generator=random)
                tensors[f"{path}.lora_{factor}.weight"] = values.to(dtype)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    targets = ["q_proj", "gate", *(it.partition(".")[2] for it in projections)]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6}
    text = json.dumps(settings | {"target_modules": targets} | config)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", NAMES)
async def test_the_files_of_transformers_4(
    kind: str, rslora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT converts the files of bases that are like Qwen2-MoE, and has forgotten this one.
    patterns = vars(conversions)["_MODEL_TO_CONVERSION_PATTERN"]
    monkeypatch.setitem(patterns, "qwen2_moe", "qwen2_moe")
    folder = save_old(kind, tmp_path / "adapter", use_rslora=rslora)
    inputs, model = prompt(3), base(kind)
    expected = pefts(kind, folder, inputs)
    async with serving(model) as (loader, attached), await loader.load(folder) as handle:
        with attached.batch([handle, None, handle]):
            found = await asyncio.to_thread(logits_of, model, inputs)
    close(found[[0, 2]], expected[[0, 2]])
    close(found[1:2], logits_of(base(kind), inputs)[1:2])


async def test_experts_of_another_dtype_are_cast(tmp_path: Path) -> None:
    folder = save_old("qwen3_moe", tmp_path / "adapter", torch.bfloat16)
    inputs, model = prompt(2), base("qwen3_moe")
    expected = pefts("qwen3_moe", folder, inputs)
    async with serving(model) as (loader, attached), await loader.load(folder) as handle:
        with attached.batch([handle, handle]):
            close(await asyncio.to_thread(logits_of, model, inputs), expected)


def drop(*words: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if all(word in name for word in words)]:
            del tensors[name]

    return change


def keep(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "experts.lora_A" in name]:
        tensors[name] = torch.ones(12, 25)


@pytest.mark.parametrize(
    ("change", "config", "error", "words"),
    [
        (drop("experts.lora_"), {}, AdapterFormatError, "targets 2 parameters .* tensors for 1"),
        (drop("experts.lora_A"), {}, AdapterFormatError, "has no A"),
        (widen, {}, IncompatibleAdapterError, r"experts.down_proj \(A \[12, 25\]"),
        (keep, {"target_parameters": FUSED[1:]}, AdapterFormatError, "targets 1 parameters"),
        (keep, {"rank_pattern": {"down_proj": 2}}, IncompatibleAdapterError, "wrong shapes"),
        (keep, {"lora_dropout": 0.1}, UnsupportedAdapterError, "with lora_dropout"),
        (keep, {"use_dora": True}, UnsupportedAdapterError, "with use_dora"),
        (keep, {"target_parameters": "x"}, AdapterFormatError, "a list of strings"),
    ],
)
async def test_what_peft_would_not_apply_is_refused(
    change: Any, config: Any, error: Any, words: str, tmp_path: Path
) -> None:
    folder = save("qwen3_moe", tmp_path / "adapter", FUSED, target_modules=["q_proj"])
    rewritten(folder, change, **config)
    async with serving(base("qwen3_moe")) as (loader, _):
        with pytest.raises(error, match=words):
            await loader.load(folder)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (drop("experts.3.", "up_proj"), {}, "not all of A and B of 4 experts"),
        (drop("up_proj"), {}, "gate_proj with up_proj"),
        (keep, {"rank_pattern": {"q_proj": 3}}, "does not convert"),
    ],
)
async def test_old_files_that_peft_does_not_convert_are_refused(
    change: Any, config: Any, words: str, tmp_path: Path
) -> None:
    folder = save_old("qwen3_moe", tmp_path / "adapter")
    rewritten(folder, change, **config)
    async with serving(base("qwen3_moe")) as (loader, _):
        with pytest.raises(UnsupportedAdapterError, match=words):
            await loader.load(folder)


async def test_a_base_without_experts_says_so(small: Any, tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "adapter", FUSED)
    async with serving(small) as (loader, _):
        with pytest.raises(IncompatibleAdapterError, match="no such module"):
            await loader.load(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_layout_of_the_adapter_alone(case: str, tmp_path: Path) -> None:
    kind, parameters, lora = CASES[case]
    folder = save(kind, tmp_path / "adapter", parameters, **lora)
    layout = layouts.from_adapter(folder)
    known = {it.name for it in layouts.from_module(base(kind)).parameters}
    assert {it.name for it in layout.parameters} <= known
    assert layout.parameters or parameters == ["k_proj.weight"] or "gate" in parameters[0]


@pytest.mark.parametrize("kind", FROM_CONFIG)
def test_a_config_tells_the_experts(kind: str, tmp_path: Path) -> None:
    """Without the model: from the keys of its config."""
    config = BASES[kind][1](**BASES[kind][2], dtype="float32")
    config.save_pretrained(tmp_path)
    found = decoder_layout(json.loads((tmp_path / "config.json").read_text()))
    assert found is not None
    built = layouts.from_module(base(kind))
    assert set(found.parameters) == set(built.parameters)
    for path in {it.module for it in built.parameters}:
        order = [[it.at(n).name for n in it.parameters_of(path)] for it in (found, built)]
        assert order[0] == order[1]


@pytest.mark.parametrize(
    ("kind", "parameters", "change", "words"),
    [
        ("gpt_oss", FUSED, keep, None),
        ("qwen3_moe", [*FUSED, "mlp.gate.weight"], keep, None),
        ("gpt_oss", FUSED + BIASES[:1], keep, "down_proj, gate_up_proj, gate_up_proj_bias of"),
        ("gpt_oss", FUSED[:1] + BIASES[:1], keep, "gate_up_proj, gate_up_proj_bias of"),
        ("gpt_oss", FUSED[:1], keep, "it changes gate_up_proj of"),
        ("gpt_oss", FUSED[1:], keep, "it changes down_proj of"),
        ("qwen3_moe", FUSED, swap, "take 48 features and give 24, and the base's 32"),
    ],
)
def test_vllm_gets_the_fused_experts_that_it_applies(
    kind: str, parameters: list[str], change: Any, words: str | None, tmp_path: Path
) -> None:
    folder = save(kind, tmp_path / "adapter", parameters)
    rewritten(folder, change)
    with pytest.raises(UnsupportedAdapterError, match=r"target_parameters.*vLLM does not apply"):
        BaseRequirements(None, None, engine="vLLM").check(folder)
    check = BaseRequirements(None, None, engine="vLLM", fused_width=32).check
    if words is None:
        assert check(folder) > 0
    else:
        with pytest.raises((UnsupportedAdapterError, IncompatibleAdapterError), match=words):
            check(folder)


def test_a_module_for_each_expert_is_vllms_to_judge(tmp_path: Path) -> None:
    folder = save_old("qwen3_moe", tmp_path / "adapter")
    assert BaseRequirements(None, None, engine="vLLM").check(folder) > 0


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (hf.GptOssConfig(hidden_size=96), 96),
        (hf.Qwen3VLMoeConfig(text_config={"hidden_size": 96}), 96),
        (hf.Qwen3_5MoeConfig(text_config={"hidden_size": 96}), 96),
        (hf.Qwen3OmniMoeConfig(thinker_config={"text_config": {"hidden_size": 96}}), 96),
        (hf.Qwen3MoeConfig(hidden_size=96), None),
        (hf.MixtralConfig(hidden_size=96), None),
    ],
    ids=lambda it: getattr(it, "model_type", None),
)
def test_bases_whose_fused_experts_vllm_adapts(config: Any, width: int | None) -> None:
    assert fused_width(config.to_dict()) == width


async def test_a_shard_refuses_experts(tmp_path: Path) -> None:

    folder = save("qwen3_moe", tmp_path / "adapter", FUSED)
    layout = layouts.from_module(base("qwen3_moe"))
    async with AdapterLoader(layout, LoaderConfig(shard=Shard(0, 2))) as loader:
        with pytest.raises(UnsupportedAdapterError, match="bare parameter"):
            await loader.load(folder)
