"""Layouts of real model classes and of adapters that PEFT saved; heads and fused outputs."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lorax_async import AdapterNotFoundError, ConfigError, Limits, Shard, layouts
from lorax_async.errors import AdapterFormatError as Malformed
from lorax_async.errors import UnsupportedAdapterError as Unsupported
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.sharding import ModuleCut, Sharding, shard_layout

SHARED: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4}
NEOX_SIZES = SHARED | {"intermediate_size": 40}
QWEN = NEOX_SIZES | {"num_key_value_heads": 2}
LLAMA = QWEN | {"head_dim": 8}
COLUMN, ROW = Parallelism.COLUMN, Parallelism.ROW
MODEL: Any = transformers.AutoModelForCausalLM


def llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**LLAMA | changes)


def gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16)


def by_hand_llama() -> list[Module]:
    """From the published shapes of the architecture: out × in of each weight, heads of 8."""
    shared = FusedPart(16, 8, replicable=True)
    layer: list[Any] = [
        ("self_attn.q_proj", 32, 32, COLUMN, FusedPart(32, 8)),
        ("self_attn.k_proj", 32, 16, COLUMN, shared),
        ("self_attn.v_proj", 32, 16, COLUMN, shared),
        ("self_attn.o_proj", 32, 32, ROW),
        ("mlp.gate_proj", 32, 40, COLUMN),
        ("mlp.up_proj", 32, 40, COLUMN),
        ("mlp.down_proj", 40, 32, ROW),
    ]
    modules = [
        Module(f"model.layers.{n}.{name}", inputs, outputs, n, kind, parts=tuple(parts))
        for n in range(3)
        for name, inputs, outputs, kind, *parts in layer
    ]
    tokens = Module("model.embed_tokens", 48, 32, -1, Parallelism.REPLICATED, embedding=True)
    return [tokens, *modules, Module("lm_head", 32, 48, 3, COLUMN)]


def test_a_llama_in_memory() -> None:
    layout = layouts.from_module(transformers.LlamaForCausalLM(llama()))
    assert layout == ModelLayout(tuple(by_hand_llama()), 3, "F32", "model.")
    bare = layouts.from_module(transformers.LlamaModel(llama()))
    assert bare.backbone_prefix == ""
    assert [m.name for m in bare.modules[:2]] == ["embed_tokens", "layers.0.self_attn.q_proj"]


def test_a_gpt2_stores_its_weights_the_other_way_round() -> None:
    layout = layouts.from_module(transformers.GPT2LMHeadModel(gpt2()))
    assert layout.backbone_prefix == "transformer."
    thirds = FusedPart(32, 8), FusedPart(32, 8, True), FusedPart(32, 8, True)
    layer: list[Any] = [("attn.c_attn", 32, 96, COLUMN, thirds), ("attn.c_proj", 32, 32, ROW, ())]
    layer += [("mlp.c_fc", 32, 128, COLUMN, ()), ("mlp.c_proj", 128, 32, ROW, ())]
    first = [
        Module(f"transformer.{name}", size, 32, -1, Parallelism.REPLICATED, embedding=True)
        for name, size in (("wte", 48), ("wpe", 16))
    ]
    for name, inputs, outputs, kind, parts in layer:
        path = f"transformer.h.0.{name}"
        first += [Module(path, inputs, outputs, 0, kind, transposed=True, parts=parts)]
    assert list(layout.modules[:6]) == first
    assert layout.modules[-1] == Module("lm_head", 32, 48, 2, COLUMN)


def built(folder: Path) -> ModelLayout:
    """The layout of transformers' own model of a config."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return layouts.from_module(MODEL.from_config(config), config.dtype)


