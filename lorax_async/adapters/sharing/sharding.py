"""LoRAX's way of sharing full weights among processes: it splits the rank where Megatron does not.

The loader's own shards are others. Both are exact; a server uses the one that its layers expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_async.adapters.sharing.padding import require_world_size
from lorax_async.core.layout import Part
from lorax_async.errors import ConfigError, IncompatibleAdapterError


@dataclass(frozen=True, slots=True)
class Share:
    """Process number `rank` of `world_size`."""

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_world_size(self.world_size)
        if type(self.rank) is not int or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"a rank is from 0 to {self.world_size - 1} in a world of {self.world_size}, not"
                f" {self.rank!r}"
            )

    def of(self, tensor: torch.Tensor, dim: int, what: str, unit: int = 1) -> torch.Tensor:
        """The piece of this process along a dimension, a view. `unit` elements stay together.

        Raises `IncompatibleAdapterError` where the pieces would not be equal.
        """
        size = tensor.shape[dim]
        if size % (unit * self.world_size):
            units = f"{size:,}" if unit == 1 else f"{size:,} in units of {unit:,}"
            raise IncompatibleAdapterError(
                f"{what}: {units} cannot be shared evenly by {self.world_size} processes; use"
                " another world size"
            )
        piece = size // self.world_size
        return tensor.narrow(dim, self.rank * piece, piece)


def shard_a(a: torch.Tensor, share: Share, *, row_parallel: bool, what: str) -> torch.Tensor:
    """Of A `[in, r]`, a piece of `in` where the base is cut by its input, else of the rank."""
    return share.of(a, 0 if row_parallel else 1, f"A of {what}")


def shard_b(b: torch.Tensor, share: Share, parts: Sequence[Part], what: str) -> torch.Tensor:
    """Of B `[r, out]`, a piece of `out`: of a fused one, the pieces of all its parts together.

    Raises `IncompatibleAdapterError` where the parts are not its output, or not shared evenly.
    """
    if not parts:
        return share.of(b, 1, f"B of {what}")
    sizes = [part.size for part in parts]
    if sum(sizes) != b.shape[1]:
        raise IncompatibleAdapterError(
            f"B of {what} has {b.shape[1]:,} output features, and its parts {sum(sizes):,}; use an"
            " adapter of this base"
        )
    pieces = [
        share.of(whole, 1, f"B of {what}", part.unit)
        for whole, part in zip(torch.split(b, sizes, 1), parts, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
