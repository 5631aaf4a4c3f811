"""Drop-in names of `lorax_server.adapters.lora`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch

from lorax_async.adapters.base import (
    AdapterConfig,
    AdapterModel,
    AdapterWeights,
    ModuleMap,
    open_files,
)
from lorax_async.adapters.batches import (
    LORA,
    AdapterBatchMetadata,
    BatchAdapterWeights,
    BatchLoraWeights,
    RankSegments,
)
from lorax_async.adapters.layers import (
    FACTORS,
    Layer,
    StackedLayers,
    as_stored,
    layers_of,
    load_layers,
    modules_by_type,
    stack_layers,
)
from lorax_async.adapters.weights_file import (
    EMBEDDING,
    LIMITS,
    WeightsFile,
    adapter_folder,
    inexpressible,
    naming_adapter,
    plain_module,
    read_small,
)
from lorax_async.concurrency import IsWanted, in_thread
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    InternalError,
    UsageError,
    shorten,
    shorten_repr,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import PREFIX
from lorax_async.handle import AdapterHandle
from lorax_async.planning.pairing import check_matching
from lorax_async.sources.local import CONFIG
from lorax_async.types import AdapterSpec, ModulePattern

__all__ = [
    "LORA",
    "AdapterBatchMetadata",
    "AdapterConfig",
    "AdapterWeights",
    "BatchAdapterWeights",
    "BatchLoraWeights",
    "LoraConfig",
    "LoraWeights",
    "ModuleMap",
    "RankSegments",
    "get_scaling_factor",
]


_MAX_FLOAT = sys.float_info.max
_SHOWN = 3


def get_scaling_factor(lora_alpha: float, r: int, uses_rslora: bool = False) -> float:
    """Return the factor of a delta with the rank `r`, without padding."""
    return lora_alpha / (sqrt(r) if uses_rslora else r)


@dataclass(frozen=True, slots=True)
class LoraConfig(AdapterConfig):
    """The data of `adapter_config.json` under LoRAX's names. Immutable.

    `r` is the true rank: loaded weights have the rank that they were padded to, before they are
    shared out, in `padded_rank`, which is not part of equality. `fan_in_fan_out` describes the
    base; the file's A and B are not affected.
    """

    r: int
    target_modules: list[str] | str | None  # as written: nothing here compiles it
    fan_in_fan_out: bool
    lora_alpha: float
    use_rslora: bool
    padded_rank: int | None = field(default=None, compare=False, kw_only=True)
    _rank_patterns: tuple[ModulePattern, ...] = field(default=(), repr=False, kw_only=True)
    _alpha_patterns: tuple[ModulePattern, ...] = field(default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= _MAX_FLOAT:
            raise UsageError(
                f"r is a positive integer that a float holds, not {shorten_repr(self.r)}"
            )
        if not (isinstance(self.lora_alpha, int | float) and abs(self.lora_alpha) <= _MAX_FLOAT):
            raise UsageError(f"lora_alpha is a finite number, not {shorten_repr(self.lora_alpha)}")

    @classmethod
    def load(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Read an adapter's config. Blocks: it fetches and reads a file, and imports peft.

        `adapter_id` is a local folder (a `pathlib.Path`, or a str that begins with "/", "./" or
        "../") or `org/name[@revision]` on the hub, by way of the standard hub cache. `api_token` is
        the hub's; None is this machine's own, if it has one.

        Raises
        ------
        InvalidAdapterIdError, ConfigError, UsageError
            The id or the token is impossible, or the source is not available here.
        AdapterNotFoundError, AccessDeniedError, FetchError
            There is no such adapter, none that the token may see, or it cannot be read.
        AdapterFormatError, UnsupportedAdapterError
            The config is malformed, or turns on what plain LoRA does not describe.
        """
        with naming_adapter(adapter_id):
            folder = adapter_folder(adapter_id, api_token, weights=False)
            spec = parse_config(read_small(folder, CONFIG, LIMITS.max_config_bytes), LIMITS)
            for has_it, feature in ((spec.dora, "DoRA"), (spec.lora_bias, "lora_bias")):
                if has_it:
                    raise inexpressible("the config", feature)
            targets = list(spec.targets) if isinstance(spec.targets, tuple) else spec.targets
            values: dict[str, Any] = {
                "base_model_name_or_path": spec.base_model,
                "r": spec.rank,
                "target_modules": targets,
                "fan_in_fan_out": spec.fan_in_fan_out,
                "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
                "use_rslora": spec.rslora,
            }
            _require_peft_agrees(values)
        return cls(**values, _rank_patterns=spec.rank_patterns, _alpha_patterns=spec.alpha_patterns)

    @classmethod
    async def load_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Call `load` in a thread. Import peft before serving: its import stalls all threads."""
        return await in_thread(lambda _: cls.load(adapter_id, api_token))

    @property
    def spec(self) -> AdapterSpec:
        """The config in this package's form."""
        return AdapterSpec(
            rank=self.r,
            alpha=float(self.lora_alpha),
            rslora=self.use_rslora,
            rank_patterns=self._rank_patterns,
            alpha_patterns=self._alpha_patterns,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def rank_of(self, module: str) -> int:
        """Return one module's true rank, by the config's patterns."""
        return self.spec.rank_of(module)

    def scale_of(self, module: str) -> float:
        """Return one module's scale, by the config's patterns."""
        return self.spec.scale_of(module)

    def map_weights_for_model(
        self,
        adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile,
        weight_names: Sequence[str],
    ) -> tuple[ModuleMap, set[str]]:
        """Find A and B of every module that the adapter changes. Touch no file.

        `adapter_weights` are all tensors of the adapter by their names in the file, or an open
        file; a file's path may stand for a tensor, as in LoRAX's servers. Raise
        `AdapterFormatError` for A without B, `UnsupportedAdapterError` for a tensor of another
        feature than plain LoRA, and `IncompatibleAdapterError` for one whose module is not in
        `weight_names`, the model's (to leave it out on purpose, take it out of `adapter_weights`).
        """
        content = (
            adapter_weights
            if not isinstance(adapter_weights, WeightsFile)
            else dict.fromkeys(adapter_weights, adapter_weights)
        )
        module_map = {}
        for name in weight_names:
            keys = {factor: _key(factor, name) for factor in FACTORS}
            if all(key in content for key in keys.values()):
                module_map[name] = {factor: (content[key], key) for factor, key in keys.items()}
        matched = {key for factors in module_map.values() for _, key in factors.values()}
        _require_all_matched(set(adapter_weights), matched)
        check_matching(self.spec, module_map)
        return module_map, matched

    def load_batched_adapter_weights(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,  # noqa: ARG002 - LoRAX's, for adapters that change the base itself
    ) -> LoraWeights | None:
        """Call `LoraWeights.load`."""
        return LoraWeights.load(self, model, module_map, layer_type, unused_weight_names)

    async def load_batched_adapter_weights_async(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,  # noqa: ARG002 - as above
    ) -> LoraWeights | None:
        """Call `LoraWeights.load_async`."""
        return await LoraWeights.load_async(
            self, model, module_map, layer_type, unused_weight_names
        )


def _require_peft_agrees(values: Mapping[str, Any]) -> None:
    """Compare with peft's own config, built from plain values: no file, no pattern compiled."""
    from peft import LoraConfig as PeftConfig  # noqa: PLC0415 (slow: it imports transformers)

    try:
        peft_config = PeftConfig(**values, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(f"peft refuses the config ({error}); save it again") from error
    for name, value in values.items():
        expected = set(value) if isinstance(value, list) else value
        if getattr(peft_config, name) != expected:
            raise InternalError(
                f"peft and this package read {name!r} differently; please report it"
            )


def _key(factor: str, module: str) -> str:
    return f"{PREFIX}{module}.{factor}.weight"


def _require_all_matched(names: Set[str], matched: Set[str]) -> None:
    """Raise as `map_weights_for_model`: an adapter without some tensors gives other answers."""
    strays = sorted(names - matched)
    for name in strays:
        module = plain_module(name)
        missing = [factor[-1] for factor in FACTORS if _key(factor, module) not in names]
        if missing:
            raise AdapterFormatError(
                f"tensor {shorten(name, 200)!r} has no {missing[0]} beside it; save the adapter"
                " again"
            )
    if strays:
        raise IncompatibleAdapterError(
            f"the model has no such module: {_first(strays)}; use an adapter of this base, or take"
            " these tensors out"
        )


def require_all_used(unused_weight_names: Set[str]) -> None:
    """Raise `IncompatibleAdapterError` if a tensor is left after every layer type was loaded."""
    if unused_weight_names:
        raise IncompatibleAdapterError(
            f"no layer type has loaded {_first(sorted(unused_weight_names))}; load every type that"
            " the adapter changes, or use another adapter"
        )


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(shorten(name, 200) for name in names[:_SHOWN])
    more = ", …" if len(names) > _SHOWN else ""
    return f"{shown}{more} ({len(names)} tensor{'s' * (len(names) > 1)} in all)"


class LoraWeights(AdapterWeights):
    """The weights of one layer type: the scale in B, ranks padded, this process's share only.

    Made of A `[in, r]` and B `[r, out]` of each layer, or of all of them stacked. Immutable; the
    transposed forms for decoding are made once, at their first use. `lora_a_r` and `lora_b_r` are
    the local ranks: A's is smaller if processes share it.
    """

    def __init__(
        self,
        weights_a: Sequence[torch.Tensor] | torch.Tensor,
        weights_b: Sequence[torch.Tensor] | torch.Tensor,
        adapter_config: LoraConfig,
    ) -> None:
        a, b = _stack(weights_a), _stack(weights_b)
        if a is None or b is None or len(a) != len(b):
            raise UsageError(
                "LoraWeights takes A and B of every layer, [in, r] and [r, out], of equal shapes"
            )
        self._take(a, b, adapter_config)

    @classmethod
    def _of(cls, found: StackedLayers, config: LoraConfig) -> Self:
        """Return the weights of stacks that nobody else has: a copy would still be on its way."""
        self = cls.__new__(cls)
        self._take(found.a, found.b, replace(config, padded_rank=found.padded_rank))
        return self

    def _take(self, a: torch.Tensor, b: torch.Tensor, adapter_config: LoraConfig) -> None:
        self.lora_a_r, self.lora_b_r = a.shape[2], b.shape[1]
        self._weights_a, self._weights_b = as_stored(a).contiguous(), b.contiguous()
        self._a_by_rank = as_stored(a) is not a
        self._turned: dict[str, torch.Tensor] = {}
        self._turning = Lock()
        self.adapter_config = adapter_config

    @property
    def weights_a(self) -> torch.Tensor:
        """`[layers, r, in]` for a rank from 16 to 128, else `[layers, in, r]`."""
        return self._weights_a

    @property
    def weights_b(self) -> torch.Tensor:
        """`[layers, r, out]`."""
        return self._weights_b

    @property
    def weights_a_t(self) -> torch.Tensor:
        """`[layers, r, in]`, as decoding takes it: the same memory where A is stored so."""
        return self._weights_a if self._a_by_rank else self._turn("a", self._weights_a)

    @property
    def weights_b_t(self) -> torch.Tensor:
        """`[layers, out, r]`, as decoding takes it: copied once, which takes milliseconds."""
        return self._turn("b", self._weights_b)

    def _turn(self, which: str, stored: torch.Tensor) -> torch.Tensor:
        with self._turning:  # a second copy would free the first while kernels use its address
            if which not in self._turned:
                self._turned[which] = stored.mT.contiguous()
            return self._turned[which]

    @classmethod
    def get_batch_types(cls) -> list[type[Any]]:
        return [BatchLoraWeights]

    @classmethod
    def load(
        cls,
        config: LoraConfig,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
    ) -> Self | None:
        """Load the weights of one layer type, or return None where the adapter has none. Blocks.

        Layers that the adapter leaves out are zeros. The result's config has the `padded_rank`.
        After success, names of used tensors are removed from `unused_weight_names`.

        Raises
        ------
        AdapterFormatError, UnsupportedAdapterError
            A and B are no pair of the config's rank, not of floating point, or B with its scale is
            beyond what the model's dtype holds.
        IncompatibleAdapterError
            They do not fit the base, `fan_in_fan_out` contradicts it, or they cannot be stacked or
            shared evenly.
        UsageError
            The model has no such type, or its layers are on several devices.
        FetchError, IntegrityError, CapacityError
            The file cannot be read, changed since it was opened, or there is no memory. A file that
            is named by its path is opened here: also what `WeightsFile.at` raises.
        """
        weights, used = cls._load(config, model, module_map, layer_type, lambda: True)
        unused_weight_names.difference_update(used)
        return weights

    @classmethod
    async def load_async(
        cls,
        config: LoraConfig,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
    ) -> Self | None:
        """Call `load` in a thread. A cancelled call leaves `unused_weight_names` unchanged."""
        weights, used = await in_thread(partial(cls._load, config, model, module_map, layer_type))
        unused_weight_names.difference_update(used)
        return weights

    @classmethod
    def _load(
        cls,
        config: LoraConfig,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        is_wanted: IsWanted,
    ) -> tuple[Self | None, set[str]]:
        with open_files(module_map) as open_map:
            found = load_layers(config.spec, model, open_map, layer_type, is_wanted)
        if found is None:
            return None, set()
        used = {_key(factor, layer.name) for layer in found.present for factor in FACTORS}
        return cls._of(found, config), used

    @classmethod
    def from_adapter(cls, handle: AdapterHandle, layer_type: str) -> Self | None:
        """Copy the weights of one layer type from a handle, or return None. Blocks.

        The copy is on the loader's device, for one process; the handle may be released afterwards.
        The config has the data that the loader keeps: rank, modules, and alpha from the scale.
        Raise `UsageError` for a sharded loader's handle and for a layer that is not here yet,
        `HandleClosedError`, `UnsupportedAdapterError` for more than A and B of linear modules, and
        as `load`.
        """
        return cls._copy(handle, layer_type, lambda: True)

    @classmethod
    async def from_adapter_async(cls, handle: AdapterHandle, layer_type: str) -> Self | None:
        """Call `from_adapter` in a thread."""
        return await in_thread(partial(cls._copy, handle, layer_type))

    @classmethod
    def _copy(cls, handle: AdapterHandle, layer_type: str, is_wanted: IsWanted) -> Self | None:
        with handle.use():
            layers = _resident_layers(handle, layer_type)
            present = [layer for layer in layers if layer is not None]
            if not present:
                return None
            a = present[0].a
            found = stack_layers(layers, a.dtype, a.device, is_wanted)
        assert found is not None
        highest = max(present, key=lambda layer: layer.a.shape[0])
        rank = highest.a.shape[0]
        names = [layer.name for layer in present]
        config = LoraConfig(None, rank, names, False, highest.scale * rank, False)
        return cls._of(found, config)


def _stack(weights: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor | None:
    """Return a new `[layers, …, …]`, or None unless all are matrices of one shape."""
    if isinstance(weights, torch.Tensor):
        return weights.clone() if weights.dim() == 3 else None
    shapes = {tuple(one.shape) for one in weights}
    alike = len(shapes) == 1 and len(next(iter(shapes))) == 2
    return torch.stack(list(weights)) if alike else None


def _resident_layers(handle: AdapterHandle, layer_type: str) -> list[Layer | None]:
    if handle.shard is not None and handle.shard.world_size > 1:
        raise UsageError(
            "the loader holds one shard of this adapter, split as Megatron splits, and LoRAX splits"
            " otherwise; load the adapter's files with LoraConfig.load and LoraWeights.load"
        )
    modules, layout = handle.modules, handle.layout
    for name in modules:
        if layout.modules[layout.index(name)].embedding:
            raise inexpressible(f"module {shorten(name, 200)!r}", EMBEDDING)
    names = [module.name for module in layers_of(modules_by_type(layout), layer_type).values()]
    layers = list[Layer | None]()
    for name in names:
        module = modules.get(name)
        for vector, feature in (("bias", "lora_bias"), ("magnitude", "DoRA")):
            if getattr(module, vector, None) is not None:
                raise inexpressible(f"module {shorten(name, 200)!r}", feature)
        layers.append(None if module is None else Layer(name, module.a, module.b, module.scale))
    return layers
