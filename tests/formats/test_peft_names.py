"""Tensor names against the ones PEFT itself writes, patterns against PEFT's own lookup."""

import re
import warnings
from typing import Any

import pytest
import re2
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from refusals import refusals
from torch import nn

from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError
from lorax_async.formats.peft_names import (
    TensorName,
    brings_tokens,
    compile_pattern,
    layer_index,
    parse_tensor_name,
    pattern_error,
)
from lorax_async.formats.tensor_kinds import SUFFIXES, TensorRole


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.experts = nn.Module()
        for name in ("up", "down"):
            self.experts.register_parameter(name, nn.Parameter(torch.zeros(2, 8, 8)))
        blocks = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in "ab"]
        self.layers = nn.ModuleList(blocks)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


def names_of(**settings: Any) -> set[str]:
    settings = {"r": 2, "target_modules": ["q_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Decoder(), LoraConfig(**settings))
        return set(get_peft_model_state_dict(model, save_embedding_layers=False))


QUERIES = ["layers.0.q_proj", "layers.1.q_proj"]
FACTORS = [TensorName(query, part) for query in QUERIES for part in (TensorRole.A, TensorRole.B)]
EMBEDDING = [TensorName("embed_tokens", part, True) for part in (TensorRole.A, TensorRole.B)]
BOTH = {"target_modules": ["q_proj", "embed_tokens"]}


SAVED = (TensorRole.WEIGHT, TensorRole.OWN_BIAS)
NORMS = [TensorName(f"layers.{n}.norm", part, None) for n in range(2) for part in SAVED]
MAGNITUDES = [TensorName(path, TensorRole.MAGNITUDE, None) for path in [*QUERIES, "embed_tokens"]]


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, []),
        ({"use_dora": True}, MAGNITUDES[:2]),
        ({"lora_bias": True}, [TensorName(query, TensorRole.BIAS) for query in QUERIES]),
        (BOTH, EMBEDDING),
        ({**BOTH, "use_dora": True}, [*MAGNITUDES, *EMBEDDING]),
        ({"modules_to_save": ["norm"]}, NORMS),
        (
            {"trainable_token_indices": [1, 2]},
            [TensorName("embed_tokens", TensorRole.TOKENS, None)],
        ),
    ],
)
def test_names_of_peft_that_are_applied(settings: dict[str, Any], more: list[TensorName]) -> None:
    names = names_of(**settings)
    assert {parse_tensor_name(name) for name in names} == {*FACTORS, *more}
    assert len(names) == len(FACTORS) + len(more)


def test_parameters_of_one_module_wrap_each_other() -> None:
    names = names_of(target_parameters=["experts.up", "experts.down"]) - names_of()
    parsed = {parse_tensor_name(name) for name in names}
    outer = {TensorName("experts", role) for role in (TensorRole.A, TensorRole.B)}
    roles = (TensorRole.PARAMETER_A, TensorRole.PARAMETER_B)
    assert parsed == {*outer, *(TensorName("experts", role, False, 1) for role in roles)}


BASE = "base_model.model."
REFUSED = {
    "full copy of.*target_modules and modules_to_save": "classifier.base_layer.weight"
    " model.norm.base_layer.weight",
    "bias .a trained bias": "q.base_layer.bias",
    "a layer around another": "model.base_layer.q.lora_A.weight q.base_layer.lora_B.bias",
    "trainable_token_indices": "model.embed_tokens.trainable_tokens_delta",
    "KaSA": "q.lora_diag",
    "VeLoRA": "q.lora_velora_embed",
    "MonteCLoRA": "q.lora_monteclora_sampler.log_prior",
    "adapter's name": "q.lora_A.default.weight q.lora_B.default.bias q.lora_embedding_A.default"
    " q.lora_magnitude_vector.default.weight",
    "would not be applied": "q.lora_A.bias q.lora_embedding_A.weight q.lora_magnitude_vector.weight"
    " q.lora_A q.lora_C.weight",
}
OTHERS = ["", BASE, "x", "model.q.lora_A.weight", "transformer.q.lora_B.weight"]


def test_other_tensors_are_refused_by_name() -> None:
    cases = {feature: [BASE + end for end in ends.split()] for feature, ends in REFUSED.items()}
    cases["would not be applied"] += [*OTHERS, "base_model.q.lora_A.weight"]
    refusals(parse_tensor_name, UnsupportedAdapterError, cases)


