"""Merges in the loaders of a tensor-parallel server: every rank holds its part of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sharded
from lorax_async import AdapterLoader, LoaderConfig, Merge
from lorax_async.config import Shard
from merges import assert_same, weights_of

pytestmark = pytest.mark.usefixtures("nothing_left")

MERGES = [
    Merge("linear", ["a", "b"], [0.5, -2]),
    Merge("ties", ["a", "b"], [0.5, -2], density=0.5),
    Merge("dare_ties", ["a", "b"], [0.5, -2], density=0.5, seed=9),
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("merge", [pytest.param(merge, id=merge.strategy) for merge in MERGES])
async def test_a_rank_holds_its_part_of_a_merge(tmp_path: Path, merge: Merge, world: int) -> None:
    for seed, name in enumerate("ab"):
        sharded.write(tmp_path / name, seed=seed)

    async def load(shard: Shard | None) -> dict[str, torch.Tensor]:
        config = LoaderConfig(shard=shard)
        async with AdapterLoader(sharded.layout(), config) as loader:
            parts = [tmp_path / "a", tmp_path / "b"]
            wanted = Merge(merge.strategy, parts, merge.weights, merge.density, seed=merge.seed)
            async with await loader.load(wanted) as handle:
                return weights_of(handle)

    whole = await load(None)
    for rank in range(world):
        shard, expected = Shard(rank, world), dict[str, torch.Tensor]()
        for name, tensor in whole.items():
            module, _, factor = name.partition(" ")
            columns, rows = sharded.columns_of(module, shard), sharded.rows_of(module, shard)
            expected[name] = tensor[:, columns] if factor == "a" else tensor[rows]
        assert_same(await load(shard), expected)
