"""Merge under LoRAX's names (`lorax_server.utils.merges`), with PEFT's numbers.

To make a merge resident, load the `Merge` from `AdapterParameters.merge`; this module is for code
that merges module maps itself. It corrects LoRAX's errors: its "linear" sums A and B separately, so
that each adapter's A meets the others' B; its weights apply twice, in A and in B; all scales but
the first adapter's are ignored; and DARE does not rescale the kept weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.functional import pad

from lorax_async.adapters.base import Content, ModuleMap, OpenModuleMap, open_files
from lorax_async.adapters.lora import LoraConfig
from lorax_async.concurrency import in_thread
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UsageError, shorten
from lorax_async.formats.peft_names import TensorRole
from lorax_async.sources.merges import NewLayers, combine, make_generator
from lorax_async.types import MAX_FACTOR, MajoritySign, Merge, PartId, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterParameters:
    """The merge parameters of a LoRAX request. Case of strategies and signs is ignored.

    `weights` default to 1. The density has no default, and must not be 0.
    """

    adapter_ids: Sequence[PartId]
    weights: Sequence[float] = ()
    merge_strategy: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0

    @property
    def merge(self) -> Merge:
        """The merge as an id for a loader. Raises `UsageError` as `Merge` does."""
        return Merge(
            cast(Strategy, self.merge_strategy.lower()),
            refs=self.adapter_ids,
            weights=self.weights or [1.0] * len(self.adapter_ids),
            density=self.density,
            majority_sign=cast(MajoritySign, self.majority_sign_method.lower()),
            seed=self.seed,
        )


def merge_adapters(
    adapters: Sequence[tuple[ModuleMap, LoraConfig]], merge_params: AdapterParameters
) -> tuple[ModuleMap, LoraConfig]:
    """Merge several module maps; return one with its config. Blocks if the maps hold files.

    Parameters
    ----------
    adapters
        Module map and config of each of `merge_params.adapter_ids`, in this order. DARE drops the
        same weights as PEFT if the first map has all modules, in the model's order.

    Returns
    -------
    Float32 tensors, all of the config's rank (smaller ranks padded with zeros), with the scale 1:
    all scales and weights are in A and B.

    Raises
    ------
    AdapterFormatError
        A module's scale, or its weight times its scale, is beyond float32.
    IncompatibleAdapterError
        Shapes do not fit each other, A and B are no pair, or a strategy's ranks are not equal.
    UsageError
        The parameters are no valid merge.
    """
    merge = merge_params.merge
    if len(adapters) != len(merge.refs):
        raise UsageError(f"{len(merge.refs)} adapter_ids, but {len(adapters)} adapters")
    with ExitStack() as stack:
        open_adapters = [(stack.enter_context(open_files(one)), config) for one, config in adapters]
        return _merge(merge, open_adapters)


def _merge(
    merge: Merge, adapters: Sequence[tuple[OpenModuleMap, LoraConfig]]
) -> tuple[ModuleMap, LoraConfig]:
    modules = dict.fromkeys(name for module_map, _ in adapters for name in module_map)
    work = _Merging(merge, adapters, list(modules))
    merged = {
        name: (work.merge_factor(name, TensorRole.A), work.merge_factor(name, TensorRole.B))
        for name in modules
    }
    first = adapters[0][1]
    rank = max((len(a) for a, _ in merged.values()), default=first.r)
    config = LoraConfig(
        base_model_name_or_path=first.base_model_name_or_path,
        r=rank,
        target_modules=list(modules),
        fan_in_fan_out=first.fan_in_fan_out,
        lora_alpha=rank,
        use_rslora=False,
    )
    return {name: work.entry(name, *merged[name], rank) for name in modules}, config


async def merge_adapters_async(
    adapters: Sequence[tuple[ModuleMap, LoraConfig]], merge_params: AdapterParameters
) -> tuple[ModuleMap, LoraConfig]:
    """Call `merge_adapters` in a thread."""
    return await in_thread(lambda _: merge_adapters(adapters, merge_params))


class _Merging:
    def __init__(
        self,
        merge: Merge,
        adapters: Sequence[tuple[OpenModuleMap, LoraConfig]],
        modules: Sequence[str],
    ) -> None:
        self._merge = merge
        self._adapters = adapters
        drawn = self._new_layers(modules) if merge.drops else None
        self._generator = None if drawn is None else make_generator(merge, drawn)

    def merge_factor(self, module: str, part: TensorRole) -> torch.Tensor:
        """Merge all adapters' A, or B, of one module."""
        inputs = self._inputs(module, part)
        self._require_fit(module, part, [_shape(*content) for content, _ in inputs])
        if part is TensorRole.B:  # then both are matrices
            self._require_pairs(module)
        tensors = [_read(*content) for content, _ in inputs]
        factors = [factor for _, factor in inputs]
        return combine(self._merge, part, tensors, factors, self._generator)

    def entry(
        self, module: str, a: torch.Tensor, b: torch.Tensor, rank: int
    ) -> Mapping[str, tuple[torch.Tensor, str]]:
        """Return the module map's entry, padded with zeros to `rank`."""
        missing = rank - len(a)
        padded = {TensorRole.A: pad(a, (0, 0, 0, missing)), TensorRole.B: pad(b, (0, missing))}
        names = {part: self._inputs(module, part)[0][0][1] for part in _FACTORS}
        return {f"lora_{part.value}": (padded[part], names[part]) for part in _FACTORS}

    def _inputs(self, module: str, part: TensorRole) -> list[tuple[_Place, tuple[float, float]]]:
        """Return the tensors of all adapters that change the module, with weight and scale."""
        return [
            (module_map[module][f"lora_{part.value}"], (weight, _scale(module, config, weight)))
            for (module_map, config), weight in zip(
                self._adapters, self._merge.weights, strict=True
            )
            if module in module_map
        ]

    def _new_layers(self, modules: Sequence[str]) -> NewLayers:
        """Return the layers for which PEFT draws initial weights."""
        module_map, config = self._adapters[0]
        rank = max([config.r, *map(config.rank_of, module_map)])
        shapes = [
            [_shape(*self._inputs(name, part)[0][0]) for part in _FACTORS] for name in modules
        ]
        return NewLayers(rank, tuple((a[-1], b[0]) for a, b in shapes), start=True)

    def _require_pairs(self, module: str) -> None:
        """Raise unless A and B have equal ranks: else adapters' ranks would be misaligned."""
        of_a, of_b = (self._inputs(module, part) for part in _FACTORS)
        for (a, _), (b, _) in zip(of_a, of_b, strict=True):
            if _shape(*a)[0] != _shape(*b)[1]:
                raise IncompatibleAdapterError(
                    f"module {shorten(module, 200)!r}: A {list(_shape(*a))} and B"
                    f" {list(_shape(*b))} are no pair"
                )

    def _require_fit(
        self, module: str, part: TensorRole, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        linear, along = self._merge.strategy == "linear", 0 if part is TensorRole.A else 1
        sizes = {shape[1 - along] if linear else shape for shape in shapes}
        if len(sizes) > 1 or any(len(shape) != 2 for shape in shapes):
            shown = " and ".join(str(list(shape)) for shape in shapes)
            raise IncompatibleAdapterError(
                f"module {shorten(module, 200)!r}: {self._merge.strategy!r} cannot merge"
                f" lora_{part.value} of the shapes {shown}"
            )


_Place = tuple[Content, str]
_FACTORS = (TensorRole.A, TensorRole.B)


def _scale(module: str, config: LoraConfig, weight: float) -> float:
    """Return an adapter's scale; raise `AdapterFormatError` if float32 cannot hold the factors."""
    scale = config.scale_of(module)
    if not max(abs(scale), abs(weight * scale)) <= MAX_FACTOR:
        raise AdapterFormatError(
            f"module {shorten(module, 200)!r} would be scaled by {scale:g} and weighted by"
            f" {weight:g}, which together no float32 holds; lower the weight, or correct"
            " lora_alpha or alpha_pattern in the config"
        )
    return scale


def _shape(content: Content, key: str) -> tuple[int, ...]:
    return tuple(content.shape) if isinstance(content, torch.Tensor) else content.shape(key)


def _read(content: Content, key: str) -> torch.Tensor:
    return content if isinstance(content, torch.Tensor) else content.read(key)
