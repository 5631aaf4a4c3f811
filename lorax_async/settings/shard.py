"""Which part of a tensor-parallel base a loader is for."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.errors import ConfigError
from lorax_async.settings.requirements import require_count, require_positive


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of the `world_size` parts of every tensor-parallel module a loader holds: the `rank`th.

    Raises `ConfigError` unless 0 <= rank < world_size.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_positive("world_size", self.world_size)
        require_count("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside 0 … {self.world_size - 1}: a world of"
                f" {self.world_size} counts its ranks from 0"
            )
