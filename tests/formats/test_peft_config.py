"""`adapter_config.json` as PEFT writes it, scales against PEFT's own layers, and refusals."""

import json
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from refusals import refusals
from torch import nn

from lorax_async import AdapterFormatError, Limits, UnsupportedAdapterError, UsageError
from lorax_async.formats.peft_config import FIELDS, MAX_PATTERNS, parse_config, write_config
from lorax_async.types import AdapterSpec

LIMITS = Limits()
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def parse(**members: object) -> AdapterSpec:
    return parse_config(json.dumps(PLAIN | members).encode(), LIMITS)


def one_member(member: tuple[str, object]) -> AdapterSpec:
    return parse(**dict([member]))


def decoder() -> nn.Module:
    """Eleven layers with a q_proj, an o_proj and an up_proj, and a head."""

    def block() -> nn.Module:
        attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
        return nn.ModuleDict({"self_attn": attention, "up_proj": nn.Linear(4, 4)})

    model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(11))})
    return nn.ModuleDict({"model": model, "lm_head": nn.Linear(4, 4)})


def saved(folder: Path, config: LoraConfig) -> bytes:
    config.save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes()


TRICKY = [
    {"q_proj": 4},
    {"proj": 4, "q_pro": 5},
    {"layers.1.self_attn.q_proj": 4},
    {"1.self_attn.q_proj": 4},
    {"model.layers.1.up_proj": 2, "model.layers.10.up_proj": 3},
    {"model.layers.1": 2, r"model\.layers\.1\..*": 3},
    {r".*\.0\..*": 6, "q_proj": 2},
    {"q_proj": 2, r".*\.0\..*": 6},
    {"^model.layers.1.*": 5},
    {"layers.(1|2)..*proj": 5},
    {"q_proj|up_proj": 3, "o_proj": 7},
    {"a)|(model.layers.2": 3},
    {"layers.[0-3].*": 3, "layers.[^3].up_proj": 9},
    {r"layers\.\d{2}\..*": 3, r"layers\.\d\..*": 2},
    {"q_proj$": 3, r"\bup_proj\b": 2, "": 1, ".*": 12},
    {"lm_head": 1, "modelXlayers": 2, "model.layers.3.self_attn.o.proj": 5},
]


