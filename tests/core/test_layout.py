"""Layouts: order, lookup, checks, equality by value."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from lorax_async.core.layout import ModelLayout, Module, Parallel, Part
from lorax_async.errors import ConfigError

HEAD = Module("lm_head", 8, 32, 2, Parallel.COLUMN)
FIRST = Module("model.layers.0.q_proj", 8, 8, 0, Parallel.COLUMN)
AFTER_FIRST = Module("model.layers.0.o_proj", 8, 8, 0, Parallel.ROW)
SECOND = Module("model.layers.1.q_proj", 8, 4, 1, Parallel.COLUMN)
BEFORE = Module("model.projector", 4, 8, -1, Parallel.REPLICATED)
LAYOUT = ModelLayout((HEAD, SECOND, FIRST, AFTER_FIRST, BEFORE), 2, "BF16", "model.")


def test_modules_are_in_layer_order_and_within_a_layer_as_given() -> None:
    assert LAYOUT.modules == (BEFORE, FIRST, AFTER_FIRST, SECOND, HEAD)
    assert [LAYOUT.index(module.name) for module in LAYOUT.modules] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        LAYOUT.index("layers.0.q_proj")


BARE = dataclasses.replace(LAYOUT, backbone_prefix="")
TWINS = ModelLayout(
    (Module("model.x", 1, 1, 0, Parallel.ROW), Module("x", 2, 2, 0, Parallel.ROW)),
    1,
    "F32",
    "model.",
)


@pytest.mark.parametrize(
    ("layout", "path", "position"),
    [
        (LAYOUT, "model.layers.0.q_proj", 1),
        (LAYOUT, "layers.0.q_proj", 1),
        (LAYOUT, "lm_head", 4),
        (LAYOUT, "model.layers.2.q_proj", None),
        (LAYOUT, "model.lm_head", None),
        (LAYOUT, "model.model.layers.0.q_proj", None),
        (LAYOUT, "ers.0.q_proj", None),
        (LAYOUT, "", None),
        (BARE, "layers.0.q_proj", None),
        (BARE, "model.layers.0.q_proj", 1),
        (TWINS, "x", 1),  # the base's own spelling comes first
        (TWINS, "model.x", 0),
    ],
)
def test_paths_of_the_bare_backbone_are_the_bases(
    layout: ModelLayout, path: str, position: int | None
) -> None:
    assert layout.resolve(path) == position


def test_equal_by_value_in_every_process() -> None:
    twin = ModelLayout((BEFORE, FIRST, AFTER_FIRST, SECOND, HEAD), 2, "BF16", "model.")
    assert (twin, hash(twin), twin.fingerprint) == (LAYOUT, hash(LAYOUT), LAYOUT.fingerprint)
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT
    # Pinned: it names things outside the process, so it must not drift.
    assert LAYOUT.fingerprint == "5d64cec612decb58"


CHANGES: list[dict[str, Any]] = [
    {"name": "model.layers.0.k_proj"},
    {"in_features": 9},
    {"out_features": 9},
    {"layer": 1},
    {"parallel": Parallel.COLUMN},
    {"transposed": True},
    {"embedding": True},
    {"parts": (Part(8),)},
    {"parts": (Part(8, 2),)},
    {"parts": (Part(4), Part(4))},
]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F32"},
        {"num_layers": 3},
        {"backbone_prefix": ""},
        {"modules": LAYOUT.modules[1:]},
        *(
            {"modules": (BEFORE, FIRST, SECOND, HEAD, dataclasses.replace(AFTER_FIRST, **change))}
            for change in CHANGES
        ),
    ],
)
def test_every_field_counts(changes: dict[str, Any]) -> None:
    other = dataclasses.replace(LAYOUT, **changes)
    assert other != LAYOUT
    assert other.fingerprint != LAYOUT.fingerprint


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modules": ()}, "at least one"),
        ({"num_layers": 0}, "at least one"),
        ({"dtype": "bfloat16"}, "dtype must be one of F32, F16, BF16"),
        ({"modules": (FIRST, FIRST)}, "same name"),
        ({"modules": (HEAD,), "num_layers": 1}, "outside -1 … 1"),
        *(
            ({"modules": (dataclasses.replace(FIRST, **change),)}, text)
            for change, text in [
                ({"layer": -2}, "outside"),
                ({"in_features": 0}, "positive sizes"),
                ({"out_features": -8}, "positive sizes"),
                ({"name": ""}, "a name"),
                ({"parts": (Part(4),)}, "not its output"),
                ({"parts": (Part(8, 3),)}, "whole units"),
                ({"parts": (Part(8, 0),)}, "whole units"),
                ({"parts": (Part(8), Part(0))}, "whole units"),
            ]
        ),
    ],
)
def test_models_that_cannot_be(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(LAYOUT, **changes)
