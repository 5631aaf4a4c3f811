"""One group's way from its file to its extent, run in an I/O thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from lorax_async.core.arena import Extent
from lorax_async.core.moves import GroupPlan
from lorax_async.errors import AdapterFormatError
from lorax_async.io.ports import Device, FilePieces, Reader
from lorax_async.io.staging import StagingRing, zero


@dataclass(frozen=True, slots=True)
class GroupCopy:
    """What one copy needs: which bytes, of which file, into which extent and column."""

    reader: Reader
    group: GroupPlan
    dtype: str
    extent: Extent
    slot: int


class Transfer:
    """Casts and pads through the ring, lets the device move the rest, checks what arrived.

    `module_names` are the layout's, for errors; `check_finite` refuses NaN and infinity.
    """

    def __init__(
        self,
        device: Device,
        staging: StagingRing,
        module_names: Sequence[str],
        *,
        check_finite: bool,
    ) -> None:
        self._device = device
        self._staging = staging
        self._module_names = module_names
        self._check_finite = check_finite

    def run(self, copy: GroupCopy) -> float:
        """Move one group; returns the seconds that casts and padding took.

        Blocks; raises what the reader, the device or the check raises. Converted bytes are written
        before the device is asked, so that its rows come last.
        """
        staging_seconds = self._stage(copy)
        pieces = FilePieces(copy.reader, copy.group.reads)
        self._device.copy(pieces, copy.group.rows, copy.extent, copy.slot).result()
        if self._check_finite:
            self._require_finite(copy)
        return staging_seconds

    def _stage(self, copy: GroupCopy) -> float:
        group, started = copy.group, perf_counter()
        if group.converts or group.zeros:
            target = self._device.host_memory(copy.extent)
            self._staging.convert(copy.reader, group.converts, copy.dtype, target)
            zero(group.zeros, target)
        return perf_counter() - started

    def _require_finite(self, copy: GroupCopy) -> None:
        for row in copy.group.rows:
            operands = self._device.operands(row.module, copy.slot)
            assert operands is not None
            a, b, _ = operands
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AdapterFormatError(
                    f"module {self._module_names[row.module]!r} has NaN or infinite weights; "
                    "load it with check_finite=False if that is meant"
                )