@pytest.mark.filterwarnings("ignore:.* keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("pattern", TRICKY, ids=str)
def test_ranks_and_scales_are_those_of_peft(
    pattern: dict[str, int], rslora: bool, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=8,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=["q_proj", "o_proj", "up_proj", "lm_head"],
        rank_pattern=pattern,
        alpha_pattern={key: 3 * value + 1 for key, value in reversed(pattern.items())},
    )
    spec = parse_config(saved(tmp_path, config), LIMITS)
    # As the file says it: PEFT sorts the patterns when it saves, and the first match wins.
    model = get_peft_model(decoder(), LoraConfig.from_pretrained(str(tmp_path)))
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(expected) == 34
    assert {m: (spec.rank_of(m), spec.scale_of(m)) for m in expected} == expected


def test_every_field_of_peft_is_treated() -> None:
    assert set(FIELDS) == {field.name for field in fields(LoraConfig)}
    assert len(FIELDS) == 42  # peft 0.21.2, with runtime_config, which it does not save


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lora_alpha": 10, "fan_in_fan_out": True}, {"fan_in_fan_out": True}),
        ({"base_model_name_or_path": "some/base"}, {"base_model": "some/base"}),
        ({"target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}, {"targets": ("v_proj",)}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"exclude_modules": ["lm_head"]}, {"excluded": ("lm_head",)}),
        ({"exclude_modules": r".*\.1\..*"}, {"excluded": r".*\.1\..*"}),
        (
            {"layers_to_transform": [1, 2], "layers_pattern": "h"},
            {"layers": (1, 2), "layer_patterns": ("h",)},
        ),
        ({"ensure_weight_tying": True}, {"ensure_weight_tying": True}),
        ({"modules_to_save": ["norm"]}, {"saved": ("norm",)}),
        ({"trainable_token_indices": [3, 1]}, {"tokens": (("", (3, 1)),)}),
        ({"trainable_token_indices": {"wte": [4]}}, {"tokens": (("wte", (4,)),)}),
        ({"task_type": "SEQ_CLS"}, {"saved": ("classifier", "score")}),
        ({"use_dora": True}, {"dora": True}),
        ({"lora_bias": True}, {"lora_bias": True}),
        ({"lora_bias": True, "init_lora_weights": False}, {"lora_bias": True}),
        ({"use_dora": True, "init_lora_weights": "gaussian"}, {"dora": True}),
    ],
)
def test_a_config_of_peft_becomes_data_and_is_written_as_peft_writes_it(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    lora = LoraConfig(r=4, **config)
    theirs, ours = saved(tmp_path, lora), write_config(lora)
    alpha = float(config.get("lora_alpha", 8))
    assert parse_config(theirs, LIMITS) == AdapterSpec(rank=4, alpha=alpha, **expected)
    assert parse_config(ours, LIMITS) == parse_config(theirs, LIMITS)
    assert json.loads(ours) == json.loads(theirs)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform with target"),
        ({"target_modules": "all-linear", "layers_to_transform": []}, "layers_to_transform with"),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern with target_modules"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern without layers_to_tr"),
        ({"layers_pattern": ["h"]}, "layers_pattern without layers_to_transform"),
    ],
)
def test_limits_to_layers_that_peft_refuses_are_refused_by_name(
    members: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=r"layers_(to_transform|pattern)`"):
        LoraConfig(**members)
    with pytest.raises(UnsupportedAdapterError, match=f"{named}.* is a combination"):
        parse(**members)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning")
@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"use_dora": True, "lora_bias": True}, "lora_bias with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias with init_.*gaussian"),
        ({"lora_bias": True, "init_lora_weights": None}, "lora_bias with init_.*None"),
        ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora with init_.*mica"),
    ],
)
def test_combinations_that_peft_refuses_are_refused_by_name(
    members: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=r"lora_bias=True is|variant combination"):
        get_peft_model(decoder(), LoraConfig(target_modules=["q_proj"], **members))
    with pytest.raises(UnsupportedAdapterError, match=f"{named}.* is a combination"):
        parse(**members)


# What only `re` understands, or what takes too long to judge: the tensors decide.
OTHER_TARGETS = [r"(?!model\.vision).*q", "(?x) q # (", "[[:q:]", "q{2000}", "q*+", "(" * 600]


def test_what_is_written_is_kept() -> None:
    for text in (None, "all-linear", ".*q", *OTHER_TARGETS):
        assert parse(target_modules=text).targets == text
    for alpha in (0, -16, 0.5, 2**0.5, 10**20):
        spec = parse(lora_alpha=alpha)
        assert (spec.alpha, spec.scale_of("q")) == (alpha, alpha / 8)
    assert parse(target_modules=["b", "a"]).targets == ("b", "a")
    layers = [parse(layers_to_transform=each).layers for each in (None, [], 3, 0, [2, 0])]
    assert layers == [(), (), (3,), (0,), (2, 0)]


