"""How LoRAX pads ranks: to its kernels' tiles, and for the processes that share a layer."""

from __future__ import annotations

from lorax_async.errors import ConfigError, IncompatibleAdapterError

LEAST_RANK = 8
"""Of each process."""

RANK_STEP = 16


def require_world_size(world_size: object) -> int:
    """How many processes share a layer. Raises `ConfigError` unless it is a positive integer."""
    if type(world_size) is not int or world_size < 1:
        raise ConfigError(f"a world size is a positive integer, not {world_size!r}")
    return world_size


def padded_rank(rank: int, world_size: int) -> int:
    """The rank with its padding: at least 8 for each process, above that a multiple of 16.

    Source: LoRAX, `pad_rank` in server/lorax_server/utils/sgmv.py.

    Raises
    ------
    IncompatibleAdapterError
        The processes cannot share the padded rank evenly.
    """
    least = LEAST_RANK * require_world_size(world_size)
    padded = least if rank <= least else -(-rank // RANK_STEP) * RANK_STEP
    if padded % world_size:
        raise IncompatibleAdapterError(
            f"rank {rank} is padded to {padded}, which {world_size} processes cannot share evenly;"
            f" use an adapter of rank {least} or less, or another world size"
        )
    return padded
