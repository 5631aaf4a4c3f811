"""The modules that a config targets, against PEFT's own choice."""

import re
import warnings
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorax_async.config import Limits
from lorax_async.formats.peft_config import parse_config, write_config
from lorax_async.formats.peft_names import compile_layer_pattern, compile_whole, targeting_of

LAYERS = 4
NONE_EXCLUDED = "ignore:.*but no modules were excluded:UserWarning"


def base(*, tied: bool = False) -> LlamaForCausalLM:
    """A decoder of 28 linear modules in four layers, on the meta device."""
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))


PLAIN = base()
PATHS = [name for name, each in PLAIN.named_modules() if isinstance(each, nn.Linear | nn.Embedding)]
LINEARS = [path for path in PATHS if ".layers." in path]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def applied(config: LoraConfig, paths: list[str]) -> set[str]:
    """What of a file with tensors of these modules this package applies."""
    targeting = targeting_of(parse_config(write_config(config), Limits()))
    return {
        path
        for path in paths
        if targeting.omitted_by(path, embedding=path.endswith("embed_tokens")) is None
    }


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDS = [f"layers.{n}.self_attn.{name}" for n in range(LAYERS) for name in SEVEN[:4]]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": SEVEN},
    {"target_modules": ["v_proj", "q_proj", "never_there"]},
    {"target_modules": ["proj", "q_pro", "q_proj "], "exclude_modules": None},
    {"target_modules": ["1.self_attn.q_proj", "mlp.up_proj", ".k_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.11.mlp.up_proj"]},
    {"target_modules": ENDS},
    {"target_modules": ["lm_head", "embed_tokens"]},
    {"target_modules": r".*\.[01]\.(self_attn|mlp)\..*j"},
    {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": r"(.*\.)?q_proj$|^.*up_proj"},
    {
        "target_modules": r"(?:.*?(?:language|text).*?(?:mlp).*?(?:up_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    },
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["o_proj", "2.mlp.up_proj"]},
    {"target_modules": SEVEN, "exclude_modules": ["q_proj", "never_there"]},
    {"target_modules": SEVEN, "exclude_modules": ["model.layers.1.self_attn.q_proj", "1.mlp.up"]},
    {"target_modules": SEVEN, "exclude_modules": r".*\.[12]\.mlp\..*"},
    {"target_modules": SEVEN, "exclude_modules": "q_proj"},
    {"target_modules": r".*proj", "exclude_modules": r".*(q|k)_proj"},
    {"target_modules": SEVEN, "layers_to_transform": [0, 2, 77]},
    {"target_modules": SEVEN, "layers_to_transform": 1},
    {"target_modules": SEVEN, "layers_to_transform": [0], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", HEAD], "layers_to_transform": [3]},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": ["h", "lay.rs"]},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "h|layers"},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": ["", "layers"]},
    # Names that are whole paths are not limited to layers.
    {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
]


@pytest.mark.filterwarnings(NONE_EXCLUDED)
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_the_modules_are_those_that_peft_adapts(fields: dict[str, Any]) -> None:
    adapted: set[str] = set()
    try:
        model = get_peft_model(base(), LoraConfig(r=2, **fields), low_cpu_mem_usage=True)
    except ValueError as error:  # none at all
        assert re.search(r"not found|No modules", str(error))
    else:
        layers = {n for n, each in model.named_modules() if isinstance(each, LoraLayer)}
        adapted = {name.removeprefix("base_model.model.") for name in layers}
    assert applied(LoraConfig(r=2, **fields), PATHS) == adapted


def test_many_whole_paths_are_limited_to_layers_too() -> None:
    """PEFT replaces 20 names or more by common ends, and these it limits."""
    fields: dict[str, Any] = {"target_modules": LINEARS, "layers_to_transform": [1]}
    model = get_peft_model(base(), LoraConfig(r=2, **fields), low_cpu_mem_usage=True)
    adapted = [name for name, each in model.named_modules() if isinstance(each, LoraLayer)]
    assert len(adapted) == 7
    assert len(applied(LoraConfig(r=2, **fields), PATHS)) == 7