INITS = {
    "PiSSA": ["pissa", "pissa_niter_16"],
    "OLoRA": ["OLoRA"],
    "CorDA": ["corda"],
    "LoRA-GA": ["lora_ga"],
    "LoftQ": ["loftq"],
    "'fancy' is unknown": ["fancy"],
}
LONG_PATTERNS = {f".*{n}.*" + "x?" * 40: 1 for n in range(60)}
FEATURES: list[tuple[str, object, str]] = [
    *(("bias", value, "biases") for value in ("all", "lora_only")),
    ("layer_replication", [[0, 2]], "repeated layers"),
    ("alora_invocation_tokens", [1, 2], "aLoRA"),
    ("use_qalora", True, "QALoRA"),
    ("megatron_config", {"tp": 2}, "Megatron"),
    ("velora_config", {}, "VeLoRA"),
    ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
    ("use_bdlora", {}, "BD-LoRA"),
    ("arrow_config", {}, "Arrow"),
    ("kasa_config", {}, "KaSA"),
    *(("init_lora_weights", value, name) for name, all_ in INITS.items() for value in all_),
    ("enable_lora", [True, False], "'enable_lora' is set"),
    *(("new_field", value, "'new_field' is set") for value in (0, 1.5, True, {"x": None})),
    *(("peft_type", value, f"'{value}' is not LORA") for value in ("ADALORA", "lora")),
    *(("r", 257, "Limits.max_rank"), ("rank_pattern", {"q": 1_000}, "Limits.max_rank")),
    ("alpha_pattern", {"(?=q)": 1}, "pattern"),
    ("rank_pattern", {str(n): 1 for n in range(MAX_PATTERNS + 1)}, "more patterns"),
    ("rank_pattern", LONG_PATTERNS, "more patterns"),
]


def test_features_are_refused_by_name() -> None:
    for name, value, feature in FEATURES:
        [text] = refusals(one_member, UnsupportedAdapterError, {feature: [(name, value)]})
        assert len(text) < 400
        assert ";" in text  # what is wrong; what to do


NULLS = {name for name, field in FIELDS.items() if name not in PLAIN and field.accepts(None)}
NEUTRAL: list[object] = [None, False, "", [], {}]
UNCHANGING: list[tuple[str, object]] = (
    [(name, None) for name in sorted(NULLS)]
    + [(name, False) for name in FIELDS if FIELDS[name].refused]
    + [("modules_to_save", []), ("trainable_token_indices", {}), ("bias", "none")]
    + [("init_lora_weights", value) for value in (True, False, "gaussian", "eva", "orthogonal")]
    + [("init_lora_weights", "mica"), ("eva_config", {"rho": 2.0}), ("loftq_config", {"bits": 4})]
    + [("auto_mapping", {"base_model_class": "X"}), ("runtime_config", {"x": 1})]
    + [("layers_to_transform", []), ("layers_pattern", []), ("layers_pattern", "")]
    + [("peft_version", "0.99"), ("lora_dropout", 0.3), ("qalora_group_size", 32)]
    + [("exclude_modules", []), ("exclude_modules", ""), ("rank_pattern", None)]
    + [("unknown", value) for value in NEUTRAL]
)


def test_what_does_not_change_the_mathematics_passes() -> None:
    assert [member for member in UNCHANGING if one_member(member) != parse()] == []


WRONG: dict[str, list[object]] = {
    "r": [0, -1, True, 8.0, "8", None, [8]],
    "lora_alpha": [True, "16", None, [], {}],
    "rank_pattern": [[], "q", {"q": 0}, {"q": 2.0}, {"q": True}],
    "alpha_pattern": [1, {"q": None}, {"q": "1"}, {"q": False}],
    "use_rslora": [1, "true"],
    "fan_in_fan_out": [0],
    "use_dora": [1, "true", [], ""],
    "lora_bias": [0, "none", {}],
    "init_lora_weights": [1, [], {}],
    "target_modules": [1, [1], {"q": 1}, True],
    "exclude_modules": [1, [None]],
    "layers_pattern": [1],
    "modules_to_save": ["norm", [1], {"norm": 1}],
    "trainable_token_indices": [3, "3", [1.0], [True], {"wte": 3}, {"wte": ["3"]}],
    "layers_to_transform": [True, 1.0, "1", ["1"], [True]],
    "eva_config": [[]],
    "base_model_name_or_path": [1],
    "peft_type": [None, 1, ["LORA"]],
}


