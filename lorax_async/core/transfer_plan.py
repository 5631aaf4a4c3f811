"""Which bytes of an adapter's file go where: checked spans, layout and dtype → layer groups.

Where dtype and rank fit the device, a group's bytes go there as they lie in the file; what does
not fit is cast, or padded to a multiple of the rank. The executor owns buffers, order and events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.header import Header
from lorax_async.core.layout import ModelLayout
from lorax_async.core.life import Needs
from lorax_async.core.moves import Convert, GroupPlan, Read, Row, Target, Vector, Zero, plan_group
from lorax_async.core.pairing import pair_tensors
from lorax_async.core.sharding import Cut, cut_pairs
from lorax_async.errors import ConfigError, UnsupportedAdapterError

__all__ = ["Convert", "GroupPlan", "Read", "Row", "TransferPlan", "Vector", "Zero", "plan_transfer"]


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """An adapter's groups with tensors, in layer order.

    `dtype` is what A and B are stored as on the device, `rank` its largest true rank, `nbytes` the
    sum of its extents, `file_bytes` the size of its file.
    """

    groups: tuple[GroupPlan, ...]
    dtype: str
    rank: int
    nbytes: int
    file_bytes: int
    layers: tuple[int, ...] = field(init=False)
    has_vectors: bool = field(init=False)
    _variants: tuple[Needs, Needs] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once, for thousands of adapters may share a plan.
        needs = _needs(self.groups, self.file_bytes)
        object.__setattr__(self, "layers", tuple(group.layer for group in self.groups))
        object.__setattr__(self, "has_vectors", any(group.vectors for group in self.groups))
        object.__setattr__(self, "_variants", (needs, replace(needs, holdable=True)))

    def needs(self, *, holdable: bool) -> Needs:
        """What the lifecycle has to know of it; adapters that share a plan share this.

        `holdable` as in `Needs`.
        """
        return self._variants[holdable]


def plan_transfer(
    header: Header,
    spec: AdapterSpec,
    layout: ModelLayout,
    *,
    dtype: str | None,
    alignment: int,
    rank_multiple: int,
    limits: Limits,
    staging_move_bytes: int,
    cuts: Sequence[Cut] = (),
) -> TransferPlan:
    """Plan how the adapter of this header and config reaches a device.

    Parameters
    ----------
    dtype
        "F32", "F16" or "BF16", as which it is stored there; None takes the layout's.
    alignment, rank_multiple
        What the device wants: every tensor starts on a multiple of `alignment` bytes, every rank
        is padded to a multiple of `rank_multiple`.
    limits
        The largest rank, file and sum of extents accepted.
    staging_move_bytes
        The most bytes that one `Convert` reads, and the most that it writes.
    cuts
        What a rank holds of each of the layout's modules (`Sharding.cuts`); empty: all of it.

    Raises
    ------
    AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError
        As `pair_tensors` does; the last also for more bytes than the limits accept.
    ConfigError
        One padded row does not fit into `staging_move_bytes`.
    """
    target = Target(dtype or layout.dtype, alignment, rank_multiple, staging_move_bytes)
    if 4 * (limits.max_rank + rank_multiple) > staging_move_bytes:
        raise ConfigError(
            f"staging moves of {staging_move_bytes} bytes are too small for rank"
            f" {limits.max_rank}; raise staging_bytes"
        )
    file_bytes = header.tensors[-1].stop if header.tensors else header.data_start
    check_size(file_bytes, "in its file", limits)
    pairs = pair_tensors(header, spec, layout, limits)
    if cuts:
        pairs = cut_pairs(pairs, cuts)
    groups = tuple(
        plan_group(layer, list(members), target)
        for layer, members in groupby(pairs, key=attrgetter("layer"))
    )
    nbytes = sum(group.nbytes for group in groups)
    check_size(nbytes, f"as {target.dtype} on the device", limits)
    rank = max(map(attrgetter("rank"), pairs))
    return TransferPlan(groups, target.dtype, rank, nbytes, file_bytes)


def _needs(groups: tuple[GroupPlan, ...], file_bytes: int) -> Needs:
    return Needs(
        tuple(group.nbytes for group in groups),
        tuple(sorted(range(len(groups)), key=lambda n: groups[n].spans[:1])),
        file_nbytes=file_bytes,
        weight=sum(max(len(group.rows) + len(group.vectors), len(group.spans)) for group in groups),
    )


def check_size(nbytes: int, where: str, limits: Limits) -> None:
    """Raises `UnsupportedAdapterError` for more bytes than the limits accept."""
    if nbytes > limits.max_adapter_bytes:
        raise UnsupportedAdapterError(
            f"the adapter has {nbytes:,} bytes {where}, over the limit of"
            f" {limits.max_adapter_bytes:,}; raise Limits.max_adapter_bytes to accept it"
        )
