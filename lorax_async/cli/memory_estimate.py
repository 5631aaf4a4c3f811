"""Estimate what adapters take on a device, without loading them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from lorax_async.cli.command_line import SIMULATION, adapter_folders
from lorax_async.config import Limits
from lorax_async.devices.base import Device
from lorax_async.devices.staging import MOVE_BYTES
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.safetensors import TensorDescription, parse_header, write_header
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.arena import FreeRuns, kinds_of
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.sources.local import CONFIG, find_trusted_adapter, open_weights


class AdapterKind(NamedTuple):
    """Adapters with equal needs. Without a rank, only their bytes are known."""

    rank: int | None
    needs: GroupSizes

    @property
    def device_bytes(self) -> int:
        return sum(self.needs.group_nbytes)


class MemoryEstimate(NamedTuple):
    """The needs of adapters on one device. Blocks while it reads adapters on the disk.

    `dtype` is that on the device, in the file format's spelling, or None for the layout's. Files
    that are not on the disk have `file_dtype` and adapt modules whose names end in `targets`; if
    there are none, all linear modules of the layers.
    """

    layout: ModelLayout
    device: type[Device]
    dtype: str | None
    file_dtype: str
    targets: Sequence[str]

    def of_text(self, text: str) -> Iterator[tuple[str, AdapterKind, int]]:
        """Yield the name, kind and count of each adapter in a folder, or of COUNTxRANK.

        Raises `ConfigError`, and for a folder what a load would raise.
        """
        generated = re.fullmatch("([0-9]{1,9})x([0-9]{1,4})", text)
        if Path(text).is_dir():
            for folder in adapter_folders(Path(text)):
                yield folder.resolve().name, self.of_folder(folder), 1
        elif generated is not None:
            count, rank = int(generated[1]), int(generated[2])
            yield f"r{rank}", self.of_rank(rank), count
        else:
            raise ConfigError(
                f"{shorten(text)!r} is not a folder or COUNTxRANK; {SIMULATION} reads lists"
            )

    def of_folder(self, folder: Path) -> AdapterKind:
        """Return the kind of an adapter on the disk. Raises what a load would raise."""
        try:
            weights = open_weights(find_trusted_adapter(folder, Limits()), Limits())
            with closing(weights.reader) as reader:
                return self._plan((folder / CONFIG).read_bytes(), weights.prefix, reader.nbytes)
        except LoraxError as error:
            raise error.located(id=str(folder)) from error

    def of_rank(self, rank: int) -> AdapterKind:
        """Return the kind of an adapter with this rank on every target."""
        tensors, names = [], set[str]()
        for module in self.layout.modules:
            last = module.name.rpartition(".")[2]
            in_layers = 0 <= module.layer < self.layout.num_layers
            if module.embedding or not (last in self.targets if self.targets else in_layers):
                continue
            names.add(last)
            for part, rows, columns in (
                ("A", rank, module.in_features),
                ("B", module.out_features, rank),
            ):
                name = f"base_model.model.{module.name}.lora_{part}.weight"
                tensors.append(TensorDescription(name, self.file_dtype, (rows, columns)))
        if (missing := set(self.targets) - names) or not names:
            raise ConfigError(f"the base has no linear modules named {', '.join(sorted(missing))}")
        prefix, ranges = write_header(tensors)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(names),
        }
        return self._plan(json.dumps(config).encode(), prefix, ranges[-1][1])

    def _plan(self, config: bytes, prefix: bytes, nbytes: int) -> AdapterKind:
        plan = plan_transfer(
            parse_header(prefix, nbytes, Limits()),
            parse_config(config, Limits()),
            self.layout,
            dtype=self.dtype,
            alignment=self.device.alignment,
            rank_multiple=self.device.rank_multiple,
            limits=Limits(),
            staging_move_bytes=MOVE_BYTES,
        )
        return AdapterKind(plan.rank, plan.needs(holdable=False))


def count_fitting(needs: GroupSizes, nbytes: int, alignment: int, max_slots: int) -> int:
    """Count the adapters with these needs that fit an empty device."""
    free, kinds = FreeRuns.of_whole(nbytes & -alignment), kinds_of(needs.group_nbytes, alignment)
    return next(n for n in range(max_slots + 1) if n == max_slots or free.take(kinds) is None)