# No family, two that leave open how many heads there are, and layers that are not those of a family.
OPT = partial(transformers.OPTConfig, **SHARED, ffn_dim=40)
BIGCODE_TINY = partial(transformers.GPTBigCodeConfig, vocab_size=48, n_embd=32, n_layer=2, n_head=4)
MOE = partial(transformers.Qwen3MoeConfig, **QWEN, num_experts=4, moe_intermediate_size=8)
UNCLEAR = (
    *(BIGCODE_TINY, partial(llama, num_heads=8), partial(llama, num_key_value_heads=3)),
    *(partial(MOE, mlp_only_layers=[1]), partial(MOE, decoder_sparse_step=2)),
    partial(OPT, word_embed_proj_dim=16),
    partial(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True),
)


@pytest.mark.parametrize("make", UNCLEAR)
def test_a_folder_with_nothing_but_a_config(make: Callable[[], Any], tmp_path: Path) -> None:
    """No thread has another default dtype meanwhile."""
    config = make()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    seen = set()
    hook = register_module_module_registration_hook(lambda *_: seen.add(torch.get_default_dtype()))
    layout = layouts.from_pretrained(tmp_path)
    hook.remove()
    assert layout == built(tmp_path)
    assert (layout.dtype, seen) == ("BF16", {torch.float32})
    assert layouts.from_pretrained(str(tmp_path), torch.float16).dtype == "F16"


KNOWN = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("granite", "olmo", "olmo2", "olmo3", "smollm3", "cohere", "cohere2", "glm", "glm4"),
    *("starcoder2", "ernie4_5", "exaone4", "seed_oss"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss"),
)
FUSED_OR_OLD = ("gpt2", "gpt_neox", "bloom", "falcon", "opt")
PROGRAM = """
import json, pathlib, sys, torch
from lorax_async import layouts
layouts.from_module(torch.nn.Sequential(torch.nn.Linear(2, 2)))
folders = pathlib.Path(sys.argv[1]).iterdir()
found = {folder.name: layouts.from_pretrained(folder).fingerprint for folder in folders}
print(json.dumps([found, [name for name in sys.modules if name.startswith("transformers")]]))
"""


def write_configs(folder: Path, model_type: str) -> None:
    """Configs of one type: with few keys, with many, and as transformers saves them."""
    sizes = {"vocab_size": 52, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 40}
    few: dict[str, Any] = sizes | {"num_attention_heads": 64, "pad_token_id": 0}
    few |= {"model_type": model_type, "torch_dtype": "float16"}
    few |= {"ffn_dim": 44, "num_experts": 3, "shared_expert_intermediate_size": 36}
    few |= {"max_position_embeddings": 96}
    heads: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 6, "dtype": "bfloat16"}
    if model_type in FUSED_OR_OLD:
        heads = {"word_embed_proj_dim": 128, "n_inner": 28, "ffn_hidden_size": 24}
        if model_type == "falcon":
            heads |= {"num_kv_heads": 8, "new_decoder_architecture": True}
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    remote = {"auto_map": {"AutoConfig": "configuration.Config"}}
    tied = {"tie_word_embeddings": model_type < "llama"}
    for name, config in (("few", few), ("many", few | heads | awq | remote | tied)):
        (folder / f"{model_type}, {name}").mkdir()
        (folder / f"{model_type}, {name}" / "config.json").write_text(json.dumps(config))
    saved = transformers.AutoConfig.from_pretrained(folder / f"{model_type}, few")
    saved.save_pretrained(folder / f"{model_type}, saved")


@pytest.mark.slow
def test_the_layouts_of_common_decoders_need_no_transformers(tmp_path: Path) -> None:
    for model_type in KNOWN + FUSED_OR_OLD:
        write_configs(tmp_path, model_type)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    expected = {folder.name: built(folder).fingerprint for folder in tmp_path.iterdir()}
    assert json.loads(done.stdout) == [expected, []]


def test_what_is_no_causal_model_is_built_as_its_author_saved_it(tmp_path: Path) -> None:
    sizes: Any = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2}
    config = transformers.T5Config(**sizes, num_heads=4, dtype="bfloat16")
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    layout = layouts.from_pretrained(tmp_path)
    assert layout.num_layers == 2
    assert layout.modules[layout.index("decoder.block.1.layer.1.EncDecAttention.q")].layer == 1
    assert layout.modules[layout.index("decoder.block.1.layer.2.DenseReluDense.wo")].parallel == ROW


TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 40, "vocab_size": 48}
SPEECH: dict[str, Any] = {"d_model": 32, "vocab_size": 64, "num_mel_bins": 8, "pad_token_id": 0}
for _side in ("encoder", "decoder"):
    SPEECH |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 40}


@pytest.mark.parametrize(
    ("model_type", "architecture", "sizes", "expected"),
    [
        ("whisper", "WhisperForConditionalGeneration", SPEECH, None),
        ("bart", "BartForConditionalGeneration", SPEECH, None),
        ("marian", "MarianMTModel", SPEECH, None),
        ("bert", "BertForSequenceClassification", TINY, None),
        ("llama", "LlamaForSequenceClassification", TINY, None),
        # Adapters of the bare backbone fit the class with a head too.
        ("llama", "LlamaModel", TINY, "LlamaForCausalLM"),
        ("mpnet", "MPNetModel", TINY, "MPNetModel"),
        ("qwen2", "TheirOwnQwen", TINY, "Qwen2ForCausalLM"),
    ],
)
def test_a_base_is_built_as_the_class_that_it_was_saved_by(
    model_type: str, architecture: str, sizes: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, expected or architecture)(config)
    assert layouts.from_pretrained(tmp_path, "float32") == layouts.from_module(model)


TEXT = TINY | {"num_key_value_heads": 2, "head_dim": 8, "dtype": "float32"}
EYE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("model_type", "text_type", "architecture", "own"),
    [
        ("gemma3", "gemma3_text", "Gemma3ForConditionalGeneration", "model.language_model.layers"),
        ("llava", "llama", "LlavaForConditionalGeneration", "model.language_model.layers"),
        ("mistral3", "mistral", "Mistral3ForConditionalGeneration", "model.language_model.layers"),
        ("llama4", "llama4_text", "Llama4ForConditionalGeneration", "language_model.model.layers"),
    ],
)
def test_an_adapter_of_the_text_class_fits_a_base_of_text_and_images(
    model_type: str, text_type: str, architecture: str, own: str, tmp_path: Path
) -> None:
    text = {"model_type": text_type, **TEXT}
    if model_type == "llama4":
        text |= {"intermediate_size_mlp": 40, "num_local_experts": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, text_config=text)
    for name, value in EYE.items():
        setattr(config.vision_config, name, value)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    layout = layouts.from_pretrained(tmp_path, "float32")
    trained = layouts.from_module(MODEL.from_config(config.text_config))
    for module in trained.modules:
        found = layout.resolve(module.name)
        assert found is not None, module.name
        same = layout.modules[found]
        assert (same.in_features, same.out_features) == (module.in_features, module.out_features)
    assert layout.resolve("model.layers.1.self_attn.q_proj") == layout.index(
        f"{own}.1.self_attn.q_proj"
    )


def test_folders_that_are_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks on the terminal"))
    with pytest.raises(ConfigError, match="no config.json"):
        layouts.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    wrong = ("{", "{}", '{"model_type": "no such"}', '{"model_type": "t5", "dtype": "bfloat16"}')
    no_model = '{"model_type": "vit", "architectures": ["TextStreamer"], "dtype": "float32"}'
    odd: Any = ({"hidden_size": 33}, {"vocab_size": "48"}, {"num_hidden_layers": True})
    odd += ({"text_config": {"hidden_size": 64}}, {"model_type": "gemma", "head_dim": None})
    odd = (json.dumps(LLAMA | {"model_type": "llama"} | changes) for changes in odd)
    foreign = '{"model_type": "their own", "auto_map": {"AutoConfig": "theirs.Config"}}'
    for model_type, key in (
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("mpt", "n_layers"),
    ):
        config.write_text(json.dumps(LLAMA | {"model_type": model_type, key: 10**9}))
        with pytest.raises(ConfigError, match="4,096 is the limit"):
            layouts.from_pretrained(tmp_path)
    for text in (*wrong, *odd, no_model, foreign):
        config.write_text(text)
        with pytest.raises(ConfigError, match="transformers cannot build"):
            layouts.from_pretrained(tmp_path)
    config.write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    with pytest.raises(ConfigError, match="1,000,000,000 layers"):
        layouts.from_pretrained(tmp_path)


