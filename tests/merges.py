"""Merges of tiny adapters, and what they must come to."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tiny
from lorax_async.handle import AdapterHandle
from lorax_async.types import Merge
from tiny_sources import WEIGHTS

HALVES = Merge("linear", ["a", "b"], [0.5, -2])
DROPPED = Merge("dare_ties", ["a", "b"], [0.5, -2], density=0.5, seed=9)
BOTH = [pytest.param(merge, id=merge.strategy) for merge in (HALVES, DROPPED)]


def at(folder: Path, merge: Merge = HALVES) -> Merge:
    """The same of local folders."""
    parts = [folder / name for name in ("a", "b")]
    return Merge(merge.strategy, parts, merge.weights, merge.density, seed=merge.seed)


def weights_of(handle: AdapterHandle) -> dict[str, torch.Tensor]:
    return {
        f"{name} {factor}": tensor.clone()
        for name, found in handle.modules.items()
        for factor, tensor in (("a", found.a), ("b", found.b))
    }


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def assert_halves(handle: AdapterHandle, folder: Path) -> None:
    """The weighted sum of the two files' deltas (alpha 8, rank 4), in float64."""
    saved = [safetensors.torch.load_file(folder / name / WEIGHTS) for name in ("a", "b")]
    assert len(handle.modules) == len(saved[0]) / 2
    for name, found in handle.modules.items():
        module = f"base_model.model.{name}"
        expected = sum(
            weight
            * 2
            * each[f"{module}.lora_B.weight"].double()
            @ each[f"{module}.lora_A.weight"].double()
            for weight, each in zip((0.5, -2), saved, strict=True)
        )
        assert (found.rank, found.scale) == (8, 1)
        delta = found.b.double() @ found.a.double()
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)


def part_bytes() -> int:
    """Of the tensors of two adapters."""
    return 2 * sum(tensor.nbytes for tensor in tiny.tensors(0).values())
