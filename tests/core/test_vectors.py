"""Biases beside B, DoRA's magnitudes and embeddings: from config and names to bytes in a plan.

Expected bytes come from safetensors' own reader, what belongs together from PEFT itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from core.adapter_files import ALIGNMENT, TORCH, carry_out, file_of, matrix, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.peft_config import parse_config
from lorax_async.core.peft_names import Part
from lorax_async.core.transfer_plan import Read
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
)

PREFIX = "base_model.model."
KINDS = {"plain": "", "lora_bias": "lora_B.bias", "use_dora": "lora_magnitude_vector"}
Q, EMBED = "model.layers.0.q", "model.embed_tokens"
LAYOUT = ModelLayout(
    (
        Module(EMBED, 20, 8, -1, Parallel.REPLICATED, embedding=True),
        Module(Q, 8, 4, 0, Parallel.COLUMN),
        Module("model.layers.0.v", 8, 6, 0, Parallel.COLUMN),
        Module("lm_head", 8, 20, 1, Parallel.COLUMN),
    ),
    1,
    "BF16",
    "model.",
)
Named = tuple[str, torch.Tensor]


def tensors(
    module: str, kind: str = "plain", *, rank: int = 2, dtype: str = "F32", own: str = "F32"
) -> list[Named]:
    """What PEFT writes for one module of `LAYOUT`; the vector in dtype `own`."""
    shape = LAYOUT.modules[LAYOUT.index(module)]
    names = ("lora_embedding_A", "lora_embedding_B") if shape.embedding else None
    a, b = names or ("lora_A.weight", "lora_B.weight")
    made = [
        (f"{PREFIX}{module}.{a}", torch.randn(rank, shape.in_features).to(TORCH[dtype])),
        (f"{PREFIX}{module}.{b}", torch.randn(shape.out_features, rank).to(TORCH[dtype])),
    ]
    if KINDS[kind]:
        vector = torch.randn(shape.out_features).to(TORCH[own])
        made.append((f"{PREFIX}{module}.{KINDS[kind]}", vector))
    return made


def spec_of(kind: str, rank: int = 2) -> AdapterSpec:
    dora, bias = kind == "use_dora", kind == "lora_bias"
    return AdapterSpec(rank=rank, alpha=4.0, dora=dora, lora_bias=bias)


# -- plans --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    chosen=st.sets(st.sampled_from([module.name for module in LAYOUT.modules]), min_size=1),
    dtypes=st.tuples(*[st.sampled_from(sorted(TORCH))] * 3),
    rank=st.integers(1, 9),
    multiple=st.sampled_from([1, 8]),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_has_its_place(
    kind: str,
    chosen: set[str],
    dtypes: tuple[str, str, str],
    rank: int,
    multiple: int,
    order: Any,
) -> None:
    dtype, own, stored = dtypes
    if kind == "lora_bias":
        chosen = chosen - {EMBED} or {Q}
    written = [t for m in chosen for t in tensors(m, kind, rank=rank, dtype=dtype, own=own)]
    order.shuffle(written)
    file = file_of(written)
    made = plan(file, spec_of(kind, rank), LAYOUT, dtype=stored, rank_multiple=multiple)
    assert made.has_vectors == (kind != "plain")
    expected = safetensors.torch.load(file)
    ends = {value: key for key, value in KINDS.items()}
    for group in made.groups:
        extent = carry_out(group, file, stored)  # no byte twice, none outside
        assert group.nbytes % ALIGNMENT == 0
        for row in group.rows:
            module = LAYOUT.modules[row.module]
            a = matrix(extent, row.a, row.padded_rank, module.in_features, stored)
            b = matrix(extent, row.b, module.out_features, row.padded_rank, stored)
            names = [name for name, _ in tensors(module.name)]
            assert torch.equal(a[:rank], expected.pop(names[0]).to(a.dtype))
            assert torch.equal(b[:, :rank], expected.pop(names[1]).to(b.dtype))
            assert not a[rank:].any()
            assert not b[:, rank:].any()
        for vector in group.vectors:
            module = LAYOUT.modules[vector.module]
            assert vector.offset % ALIGNMENT == 0
            assert (vector.dtype, vector.length) == (own, module.out_features)
            part = {Part.BIAS: "lora_bias", Part.MAGNITUDE: "use_dora"}[vector.part]
            assert part == kind == ends[KINDS[kind]]
            there = extent[vector.offset : vector.offset + vector.nbytes].view(TORCH[own])
            assert torch.equal(there, expected.pop(f"{PREFIX}{module.name}.{KINDS[kind]}"))
    assert not expected
    assert sum(span.nbytes for g in made.groups for span in g.spans) == sum(
        tensor.nbytes for _, tensor in written
    )


def test_a_layer_with_magnitudes_is_one_read_where_nothing_is_cast() -> None:
    """Its bytes go as they lie: 64 of A, 64 of B, 64 of the magnitude (of 16, 8 and 32 elements)."""
    layout = ModelLayout((Module(Q, 16, 16, 0, Parallel.COLUMN),), 1, "F32")
    names = [f"{PREFIX}{Q}.{end}" for end in ("lora_A.weight", "lora_B.weight")]
    file = file_of(
        [
            (names[0], torch.randn(1, 16)),
            (names[1], torch.randn(16, 1)),
            (f"{PREFIX}{Q}.lora_magnitude_vector", torch.randn(16)),
        ]
    )
    [group] = plan(file, AdapterSpec(rank=1, alpha=1.0, dora=True), layout).groups
    assert group.reads == (Read(len(file) - 192, 192, target=0),)
    assert [tuple(vector) for vector in group.vectors] == [(0, Part.MAGNITUDE, 128, 16, "F32")]
    assert (group.nbytes, group.converts) == (192, ())


# -- what belongs together ----------------------------------------------------------------------

QB, QM, QP = (tensors(Q, kind) for kind in ("lora_bias", "use_dora", "plain"))
V = "model.layers.0.v"
ODD = torch.ones(5)


@pytest.mark.parametrize(
    ("kind", "written", "error", "text"),
    [
        ("use_dora", QP, AdapterFormatError, f"use_dora is set, and module '{Q}' has no magnitude"),
        ("lora_bias", QP, AdapterFormatError, f"lora_bias is set, and module '{Q}' has no bias"),
        ("use_dora", [*QM, *tensors(V)], AdapterFormatError, f"module '{V}' has no magnitude"),
        ("lora_bias", [*QB, *tensors(V)], AdapterFormatError, f"module '{V}' has no bias"),
        ("use_dora", QB, AdapterFormatError, f"module '{Q}' has no magnitude"),
        ("lora_bias", QM, AdapterFormatError, f"module '{Q}' has no bias"),
        ("plain", QM, AdapterFormatError, f"{Q}.lora_magnitude_vector' is there .* use_dora"),
        ("plain", QB, AdapterFormatError, f"{Q}.lora_B.bias' is there .* not set lora_bias"),
        (
            "use_dora",
            [*QM, QB[2]],
            AdapterFormatError,
            "lora_B.bias' is there .* not set lora_bias",
        ),
        ("lora_bias", [*QB, QM[2]], AdapterFormatError, "vector' is there .* not set use_dora"),
        ("use_dora", [*QM, tensors(V, "use_dora")[2]], AdapterFormatError, f"{V}.*has no A"),
        ("plain", [*QP, tensors(V, "use_dora")[2]], AdapterFormatError, f"{V}.*has no A"),
        ("use_dora", [*QM[:2], (QM[2][0], ODD)], AdapterFormatError, r"shape \[5\], and B has 4"),
        ("lora_bias", [*QB[:2], (QB[2][0], ODD)], AdapterFormatError, r"shape \[5\], and B has 4"),
        ("use_dora", [*QM[:2], (QM[2][0], ODD.view(5, 1))], AdapterFormatError, r"\[5, 1\]"),
        ("use_dora", [*QM[:1], QM[2]], AdapterFormatError, "has no B"),
        ("lora_bias", tensors(EMBED), UnsupportedAdapterError, f"'{EMBED}' is an embedding, for"),
    ],
)
def test_flags_and_vectors_belong_together(
    kind: str, written: list[Named], error: type[AdapterError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        plan(file_of(written), spec_of(kind), LAYOUT)
    assert ";" in str(caught.value)  # what is wrong; what to do


def renamed(module: str, other: str) -> list[Named]:
    """The tensors of a module, called as those of another one, which is of the other kind."""
    new = [name for name, _ in tensors(other)]
    return [(new[n], tensor) for n, (_, tensor) in enumerate(tensors(module))]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (
            [(n.replace(EMBED, Q), t) for n, t in renamed(Q, EMBED)],
            "is for an embedding, and the base has a linear module there",
        ),
        (
            [(n.replace(Q, EMBED), t) for n, t in renamed(EMBED, Q)],
            "is for a linear module, and the base has an embedding there",
        ),
    ],
)
def test_an_embedding_is_no_linear_module(written: list[Named], text: str) -> None:
    with pytest.raises(IncompatibleAdapterError, match=text):
        plan(file_of(written), spec_of("plain"), LAYOUT)


def test_an_embedding_of_another_vocabulary_is_refused() -> None:
    other = (f"{PREFIX}{EMBED}.lora_embedding_A", torch.ones(2, 21))
    with pytest.raises(IncompatibleAdapterError, match=r"embed_tokens \(21 → 8, .* 20 → 8\)"):
        plan(file_of([other, tensors(EMBED)[1]]), spec_of("plain"), LAYOUT)


def test_fan_in_fan_out_says_nothing_of_embeddings() -> None:
    spec = AdapterSpec(rank=2, alpha=1.0, fan_in_fan_out=True)
    assert len(plan(file_of(tensors(EMBED)), spec, LAYOUT).groups) == 1
    with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out"):
        plan(file_of([*tensors(EMBED), *tensors(Q)]), spec, LAYOUT)


# -- configs ------------------------------------------------------------------------------------


def config_of(folder: Path, **settings: Any) -> bytes:
    """As PEFT writes it."""
    LoraConfig(r=4, **settings).save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes()


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, (False, False)),
        ({"use_dora": True}, (True, False)),
        ({"lora_bias": True}, (False, True)),
        ({"lora_bias": True, "init_lora_weights": False}, (False, True)),
        ({"use_dora": True, "init_lora_weights": "gaussian"}, (True, False)),
    ],
)
def test_vectors_are_read_from_what_peft_writes(
    settings: dict[str, Any], flags: tuple[bool, bool], tmp_path: Path
) -> None:
    spec = parse_config(config_of(tmp_path, **settings), Limits())
    assert (spec.dora, spec.lora_bias) == flags


@pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True, "lora_bias": True}, "lora_bias with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias with init_.*gaussian"),
        ({"lora_bias": True, "init_lora_weights": None}, "lora_bias with init_.*None"),
        ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora with init_.*mica"),
    ],
)
def test_combinations_that_peft_refuses_are_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=r"lora_bias=True is|variant combination"):
        get_peft_model(
            nn.ModuleDict({"q": nn.Linear(4, 4)}), LoraConfig(target_modules=["q"], **settings)
        )
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    with pytest.raises(UnsupportedAdapterError, match=f"{named}.* is a combination"):
        parse_config(json.dumps(plain | settings).encode(), Limits())