def test_a_dtype_is_never_guessed(tmp_path: Path) -> None:
    config = json.loads(llama().to_json_string())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has no dtype"):
        layouts.from_pretrained(tmp_path)
    assert layouts.from_pretrained(tmp_path, "bfloat16").dtype == "BF16"
    for wrong in ("float64", "BF16", torch.int8):
        with pytest.raises(ConfigError, match="is not supported for adapters"):
            layouts.from_pretrained(tmp_path, wrong)


class Projected(nn.Module):
    """A module before the layers, one within that no table knows, one after; an embedding.

    An embedding is used first, wherever the class lists it; one that changes its weights is none.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.projector = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"router": nn.Linear(8, 2)})])
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3, dtype=torch.float64)
        self.tokens = nn.Embedding(16, 8, **options)


def test_modules_outside_the_layers() -> None:
    plain, changing = Projected(), Projected(max_norm=1.0)
    found = {(m.name, m.layer, m.parallel.value) for m in layouts.from_module(changing).modules}
    assert found == {
        ("projector", -1, "replicated"),
        ("layers.0.router", 0, "replicated"),
        ("score", 1, "replicated"),
    }
    assert layouts.from_module(plain).dtype == "F32"
    assert embeddings_of(plain) == ["tokens"]


def test_models_that_no_adapter_is_for() -> None:
    for model in (nn.Sequential(), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="no linear modules"):
            layouts.from_module(model)
    base: Any = transformers.LlamaForCausalLM(llama())
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an attached adapter"):
        layouts.from_module(adapted)


def save_adapter(folder: Path, **config: Any) -> Path:
    model: Any = get_peft_model(transformers.LlamaForCausalLM(llama()), LoraConfig(**config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_an_adapter_by_peft(tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"]
    save_adapter(tmp_path, r=4, target_modules=targets, rank_pattern={"down_proj": 2})
    layout = layouts.from_adapter(tmp_path)
    wanted = [m for m in by_hand_llama() if m.name.endswith(("q_proj", "down_proj"))]
    wanted = [replace(m, parts=()) for m in wanted]  # it does not say of how many heads
    assert set(layout.modules) == set(wanted)
    assert (layout.num_layers, layout.dtype, layout.backbone_prefix) == (3, "F32", "")
    assert layouts.from_adapter(str(tmp_path)) == layout


Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]


def rewrite(folder: Path, change: Change) -> None:
    path = folder / "adapter_model.safetensors"
    changed = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file({name: w.contiguous() for name, w in changed.items()}, path)


def test_the_dtype_of_an_adapter(tmp_path: Path) -> None:
    """The widest of several; its vectors, which stay as they are, say nothing of it."""
    save_adapter(tmp_path, target_modules=["q_proj"], use_dora=True)

    for others, word in ((torch.bfloat16, "BF16"), (torch.float16, "F32")):

        def cast(tensors: Tensors, others: torch.dtype = others) -> Tensors:
            dtypes = cycle((torch.bfloat16, others))
            return {n: w if "magnitude" in n else w.to(next(dtypes)) for n, w in tensors.items()}

        rewrite(tmp_path, cast)
        assert layouts.from_adapter(tmp_path).dtype == word


def test_an_adapter_of_a_conv1d(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(transformers.GPT2LMHeadModel(gpt2()), config).save_pretrained(str(tmp_path))
    assert all(module.transposed for module in layouts.from_adapter(tmp_path).modules)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: {}, Malformed, "no tensors"),
        (lambda t: dict(sorted(t.items())[:5]), Malformed, "only one of A and B"),
        (lambda t: {name: w[0] for name, w in t.items()}, Malformed, "two positive dim"),
        (lambda t: {name: w[:, :3] for name, w in t.items()}, Malformed, "not a pair of rank"),
        (lambda t: {name: w.int() for name, w in t.items()}, Unsupported, "is I32"),
        (lambda t: t | {"x.weight": torch.ones(2, 2)}, Unsupported, "x.weight"),
    ],
)
def test_refused(change: Change, error: type[Exception], text: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, change)
    with pytest.raises(error, match=text):
        layouts.from_adapter(tmp_path)


def test_limits_and_missing_files(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    for limits in (Limits(max_config_bytes=100), Limits(max_adapter_bytes=100), Limits(max_rank=7)):
        with pytest.raises((Unsupported, Malformed), match="limit of"):
            layouts.from_adapter(tmp_path, limits=limits)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(AdapterNotFoundError, match=rf"{tmp_path}.*{name}"):
            layouts.from_adapter(tmp_path)


def embeddings_of(model: Any) -> list[str]:
    return [module.name for module in layouts.from_module(model).modules if module.embedding]


def test_positions_counted_from_the_mask_are_no_look_up() -> None:
    assert embeddings_of(MODEL.from_config(OPT(word_embed_proj_dim=32))) == [
        "model.decoder.embed_tokens"
    ]


def test_an_adapter_of_embedding_head_and_layers(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    layout = layouts.from_adapter(save_adapter(tmp_path, target_modules=targets, use_dora=True))
    assert [(module.name, module.layer, module.embedding) for module in layout.modules] == [
        ("model.embed_tokens", -1, True),
        *((f"model.layers.{n}.self_attn.q_proj", n, False) for n in range(3)),
        ("lm_head", 3, False),
    ]


def test_an_embedding_is_whole_on_every_rank_whatever_its_name(tmp_path: Path) -> None:
    tiny.write(tmp_path, rank=4, target_modules=["lm_head"])
    name = "base_model.model.lm_head.lora_embedding_"
    tensors = {f"{name}A": torch.zeros(4, 48), f"{name}B": torch.zeros(32, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (module,) = layouts.from_adapter(tmp_path).modules
    assert (module.embedding, module.parallel) == (True, Parallelism.REPLICATED)


HIDDEN = 32
SIZES = NEOX_SIZES | {"num_hidden_layers": 1, "num_attention_heads": 8}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
GQA = SIZES | {"num_key_value_heads": 2}
GROUPED = (transformers.LlamaConfig, transformers.Phi3Config)
Q = FusedPart(32, 4)
K, FULL_K, ONE_K = (FusedPart(outputs, 4, replicable=True) for outputs in (8, 32, 4))
BY_HEAD = (FusedPart(96, 12),)
Parts = tuple[FusedPart, ...]

Case = tuple[Any, dict[str, Any], dict[str, Parts]]
PHI = {"qkv_proj": (Q, K, K), "gate_up_proj": (FusedPart(40), FusedPart(40)), "o_proj": ()}
NEOX = {"query_key_value": BY_HEAD, "dense_h_to_4h": (FusedPart(40),), "dense": ()}
FALCON = {"query_key_value": (Q, ONE_K, ONE_K), "dense_h_to_4h": (FusedPart(128),)}
WIDE = {"q_proj": (FusedPart(48, 6),), "k_proj": (FusedPart(12, 6, True),), "o_proj": ()}
MPT = {"d_model": HIDDEN, "n_heads": 8, "n_layers": 1}
SHORT = {"n_positions": 16}
CODE = SHORT | {"n_inner": 40}
NEW_FALCON = {"num_kv_heads": 2, "new_decoder_architecture": True}
FUSED: dict[str, Parts] = {"query_key_value": BY_HEAD}
TWO_GROUPS: dict[str, Parts] = {"query_key_value": (FusedPart(48, 24),)}
STARCODER, OWN = transformers.GPTBigCodeConfig, {"multi_query": False}
CASES: dict[str, Case] = {
    "llama": (transformers.LlamaConfig, {"head_dim": 4}, {"q_proj": (Q,), "k_proj": (K,)}),
    "llama whose heads are wide": (transformers.LlamaConfig, {"head_dim": 6}, WIDE),
    "gpt2": (transformers.GPT2Config, SHORT, {"c_attn": (Q, FULL_K, FULL_K), "c_proj": ()}),
    "phi3": (transformers.Phi3Config, {}, PHI),
    "gpt_neox": (transformers.GPTNeoXConfig, {}, NEOX),
    "gpt_bigcode": (STARCODER, CODE, {"c_attn": (Q, ONE_K, ONE_K)}),
    "gpt_bigcode without shared heads": (STARCODER, CODE | OWN, {"c_attn": BY_HEAD}),
    "falcon": (transformers.FalconConfig, {"multi_query": True}, FALCON),
    "falcon without shared heads": (transformers.FalconConfig, OWN, FUSED),
    "falcon's new decoder": (transformers.FalconConfig, NEW_FALCON, TWO_GROUPS),
}
"""Of each kind: its config, changes, and the parts by hand."""


def config_of(kind: Any, changes: dict[str, Any]) -> Any:
    return kind(**(GQA if kind in GROUPED else SIZES) | changes)


def model_of(config: Any) -> nn.Module:
    model: nn.Module = MODEL.from_config(config).double().eval()
    for parameter in model.parameters():  # some are zero at first, and would show nothing
        nn.init.normal_(parameter, std=0.3)
    return model


CROSS = SHORT | {"add_cross_attention": True}
MORE: dict[str, Case] = {
    "bloom": (transformers.BloomConfig, {}, {"query_key_value": BY_HEAD, "dense": ()}),
    "mpt": (transformers.MptConfig, MPT, {"Wqkv": (Q, FULL_K, FULL_K), "up_proj": ()}),
    # Four blocks, each of q, v, k; and what attends to another sequence has no q.
    "codegen": (transformers.CodeGenConfig, {"rotary_dim": 4}, {"qkv_proj": (), "fc_in": ()}),
    "gpt2 with cross attention": (transformers.GPT2Config, CROSS, {"c_attn": (), "q_attn": (Q,)}),
}


def on_meta(config: Any) -> ModelLayout:
    with torch.device("meta"):
        return layouts.from_module(MODEL.from_config(config))


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_parts_by_hand(name: str) -> None:
    *config, wanted = (CASES | MORE)[name]
    layout = on_meta(config_of(*config))
    found = {m.name.rpartition(".")[2]: m.parts for m in layout.modules}
    assert {last: found[last] for last in wanted} == wanted


@pytest.mark.parametrize(("name", "module"), [("codegen", "qkv_proj"), (list(MORE)[-1], "c_attn")])
def test_what_is_fused_in_a_way_that_is_not_known_is_not_cut(name: str, module: str) -> None:
    layout = on_meta(config_of(*MORE[name][:2]))
    with pytest.raises(ConfigError, match=rf"{module}' may be fused"):
        shard_layout(layout, Shard(0, 2))
    assert shard_layout(layout.replicate(module), Shard(0, 2)).cuts


class Block(nn.Module):
    """A model whose code comes with its weights, as Qwen's first version."""

    def __init__(self, model_type: str, outputs: int, **facts: int) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": 8}
        self.config = SimpleNamespace(model_type=model_type, **sizes)
        projections = {"c_attn": nn.Linear(HIDDEN, outputs), "k_proj": nn.Linear(HIDDEN, 8)}
        attention = nn.ModuleDict(projections)
        vars(attention).update(facts)
        self.h = nn.ModuleList([nn.ModuleDict({"attn": attention})])