@pytest.mark.filterwarnings(NONE_EXCLUDED)
@pytest.mark.parametrize("name", [EMBEDDING, "embed_tokens", HEAD])
@pytest.mark.parametrize("more", [{}, {"layers_to_transform": [1]}, {"exclude_modules": [HEAD]}])
def test_a_tied_head_is_adapted_with_the_embedding(name: str, more: dict[str, Any]) -> None:
    """PEFT writes its A and B, though the config that it saves names the embedding only."""
    config = LoraConfig(r=2, target_modules=["q_proj", name], ensure_weight_tying=True, **more)
    model = get_peft_model(base(tied=True), config)
    adapted = {
        path.removeprefix("base_model.model.")
        for path, each in model.named_modules()
        if isinstance(each, LoraLayer)
    }
    assert {EMBEDDING, HEAD} <= adapted
    assert applied(cast(LoraConfig, model.peft_config["default"]), PATHS) == adapted


def test_unreadable_patterns_leave_it_to_the_tensors() -> None:
    """Look-around and references cannot be matched in linear time."""
    for fields in (
        {"target_modules": r"(?=model).*nonexistent"},
        {"target_modules": r"(.*)\1"},
        {"target_modules": "(a|" * 2_000},
        {"target_modules": SEVEN, "exclude_modules": r"(?!lm_head).*"},
        {"target_modules": SEVEN, "layers_to_transform": [99], "layers_pattern": "(?=l)layers"},
    ):
        assert applied(LoraConfig(r=2, **fields), LINEARS) == set(LINEARS), fields


def test_without_targets_the_other_fields_still_count() -> None:
    config = LoraConfig(r=2, exclude_modules=["q_proj"], layers_to_transform=[1])
    assert len(applied(config, LINEARS)) == 6


ODD = ["q_proj", "layers.1.q_proj", "a.b.1", "a.1.b", "a.b.1.c", "a.b.2.c", "a.b.2.c.1.d", "b.1.c"]
WORDS = ["q_proj", "a.b.1.c", "b.2.c", "c", "d", "1", "", "b"]
ATOMS = ["a", "b", ".", r"\.", "*", "+", "?", "|", "(", ")", "[", "]", "1", "2", r"\d", "^", "$"]
ATOMS += ["{2}", "(?:", "(?P<n>", "(?P<idx>", "[^.]", r"\b", ".*", "q_proj", "layers", "(?="]
PATTERNS = st.lists(st.sampled_from(ATOMS), max_size=6).map("".join)
NAMES = st.lists(st.sampled_from(WORDS), max_size=4)


@given(
    targets=NAMES.filter(bool) | PATTERNS.filter(bool),
    excluded=st.none() | NAMES | PATTERNS,
    layers=st.none() | st.integers(-1, 2) | st.lists(st.integers(0, 2), max_size=2),
    patterns=st.none() | PATTERNS | st.lists(PATTERNS, max_size=2),
)
@example(["c"], None, [1], ["a|b", "b"])
@example(["c"], None, [2], "(?P<n>b)")
def test_any_fields_mean_what_they_mean_to_peft(
    targets: Any, excluded: Any, layers: Any, patterns: Any
) -> None:
    fields = {"target_modules": targets, "exclude_modules": excluded}
    fields |= {"layers_to_transform": layers, "layers_pattern": patterns}
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    texts = [text for text in (targets, excluded) if isinstance(text, str)]
    texts += [rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\." for text in patterns]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re: "possible nested set"
        try:
            config = LoraConfig(r=2, **fields)
            for text in texts:
                re.compile(text)
        except (ValueError, re.error):  # PEFT loads no such adapter
            return
        whole = [compile_whole(text) for text in texts[: len(texts) - len(patterns)]]
        if None in whole or None in [compile_layer_pattern(text) for text in patterns]:
            return  # left to the tensors
        expected = {path for path in ODD if check_target_module_exists(config, path)}
    assert applied(config, ODD) == expected
