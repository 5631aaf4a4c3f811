"""How much of a stranger's adapter is accepted."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lorax_async.settings.requirements import require_positive

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a stranger's adapter is accepted. Bytes, or counts."""

    max_header_bytes: int = 2 * MiB
    max_tensors: int = 65_536
    max_name_bytes: int = 512
    max_dimensions: int = 8
    max_json_depth: int = 16
    max_config_bytes: int = 256 * KiB
    max_rank: int = 256
    max_adapter_bytes: int = 4 * GiB

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_positive(entry.name, getattr(self, entry.name))
