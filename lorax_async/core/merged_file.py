"""The config and the header of an adapter that is put together in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorax_async.config import Limits
from lorax_async.core.header_writing import Described, write_header
from lorax_async.core.pairing import MAX_MATCHING_STEPS
from lorax_async.core.peft_config import MAX_PATTERNS, parse_config
from lorax_async.core.peft_names import PREFIX, Part


class Entry(NamedTuple):
    """One tensor of the file."""

    module: str
    factor: Part
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.module}.lora_{self.factor.value}.weight"


def lay_out(entries: Sequence[Entry], dtype: str) -> tuple[bytes, list[tuple[Entry, int, int]]]:
    """The header of a safetensors file of these tensors, and where each lies, [start, stop)."""
    described = [Described(entry.name, dtype, entry.shape) for entry in entries]
    prefix, places = write_header(described)
    return prefix, [
        (entry, start, stop) for entry, (start, stop) in zip(entries, places, strict=True)
    ]


def describe(
    ranks: Mapping[str, int], bases: set[str | None], limits: Limits
) -> tuple[bytes, dict[str, int]]:
    """A config that gives each module its rank and the scale 1; and the ranks that it gives.

    Where a config cannot tell the modules' ranks apart, or would be too long, all have the largest.
    """
    base = bases.copy().pop() if len(bases) == 1 else None
    config = _config(ranks, base)
    if _says(config, ranks, limits):
        return config, dict(ranks)
    padded = dict.fromkeys(ranks, max(ranks.values()))
    return _config(padded, base), padded


def _config(ranks: Mapping[str, int], base: str | None) -> bytes:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return json.dumps(config, separators=(",", ":")).encode()


def _says(config: bytes, ranks: Mapping[str, int], limits: Limits) -> bool:
    """Whether every module has its rank by this config: a name may be the end of another's."""
    exceptions = len(ranks) - max(Counter(ranks.values()).values())
    characters = sum(2 * len(f"{PREFIX}{name}.lora_A.weight") for name in ranks)
    if exceptions > MAX_PATTERNS or 2 * exceptions * characters > MAX_MATCHING_STEPS:
        return False
    if len(config) > limits.max_config_bytes:
        return False
    spec = parse_config(config, limits)
    return all(spec.rank_of(name) == spec.alpha_of(name) == rank for name, rank in ranks.items())