def test_values_that_cannot_be_are_named() -> None:
    cases = {name: [(name, value) for value in values] for name, values in WRONG.items()}
    refusals(one_member, AdapterFormatError, cases)
    unusable: list[object] = ["(", "q)", "*q", "[q", "[z-a]", [], ""]
    targets = [("target_modules", value) for value in unusable]
    refusals(one_member, AdapterFormatError, {r"'target_modules'.*(correct|write)": targets})
    broken: list[dict[str, object]] = [{"exclude_modules": "*q"}, {"exclude_modules": "("}]
    broken += [{"layers_to_transform": 1, "layers_pattern": text} for text in ("(", ["h", "[h"])]
    refusals(lambda fields: parse(**fields), AdapterFormatError, {"is not a regular expr": broken})


def test_malformed_configs() -> None:
    numbers = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" + b"0" * 400)
    ranks = (b"1" + b"0" * 5_000, b"-0", b"8" + b" " * LIMITS.max_config_bytes)
    texts = [
        *(b"", b"null", b"{}", b'{"peft_type":"LORA"}', b'{"peft_type":"LORA","r":8}'),
        b'{"peft_type":"LORA","r":8,"r":8,"lora_alpha":16}',
        *(b'{"peft_type":"LORA","r":8,"lora_alpha":%s}' % number for number in numbers),
        *(b'{"peft_type":"LORA","lora_alpha":1,"r":%s}' % rank for rank in ranks),
    ]
    cases = {"adapter_config.json": texts}
    refusals(lambda text: parse_config(text, LIMITS), AdapterFormatError, cases)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)
NAMES = st.sampled_from(sorted(FIELDS)) | st.text(max_size=8)


@settings(max_examples=100)
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans())
def test_any_object_is_a_spec_or_refused(members: dict[str, Any], plain: bool) -> None:
    text = json.dumps(PLAIN | members if plain else members).encode()
    try:
        spec = parse_config(text, LIMITS)
    except (AdapterFormatError, UnsupportedAdapterError) as error:
        assert len(str(error)) <= 1_000
    else:
        assert 1 <= spec.rank_of("model.layers.0.q_proj") <= LIMITS.max_rank
        assert abs(spec.scale_of("model.layers.0.q_proj")) < float("inf")


def test_limits_are_the_callers() -> None:
    text = json.dumps(PLAIN | {"r": 512}).encode()
    assert parse_config(text, Limits(max_rank=512)).rank == 512
    with pytest.raises(AdapterFormatError, match="limit"):
        parse_config(text, Limits(max_config_bytes=10))


def test_patterns_keep_their_order_and_sets_have_one_spelling() -> None:
    names = [f"module_{n}" for n in range(50)]
    patterns = {"rank_pattern": {"z": 2, "a": 3}, "alpha_pattern": {"q": 1.5}}
    config: dict[str, Any] = {**PLAIN, **patterns, "target_modules": set(names)}
    specs = [
        parse_config(write_config(each), LIMITS)
        for each in (config, {**config, "target_modules": sorted(names)}, LoraConfig(**config))
    ]
    assert [[pattern.text for pattern in spec.rank_patterns] for spec in specs] == [["z", "a"]] * 3
    written = {write_config({"x": kind(names)}) for kind in (set, frozenset, sorted)}
    assert len(written) == 1
    assert config["target_modules"] == set(names), "what is given is not changed"


CIRCULAR: dict[str, object] = {}
CIRCULAR["x"] = CIRCULAR
DEEP = reduce(lambda inner, _: {"x": inner}, range(100_000), dict[str, object]())
NO_JSON: list[Any] = [
    *({"r": float("inf")}, {"r": b"4"}, {"x": {1, "a"}}, {(1, 2): 3}, {"x": Path()}),
    *(CIRCULAR, DEEP),
]
NO_CONFIGS: list[Any] = [None, "{}", [("r", 4)], LoraConfig, 4]


def test_what_is_no_config_is_not_written() -> None:
    for config in NO_JSON:
        with pytest.raises(AdapterFormatError, match="adapter_config.json cannot be written"):
            write_config(config)
    for config in NO_CONFIGS:
        with pytest.raises(UsageError, match="a dict as in adapter_config.json, or a peft.Lora"):
            write_config(config)
