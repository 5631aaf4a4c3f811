"""Which modules of a decoder are given the same input, one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_async.core.layout import Module

_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def groups_of(modules: Iterable[Module]) -> dict[int, tuple[int, ...]]:
    """By the place of a module: the places of all that get its input, itself among them.

    Read off the names below one parent. It is a hint: kernels look at the tensor itself before they
    take what they computed of it for another module.
    """
    kinds = {name: kind for kind, names in enumerate(_TOGETHER) for name in names}
    found: dict[tuple[str, int, int], list[int]] = {}
    for index, module in enumerate(modules):
        parent, _, name = module.name.rpartition(".")
        if name in kinds and not module.embedding:
            found.setdefault((parent, kinds[name], module.in_features), []).append(index)
    return {index: tuple(group) for group in found.values() if len(group) > 1 for index in group}
