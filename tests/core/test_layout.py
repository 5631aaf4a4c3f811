"""Layouts: order, lookup, checks, equality by value."""

from __future__ import annotations

import dataclasses
import pickle

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
    for position, module in enumerate(LAYOUT.modules):
        assert LAYOUT.index(module.name) == position


def test_a_name_that_the_base_lacks() -> None:
    with pytest.raises(KeyError):
        LAYOUT.index("layers.0.q_proj")
    assert LAYOUT.resolve("model.layers.2.q_proj") is None


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ("model.layers.0.q_proj", 1),
        ("layers.0.q_proj", 1),
        ("lm_head", 4),
        ("model.lm_head", None),
        ("model.model.layers.0.q_proj", None),
        ("ers.0.q_proj", None),
        ("", None),
    ],
)
def test_paths_of_the_bare_backbone_are_the_bases(path: str, position: int | None) -> None:
    assert LAYOUT.resolve(path) == position


def test_without_a_prefix_only_the_name_itself_counts() -> None:
    bare = dataclasses.replace(LAYOUT, backbone_prefix="")
    assert bare.resolve("layers.0.q_proj") is None
    assert bare.resolve("model.layers.0.q_proj") == 1


def test_the_bases_own_spelling_comes_first() -> None:
    twins = (
        Module("model.layers.0.x", 1, 1, 0, Parallel.ROW),
        Module("layers.0.x", 2, 2, 0, Parallel.ROW),
    )
    layout = ModelLayout(twins, 1, "F32", "model.")
    assert layout.resolve("layers.0.x") == 1
    assert layout.resolve("model.layers.0.x") == 0


def test_equal_by_value_in_every_process() -> None:
    twin = ModelLayout((BEFORE, FIRST, AFTER_FIRST, SECOND, HEAD), 2, "BF16", "model.")
    assert (twin, hash(twin), twin.fingerprint) == (LAYOUT, hash(LAYOUT), LAYOUT.fingerprint)
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT
    # Pinned: it names things outside the process, so it must not drift.
    assert LAYOUT.fingerprint == "5d64cec612decb58"


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(LAYOUT, dtype="F32"),
        dataclasses.replace(LAYOUT, num_layers=3),
        dataclasses.replace(LAYOUT, backbone_prefix=""),
        dataclasses.replace(LAYOUT, modules=LAYOUT.modules[1:]),
        *(
            dataclasses.replace(LAYOUT, modules=(BEFORE, FIRST, SECOND, HEAD, changed))
            for changed in (
                dataclasses.replace(AFTER_FIRST, name="model.layers.0.k_proj"),
                dataclasses.replace(AFTER_FIRST, in_features=9),
                dataclasses.replace(AFTER_FIRST, out_features=9),
                dataclasses.replace(AFTER_FIRST, layer=1),
                dataclasses.replace(AFTER_FIRST, parallel=Parallel.COLUMN),
                dataclasses.replace(AFTER_FIRST, transposed=True),
                dataclasses.replace(AFTER_FIRST, embedding=True),
                dataclasses.replace(AFTER_FIRST, parts=(Part(8),)),
                dataclasses.replace(AFTER_FIRST, parts=(Part(8, 2),)),
                dataclasses.replace(AFTER_FIRST, parts=(Part(4), Part(4))),
            )
        ),
    ],
)
def test_every_field_counts(other: ModelLayout) -> None:
    assert other != LAYOUT
    assert other.fingerprint != LAYOUT.fingerprint


def test_it_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LAYOUT.dtype = "F32"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("modules", "num_layers", "dtype", "text"),
    [
        ((), 1, "BF16", "at least one"),
        ((FIRST,), 0, "BF16", "at least one"),
        ((FIRST,), 1, "bfloat16", "dtype must be one of F32, F16, BF16"),
        ((FIRST, FIRST), 1, "BF16", "same name"),
        ((HEAD,), 1, "BF16", "outside -1 … 1"),
        ((dataclasses.replace(FIRST, layer=-2),), 1, "BF16", "outside"),
        ((dataclasses.replace(FIRST, in_features=0),), 1, "BF16", "positive sizes"),
        ((dataclasses.replace(FIRST, out_features=-8),), 1, "BF16", "positive sizes"),
        ((dataclasses.replace(FIRST, name=""),), 1, "BF16", "a name"),
        ((dataclasses.replace(FIRST, parts=(Part(4),)),), 1, "BF16", "not its output"),
        ((dataclasses.replace(FIRST, parts=(Part(8, 3),)),), 1, "BF16", "whole units"),
        ((dataclasses.replace(FIRST, parts=(Part(8, 0),)),), 1, "BF16", "whole units"),
        ((dataclasses.replace(FIRST, parts=(Part(8), Part(0))),), 1, "BF16", "whole units"),
    ],
)
def test_models_that_cannot_be(
    modules: tuple[Module, ...], num_layers: int, dtype: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        ModelLayout(modules, num_layers, dtype)