def test_the_formats_of_other_programs_are_named() -> None:
    formats = {
        "MLX": "model.layers.0.self_attn.q_proj.lora_a model.layers.0.mlp.up_proj.lora_b",
        "kohya": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
        " lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha x.lora_up.weight",
        "diffusers": "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"
        " transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"
        " text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    }
    cases = {f"format is {name}'": names.split() for name, names in formats.items()}
    refusals(parse_tensor_name, UnsupportedAdapterError, cases)


MALFORMED = [
    *("", "layers.01.q", "00.q", "layers.+1.q", "layers..q", ".q", "q.", "la yers.1", "q\n"),
    *("q\x00", "layérs.1", "layers.\u0661.q", "layers.\N{SUPERSCRIPT TWO}.q"),
]


def test_one_spelling_per_module() -> None:
    names = [f"{BASE}{module}.lora_A.weight" for module in MALFORMED]
    refusals(parse_tensor_name, AdapterFormatError, {"malformed": names})


LAYERS = {
    "model.layers.12.self_attn.q_proj": 12,
    "transformer.h.3.attn.c_attn": 3,
    "model.layers.7.mlp.experts.3.up_proj": 7,
    "decoder.block.10": 10,
    "layers.0.q": 0,
    "0.q": 0,
    "layers.999999": 999_999,
    "lm_head": None,
    "model.layer1.q": None,
    "model.1x.q": None,
}


def test_layer_index_is_the_first_plain_decimal() -> None:
    assert {module: layer_index(module) for module in LAYERS} == LAYERS
    odd = ("layers.01.q", "007", "layers.1000000.q", "layers.00.q")
    refusals(layer_index, AdapterFormatError, {"": odd})


@given(st.text(max_size=60), st.sampled_from(["", *(f".{suffix}" for suffix in SUFFIXES)]))
def test_any_text_is_a_name_or_refused(text: str, suffix: str) -> None:
    name = f"{BASE}{text}{suffix}"
    try:
        parsed = parse_tensor_name(name)
    except (UnsupportedAdapterError, AdapterFormatError) as error:
        assert len(str(error)) <= 1_000
    else:
        end = name.removeprefix(f"{BASE}{parsed.module}.")
        kind = SUFFIXES[end]
        assert (kind.role, kind.embedding) == (parsed.part, parsed.embedding)


MODULES = [
    *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1, 10, 11) for p in "qkv"),
    *("layers.1.q_proj", "q_proj", "lm_head", "modelXlayersX1.q_proj", "a", "a.a", "aa-b.1", "0"),
]
ATOMS = st.sampled_from(
    ["q_proj", "layers", "model", "1", "0", ".", r"\.", "*", "+", "?", "|", "(", ")", "[", "]"]
    + ["^", "$", "{2}", "{,2}", "{1,}", "{01}", "(?:", "(?P<n>", r"\d", r"\w", r"\b", r"\B", "a"]
    + ["-", "[^.]", "[0-9]", ".*", "(?i)", r"\Z", r"\z", "[[:alpha:]]", "(?=", r"\1", "é"]
)


@given(st.lists(ATOMS, max_size=7).map("".join))
@example(r"layers\.1\.self_attn")
@example("a)|(model")
@example("q|layers.1.self_attn.q_proj")
@example("")
def test_patterns_mean_what_they_mean_to_peft(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re: "possible nested set"
        try:
            matches, _ = compile_pattern(text)
            re.compile(rf"(.*\.)?({text})$")
        except (UnsupportedAdapterError, re.error):
            return
        for module in MODULES:
            # PEFT answers with the module itself where no pattern matches.
            expected = get_pattern_key([text], module) == text != module or text == module
            assert matches(module) is expected, module


AMBIGUOUS = [
    *("[[:alpha:]]", "[a[:digit:]]", r"q\Z", r"q\z", "(?=q)", "(?<!q)k", r"(q)\1", "(?i)q"),
    *("q{,3}", "q{01}", "q{1,5000}", "(q{100}){100}", "q++", "q**", "(", "[q", "q\\", r"\Qq\E"),
    *("(?#x)q", "(?>q)", r"\12", r"\u0071", "x" * 513, "(.{0,900}){0,1000}", "*\ud800"),
]


def test_patterns_that_do_not_mean_one_thing(capfd: pytest.CaptureFixture[str]) -> None:
    refusals(compile_pattern, UnsupportedAdapterError, {"pattern": AMBIGUOUS})
    assert capfd.readouterr() == ("", "")


def test_a_catastrophic_pattern_answers() -> None:
    matches, _ = compile_pattern("(a+)+b")  # Python's re never ends on this
    assert not matches("a" * 5_000)
    assert matches("a" * 5_000 + "b")
    # Each "[]a]" is one set, or an empty one and two letters: 2**100 ways to fail at the end.
    refusals(compile_pattern, UnsupportedAdapterError, {"pattern": ["[]a]" * 100 + "(?x"]})


def test_matching_compiles_nothing_and_plain_names_cost_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = [compile_pattern(text) for text in (r".*\.1\..*", "q_proj", "layers.1.q_proj")]
    monkeypatch.setattr(re2, "compile", None)
    monkeypatch.setattr(re, "compile", None)
    assert all(matches("model.layers.1.q_proj") for matches, _ in compiled)
    assert [cost > 0 for _, cost in compiled] == [True, False, False]


@given(st.text(st.sampled_from("()[]{}*+?|^\\:!=<>P#,-ix02aQE\u00e9"), max_size=12))
@example("[[:alpha:]")
@example("(?x)a # (")
def test_no_pattern_that_re_compiles_is_called_an_error(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            re.compile(text)
        except re.error:
            return
    assert pattern_error(text) is None


@pytest.mark.parametrize(
    ("name", "brings"),
    [
        ("base_model.model.model.embed_tokens.weight", True),
        ("base_model.model.lm_head.weight", True),
        ("base_model.model.transformer.wte.weight", True),
        ("base_model.model.model.embed_tokens.base_layer.weight", True),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", True),
        ("base_model.model.lm_head.bias", False),
        ("base_model.model.lm_head.lora_A.weight", False),
        ("base_model.model.model.embed_tokens.lora_embedding_A", False),
        ("base_model.model.score.weight", False),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", False),
    ],
)
def test_rows_of_an_embedding_or_a_head_may_be_those_of_other_tokens(
    name: str, brings: bool
) -> None:
    plain = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert brings_tokens([plain, name]) is brings
    assert not brings_tokens([plain])