@pytest.mark.parametrize(
    ("model", "fused", "k"),
    [
        (Block("qwen", 96), (Q, FULL_K, FULL_K), ()),
        (Block("unknown", 96), (), ()),
        (Block("unknown", 96, num_key_value_heads=2), (), (K,)),
        (Block("qwen", 48, num_key_value_heads=2), (Q, K, K), (K,)),
        (Block("qwen", 96, num_key_value_heads=3), (), ()),  # which eight heads cannot share
        (nn.ModuleList([nn.ModuleDict({"c_attn": nn.Linear(8, 24)})]), (), None),
    ],
)
def test_facts_of_the_module_come_first(model: nn.Module, fused: Parts, k: Parts | None) -> None:
    parts = {m.name.rpartition(".")[2]: m.parts for m in layouts.from_module(model).modules}
    assert (parts["c_attn"], parts.get("k_proj")) == (fused, k)


def test_a_head_of_an_odd_vocabulary_is_kept_whole_on_request() -> None:
    layout = on_meta(transformers.GPT2Config(**SIZES | {"vocab_size": 50257}))
    with pytest.raises(ConfigError, match=r"50,257 output.*layout\.replicate\('lm_head'\)"):
        shard_layout(layout, Shard(0, 2))
    held = shard_layout(layout.replicate("lm_head"), Shard(0, 2)).held
    assert held.modules[held.index("lm_head")].out_features == 50257
    assert held.modules[held.index("transformer.h.0.attn.c_attn")].out_features == 48


