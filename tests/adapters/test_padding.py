"""Padding: the contract's examples, and which pairs of rank and world size there are."""

from __future__ import annotations

from itertools import product

import pytest

from lorax_async.adapters import padded_rank
from lorax_async.errors import ConfigError, IncompatibleAdapterError


@pytest.mark.parametrize(
    ("rank", "world_size", "padded"),
    [
        (8, 1, 8),
        (12, 1, 16),
        (12, 2, 16),
        (33, 1, 48),
        (65, 8, 80),
        # by hand
        (1, 1, 8),
        (9, 1, 16),
        (16, 1, 16),
        (17, 1, 32),
        (256, 1, 256),
        (1, 8, 64),
        (64, 8, 64),
        (1, 3, 24),
        (24, 3, 24),
        (33, 3, 48),
        (40, 5, 40),
        (65, 5, 80),
        (100, 7, 112),
    ],
)
def test_ranks_are_padded(rank: int, world_size: int, padded: int) -> None:
    assert padded_rank(rank, world_size) == padded


@pytest.mark.parametrize(("rank", "world_size", "padded"), [(25, 3, 32), (41, 5, 48), (57, 7, 64)])
def test_what_the_processes_cannot_share_is_refused(
    rank: int, world_size: int, padded: int
) -> None:
    with pytest.raises(IncompatibleAdapterError) as caught:
        padded_rank(rank, world_size)
    assert f"rank {rank} is padded to {padded}" in str(caught.value)
    assert f"{world_size} processes" in str(caught.value)


def test_632_of_2048_pairs_are_refused() -> None:
    refused = 0
    for rank, world_size in product(range(1, 257), range(1, 9)):
        try:
            padded = padded_rank(rank, world_size)
        except IncompatibleAdapterError:
            refused += 1
        else:
            assert padded >= rank
            assert padded % world_size == 0
    assert refused == 632


@pytest.mark.parametrize("world_size", [0, -1, 1.0, True, "2", None])
def test_a_world_has_processes(world_size: object) -> None:
    with pytest.raises(ConfigError, match="world size"):
        padded_rank(8, world_size)  # type: ignore[arg-type]
