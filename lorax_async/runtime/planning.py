"""From an opened adapter to its transfer plan: everything that is checked before a byte moves."""

from __future__ import annotations

from functools import lru_cache

from lorax_async.config import LoaderConfig
from lorax_async.core.header import parse_header
from lorax_async.core.peft_config import parse_config
from lorax_async.core.sharding import Sharding
from lorax_async.core.transfer_plan import TransferPlan, plan_transfer
from lorax_async.io.ports import AdapterFile, Device

LARGE_PREFIX = 256 * 1024
"""A header of more bytes is parsed in a thread: it would hold the loop for too long."""

MANY_MEMBERS = 64
"""And so is a config of more members: PEFT writes some 40, and what is more may be patterns."""

REMEMBERED_PLANS = 32


class Planner:
    """Plans adapters for one layout, shard, dtype and device.

    A plan follows from config, header and size alone, and adapters that were trained alike differ
    in none of them; so the last plans are remembered by exactly these bytes.
    """

    def __init__(
        self, sharding: Sharding, config: LoaderConfig, device: Device, *, move_bytes: int
    ) -> None:
        self._sharding = sharding
        self._limits = config.limits
        self._dtype = config.storage_dtype
        self._alignment = device.alignment
        self._rank_multiple = device.rank_multiple
        self._move_bytes = move_bytes
        self._remembered = lru_cache(maxsize=REMEMBERED_PLANS)(self._plan)

    def is_long(self, file: AdapterFile) -> bool:
        """Whether planning would hold an event loop for longer than it should be held.

        A shard's plan takes about three times as long: every tensor is cut, and moved by itself.
        """
        return bool(self._sharding.cuts) or _is_large(file)

    def plan(self, file: AdapterFile) -> TransferPlan:
        """Check config, header and layout against each other. Pure; may take milliseconds.

        Raises
        ------
        AdapterFormatError, UnsupportedAdapterError, IncompatibleAdapterError
        """
        plan = self._plan if _is_large(file) else self._remembered
        return plan(file.config, file.prefix, file.reader.nbytes)

    def _plan(self, config: bytes, prefix: bytes, file_size: int) -> TransferPlan:
        spec = parse_config(config, self._limits)
        header = parse_header(prefix, file_size, self._limits)
        return plan_transfer(
            header,
            spec,
            self._sharding.whole,
            dtype=self._dtype,
            alignment=self._alignment,
            rank_multiple=self._rank_multiple,
            limits=self._limits,
            staging_move_bytes=self._move_bytes,
            cuts=self._sharding.cuts,
        )


def _is_large(file: AdapterFile) -> bool:
    return len(file.prefix) > LARGE_PREFIX or file.config.count(b":") > MANY_MEMBERS
