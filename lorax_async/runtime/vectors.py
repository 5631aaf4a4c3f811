"""Where the biases and magnitudes of one adapter lie while it is in its slot."""

from __future__ import annotations

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.life import Grant
from lorax_async.core.peft_names import Part
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.io.ports import Device
from lorax_async.io.staging import TORCH_DTYPES


class Vectors:
    """The vectors of one stay in a slot; an object of its own, which ends with the stay."""

    def __init__(self, plan: TransferPlan, grant: Grant) -> None:
        self._places = {
            (vector.module, vector.part): (
                Extent(extent.offset + vector.offset, vector.nbytes),
                TORCH_DTYPES[vector.dtype],
            )
            for group, extent in zip(plan.groups, grant.extents, strict=True)
            for vector in group.vectors
        }

    @property
    def modules(self) -> list[int]:
        """Which modules of the layout have one."""
        return [module for module, _ in self._places]

    def view(self, device: Device, module: int, part: Part) -> torch.Tensor | None:
        """`[out]`, in the file's dtype; None if the adapter has none for this module.

        `module` indexes the layout's. On the device once the module's layer is ready.
        """
        place = self._places.get((module, part))
        return None if place is None else device.view(place[0]).view(place[1])
