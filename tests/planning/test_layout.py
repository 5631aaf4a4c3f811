"""Layouts: order, lookup, checks, equality by value."""

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from lorax_async.errors import ConfigError
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism

HEAD = Module("lm_head", 8, 32, 2, Parallelism.COLUMN)
FIRST = Module("model.layers.0.q_proj", 8, 8, 0, Parallelism.COLUMN)
AFTER_FIRST = Module("model.layers.0.o_proj", 8, 8, 0, Parallelism.ROW)
SECOND = Module("model.layers.1.q_proj", 8, 4, 1, Parallelism.COLUMN)
BEFORE = Module("model.projector", 4, 8, -1, Parallelism.REPLICATED)
LAYOUT = ModelLayout((HEAD, SECOND, FIRST, AFTER_FIRST, BEFORE), 2, "BF16", "model.")


def test_modules_are_in_layer_order_and_within_a_layer_as_given() -> None:
    assert LAYOUT.modules == (BEFORE, FIRST, AFTER_FIRST, SECOND, HEAD)
    assert [LAYOUT.index(module.name) for module in LAYOUT.modules] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        LAYOUT.index("layers.0.q_proj")


BARE = replace(LAYOUT, backbone_prefix="")
TWINS = (replace(FIRST, name="model.x"), replace(FIRST, name="x"))


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        (LAYOUT, {"model.layers.0.q_proj": 1, "layers.0.q_proj": 1, "lm_head": 4}),
        (LAYOUT, dict.fromkeys(["model.layers.2.q_proj", "model.lm_head", "ers.0.q_proj", ""])),
        (LAYOUT, {"model.model.layers.0.q_proj": None}),
        (BARE, {"layers.0.q_proj": None, "model.layers.0.q_proj": 1}),
        # The base's own spelling comes first.
        (ModelLayout(TWINS, 1, "F32", "model."), {"x": 1, "model.x": 0}),
    ],
)
def test_paths_of_the_bare_backbone_are_the_bases(
    layout: ModelLayout, positions: dict[str, int | None]
) -> None:
    assert {path: layout.resolve(path) for path in positions} == positions


def test_equal_by_value_in_every_process() -> None:
    twin = ModelLayout((BEFORE, FIRST, AFTER_FIRST, SECOND, HEAD), 2, "BF16", "model.")
    assert (twin, hash(twin), twin.fingerprint) == (LAYOUT, hash(LAYOUT), LAYOUT.fingerprint)
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT
    # Pinned: it names things outside the process, so it must not drift.
    assert LAYOUT.fingerprint == "5d64cec612decb58"
    with pytest.raises(FrozenInstanceError):
        LAYOUT.dtype = "F32"  # type: ignore[misc]


PARTS = ((FusedPart(8),), (FusedPart(8, 2),), (FusedPart(4), FusedPart(4)))
CHANGES: list[dict[str, Any]] = [
    *({"name": "model.layers.0.k_proj"}, {"in_features": 9}, {"out_features": 9}, {"layer": 1}),
    *({"parallel": Parallelism.COLUMN}, {"transposed": True}, {"embedding": True}),
    *({"parts": parts} for parts in PARTS),
]


def test_every_field_counts() -> None:
    others = [replace(LAYOUT, dtype="F32"), replace(LAYOUT, num_layers=3), BARE]
    others.append(replace(LAYOUT, modules=LAYOUT.modules[1:]))
    others += [
        replace(LAYOUT, modules=(BEFORE, FIRST, SECOND, HEAD, replace(AFTER_FIRST, **change)))
        for change in CHANGES
    ]
    assert LAYOUT not in others
    assert len({LAYOUT.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modules": ()}, "at least one"),
        ({"num_layers": 0}, "at least one"),
        ({"dtype": "bfloat16"}, "dtype must be one of F32, F16, BF16"),
        ({"modules": (FIRST, FIRST)}, "same name"),
        ({"modules": (HEAD,), "num_layers": 1}, "outside -1 … 1"),
        ({"modules": (replace(FIRST, layer=-2),)}, "outside"),
        ({"modules": (replace(FIRST, in_features=0),)}, "positive sizes"),
        ({"modules": (replace(FIRST, out_features=-8),)}, "positive sizes"),
        ({"modules": (replace(FIRST, name=""),)}, "a name"),
        ({"modules": (replace(FIRST, parts=(FusedPart(4),)),)}, "do not sum to its output"),
        ({"modules": (replace(FIRST, parts=(FusedPart(8, 3),)),)}, "whole units"),
        ({"modules": (replace(FIRST, parts=(FusedPart(8, 0),)),)}, "whole units"),
        ({"modules": (replace(FIRST, parts=(FusedPart(8), FusedPart(0))),)}, "whole units"),
    ],
)
def test_models_that_cannot_be(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replace(LAYOUT, **changes)
