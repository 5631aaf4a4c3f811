"""The file that a merge would be: its config, its header, and what it is made of."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch

from core.adapter_files import file_of, layout_of, pair
from lorax_async import Limits, ModelLayout
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, LoraxError
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import TensorRole
from lorax_async.formats.safetensors import header_size, parse_header
from lorax_async.sources.base import AdapterFile
from lorax_async.sources.merges import MergePlan, NewLayers, plan_merge
from lorax_async.types import AdapterKey, Merge, MergedKey

Q, OUT = "model.layers.0.q", "model.layers.1.o"
LAYOUT = layout_of((Q, 24, 16, 0), (OUT, 16, 24, 1), ("lm_head", 24, 40, 12))


def part(ranks: dict[str, int], layout: ModelLayout = LAYOUT, **config: Any) -> AdapterFile:
    """Tensors of these ranks; the config says them by patterns."""
    modules = {name: layout.modules[layout.index(name)] for name in ranks}
    pairs = [
        pair(name, module.in_features, module.out_features, rank=ranks[name], dtype="F32")
        for name, module in modules.items()
    ]
    content = file_of([tensor for each in pairs for tensor in each])
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": ranks}
    prefix = content[: header_size(content, len(content))]
    reader: Any = SimpleNamespace(nbytes=len(content))
    return AdapterFile(json.dumps(plain | config).encode(), prefix, reader)


def planned(
    merge: Merge, *parts: AdapterFile, layout: ModelLayout = LAYOUT, limits: Limits = Limits()
) -> MergePlan:
    keys = [AdapterKey(f"/adapters/{n}", ()) for n in range(len(parts))]
    return plan_merge(MergedKey.of(merge, keys), parts, layout, dtype="F32", limits=limits)


def linear(*weights: float) -> Merge:
    return Merge("linear", ["x"] * len(weights), weights)


def dare(density: float = 0.5) -> Merge:
    return Merge("dare_linear", ["x", "y"], [1, 1], density=density)


def ranks_of(plan: MergePlan) -> dict[str, int]:
    """What the plan's own header says, which is a valid file's."""
    header = parse_header(plan.prefix, plan.nbytes)
    body = bytes(plan.nbytes - len(plan.prefix))
    assert safetensors.torch.load(plan.prefix + body).keys() == {t.name for t in header.tensors}
    assert [(t.start, t.stop) for t in header.tensors] == [(t.start, t.stop) for t in plan.tensors]
    return {
        t.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): t.shape[0]
        for t in header.tensors
        if "lora_A" in t.name
    }


def test_modules_of_either_part_in_the_layouts_order() -> None:
    plan = planned(linear(1, 1), part({"lm_head": 2, Q: 4}), part({OUT: 3, Q: 5}))
    assert ranks_of(plan) == {Q: 9, OUT: 3, "lm_head": 2}
    assert [tensor.factor for tensor in plan.tensors] == [TensorRole.A, TensorRole.B] * 3
    assert [[n for n, _ in tensor.pairs] for tensor in plan.tensors[::2]] == [[0, 1], [1], [0]]
    spec = parse_config(plan.config, Limits())
    assert {name: spec.rank_of(name) for name in (Q, OUT, "lm_head")} == ranks_of(plan)
    assert {spec.scale_of(name) for name in (Q, OUT, "lm_head")} == {1.0}


@pytest.mark.parametrize(("bases", "named"), [("xx", "x"), ("xy", None)])
def test_the_bases_name_if_they_have_one(bases: str, named: str | None) -> None:
    parts = [part({Q: 4}, base_model_name_or_path=base) for base in bases]
    assert parse_config(planned(linear(1, 1), *parts).config, Limits()).base_model == named


def test_names_that_end_in_anothers_are_filled_up() -> None:
    """By PEFT's rules a pattern also means every module whose path ends in it."""
    outer, inner = "vision.layers.0.q", "layers.0.q"
    layout = layout_of((outer, 8, 8, 0), (inner, 8, 8, 0), ("x.q", 8, 8, 1))
    plan = planned(
        linear(1),
        part({outer: 4, inner: 2, "x.q": 4}, layout, rank_pattern={"^layers.0.q": 2}),
        layout=layout,
    )
    assert ranks_of(plan) == {outer: 4, inner: 4, "x.q": 4}
    assert {tensor.shape for tensor in plan.tensors} == {(4, 8), (8, 4)}
    assert [pair.a.shape for _, pair in plan.tensors[2].pairs] == [(2, 8)]


def test_a_config_that_would_be_too_long_is_filled_up() -> None:
    names = [f"model.layers.{n}.q" for n in range(12)]
    layout = layout_of(*((name, 8, 8, n) for n, name in enumerate(names)))
    ranks = {name: n % 5 + 1 for n, name in enumerate(names)}
    parts = [part(ranks, layout)]
    assert ranks_of(planned(linear(1), *parts, layout=layout)) == ranks
    short = Limits(max_config_bytes=len(parts[0].config))
    plan = planned(linear(1), *parts, layout=layout, limits=short)
    assert set(ranks_of(plan).values()) == {5}
    assert len(plan.config) <= len(parts[0].config)


GOOD = part({Q: 4})


@pytest.mark.parametrize(
    ("other", "kind", "problem"),
    [
        (part({Q: 3}), IncompatibleAdapterError, f"'{Q}': .*the parts have 4 and 3"),
        (part({Q: 4}, r=0), AdapterFormatError, r"part 2 \('1'\): .*r must be"),
        (replace(GOOD, prefix=b"\x09" + b"\0" * 7), AdapterFormatError, r"part 2 \('1'\): "),
    ],
)
def test_parts_that_cannot_be_merged(
    other: AdapterFile, kind: type[LoraxError], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        planned(dare(), GOOD, other)
    pair_of_two = part({Q: 4, OUT: 2}), part({Q: 4, OUT: 2})
    assert ranks_of(planned(dare(), *pair_of_two)) == {Q: 4, OUT: 2}, "a module's own affair"


def test_a_factor_that_no_float32_holds() -> None:
    large = part({Q: 4}, lora_alpha=1e38)
    planned(linear(1), large)
    with pytest.raises(
        AdapterFormatError, match=r"weight 20 times the scale of part 1 \(2.5e\+37\)"
    ):
        planned(linear(20), large)


@pytest.mark.parametrize(
    ("config", "rank", "start"),
    [
        ({}, 4, True),
        ({"init_lora_weights": "gaussian"}, 4, "gaussian"),
        # New layers have the largest rank of the first part.
        ({"rank_pattern": {"q": 4, "nowhere": 6}, "init_lora_weights": False}, 6, False),
    ],
)
def test_new_layers_are_those_that_peft_would_make(
    config: dict[str, Any], rank: int, start: object
) -> None:
    plan = planned(dare(), part({Q: 4, OUT: 4}, **config), GOOD)
    assert plan.new_layers == NewLayers(rank, ((24, 16), (16, 24)), start)