class Attention:
    """The first attention module of a model: how it was called, and what it gave.

    A rank's is the model's own module with fewer heads, whose projections are the rows and columns
    that the sharded layout names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.path, self.module = next(
            found for found in model.named_modules() if found[0].endswith(("attn", "attention"))
        )
        calls: list[tuple[Any, Any, Any]] = []
        note: Any = lambda _, *call: calls.append(call)  # noqa: E731
        hook = self.module.register_forward_hook(note, with_kwargs=True)
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False)
        hook.remove()
        ((self.args, self.kwargs, output),) = calls
        self.output = output[0]

    def of_rank(self, sharding: Sharding, shard: Shard) -> torch.Tensor:
        share = copy.deepcopy(self.module)
        for module, cut in zip(sharding.whole.modules, sharding.cuts, strict=True):
            if module.name.startswith(f"{self.path}."):
                linear = share.get_submodule(module.name.removeprefix(f"{self.path}."))
                cut_linear(linear, module, cut, shard)
        narrow(share, shard.world_size)
        output: torch.Tensor = share(*self.args, **self.kwargs)[0]
        return output


def cut_linear(linear: Any, module: Module, cut: ModuleCut, shard: Shard) -> None:
    rows = torch.cat([torch.arange(*each) for each in cut.rows])
    columns = torch.arange(*cut.columns)
    weight = linear.weight.T if module.transposed else linear.weight
    weight = weight.detach()[rows][:, columns]
    linear.weight = nn.Parameter(weight.T if module.transposed else weight)
    linear.nf = len(rows)
    if linear.bias is not None:
        once = shard.rank == 0 or len(columns) == module.in_features
        linear.bias = nn.Parameter(linear.bias.detach()[rows] * once)


NARROWED = ("num_heads", "num_attention_heads", "split_size", "embed_dim", "hidden_size")
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "kv_heads")


def narrow(attention: Any, world: int) -> None:
    """Tell a module, and its config, that it has so many times fewer heads."""
    attention.config = copy.deepcopy(attention.config)
    groups = getattr(attention, "num_key_value_groups", None)
    if groups is not None:
        heads = attention.config.num_attention_heads
        shared = max(1, heads // groups // world)
        attention.num_key_value_groups = heads // world // shared
    for owner in (attention, attention.config):
        for name in NARROWED:
            if hasattr(owner, name):
                setattr(owner, name, getattr(owner, name) // world)
        for name in KEY_VALUE:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, max(1, getattr(owner, name) // world))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_ranks_of_a_models_own_attention_sum_to_it(name: str) -> None:
    model = model_of(config_of(*CASES[name][:2]))
    layout = layouts.from_module(model, "float32")
    attention = Attention(model)
    for world in (2,) if "new decoder" in name else (2, 4, 8):
        shards = [Shard(rank, world) for rank in range(world)]
        whole = sum(attention.of_rank(shard_layout(layout, s), s) for s in shards)
        assert isinstance(whole, torch.Tensor)
        torch.testing.assert_close(whole, attention.output)
