"""What PEFT draws at random while it merges, and in which order.

`add_weighted_adapter` (peft 0.21.2) first makes the new adapter, whose layers it initialises as the
first one's config says, and then, module by module, A before B, adapter by adapter, drops weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.layout import Module
from lorax_async.core.peft_fields import WHAT
from lorax_async.core.strict_json import parse_object
from lorax_async.merge import Merge


class Start(NamedTuple):
    """The initialisation of one module: so many uniform numbers, then one tensor of normal ones."""

    uniforms: int
    normals: int


def starts_of(
    merge: Merge, first: AdapterSpec, config: bytes, modules: Sequence[Module], limits: Limits
) -> tuple[Start, ...]:
    """One for each of the merged modules, in their order; none if nothing is drawn.

    `first` and `config` are of the merge's first adapter. All is as in PEFT for its usual starts;
    for "orthogonal" and "mica", which draw more, the numbers that follow are others.
    """
    if not merge.drops or merge.density == 1:
        return ()
    rank = max([first.rank, *(int(entry.value) for entry in first.rank_patterns)])
    start = parse_object(
        config, what=WHAT, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
    ).get("init_lora_weights", True)
    return tuple(
        _start(start, rank * module.in_features, rank * module.out_features) for module in modules
    )


def _start(start: object, a: int, b: int) -> Start:
    """Of A with `a` elements and B with `b`: two linear layers are made, then A is drawn again."""
    if start is True:
        return Start(a + b + a, 0)
    gaussian = isinstance(start, str) and start.lower() == "gaussian"
    return Start(a + b, a if gaussian else 0)
