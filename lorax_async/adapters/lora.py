"""Drop-in names of `lorax_server.adapters.lora`; the check of the base; merges of module maps."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch

from lorax_async.adapters.batches import (
    LORA,
    AdapterBatchMetadata,
    BatchAdapterWeights,
    BatchLoraWeights,
    RankSegments,
)
from lorax_async.adapters.layers import (
    BY_RANK,
    FACTORS,
    AdapterModel,
    Layer,
    StackedLayers,
    layers_of,
    load_layers,
    modules_by_type,
    stack_layers,
)
from lorax_async.adapters.merging import Recipe, merge_modules
from lorax_async.adapters.weights_file import (
    EMBEDDING,
    LIMITS,
    ModuleMap,
    WeightsFile,
    adapter_folder,
    cached_file,
    inexpressible,
    naming_adapter,
    open_factors,
    plain_module,
    read_small,
)
from lorax_async.concurrency import IsWanted, in_thread
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    InternalError,
    LoraxError,
    UsageError,
    shorten,
    shorten_repr,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import PREFIX, Targeting, targeting_of
from lorax_async.formats.strict_json import parse_object
from lorax_async.formats.tensor_kinds import FEATURES, TensorRole
from lorax_async.handle import AdapterHandle
from lorax_async.planning.pairing import check_matching, require_targeted
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


def get_scaling_factor(lora_alpha: float, r: int, uses_rslora: bool = False) -> float:
    """Return the factor of a delta with the rank `r`, without padding."""
    return lora_alpha / (sqrt(r) if uses_rslora else r)


@dataclass(frozen=True, slots=True)
class AdapterConfig(ABC):
    """An adapter's config: how its weights are found and loaded."""

    base_model_name_or_path: str | None

    @abstractmethod
    def map_weights_for_model(
        self,
        adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile,
        weight_names: Sequence[str],
    ) -> tuple[ModuleMap, set[str]]:
        """Return the weights of each module that the adapter changes, and all matched names."""

    @abstractmethod
    def load_batched_adapter_weights(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,
    ) -> AdapterWeights | None:
        """Return the weights of one layer type, or None where the adapter has none."""


class AdapterWeights(ABC):
    """One adapter's weights of one layer type."""

    @classmethod
    @abstractmethod
    def get_batch_types(cls) -> list[type[Any]]:
        """Return the classes that put weights of this kind into batches."""

    @property
    def speculative_tokens(self) -> int:
        """The number of tokens that the adapter predicts ahead."""
        return 0


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
    _targeting: Targeting | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        most = sys.float_info.max
        if type(self.r) is not int or not 1 <= self.r <= most:
            raise UsageError(
                f"r is a positive integer that a float holds, not {shorten_repr(self.r)}"
            )
        if not (isinstance(self.lora_alpha, int | float) and abs(self.lora_alpha) <= most):
            raise UsageError(f"lora_alpha is a finite number, not {shorten_repr(self.lora_alpha)}")

    @classmethod
    def load(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Read an adapter's config. Blocks: it fetches and reads a file, and imports peft.

        `adapter_id` is a local folder (a `pathlib.Path`, or a str that begins with "/", "./" or
        "../") or `org/name[@revision]` on the hub, by way of the standard hub cache. `api_token` is
        the hub's; None is this machine's own, if it has one. Raise what a load of the adapter
        raises, and `UnsupportedAdapterError` for what plain LoRA does not describe.
        """
        with naming_adapter(adapter_id):
            path = f"{adapter_folder(adapter_id, api_token, weights=False)}/{CONFIG}"
            spec = parse_config(read_small(path, LIMITS.max_config_bytes), LIMITS)
            features = {"DoRA": spec.dora, "lora_bias": spec.lora_bias}
            features[FEATURES[TensorRole.PARAMETER_A]] = bool(spec.parameters)
            for feature, has_it in features.items():
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
        values |= {"_rank_patterns": spec.rank_patterns, "_alpha_patterns": spec.alpha_patterns}
        return cls(**values, _targeting=targeting_of(spec))

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

    def scale_of(self, module: str) -> float:
        """Return one module's scale, by the config's patterns."""
        return self.spec.scale_of(module)

    def map_weights_for_model(
        self,
        adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile,
        weight_names: Sequence[str],
    ) -> tuple[ModuleMap, set[str]]:
        """Find A and B of every module that the adapter changes. Touch no file.

        `adapter_weights` are all tensors by their names in the file, or an open file; a file's path
        may stand for a tensor, as in LoRAX's servers. Raise `AdapterFormatError` for A without B or
        a module that the config leaves out, `UnsupportedAdapterError` for a tensor that is not
        plain LoRA's, and `IncompatibleAdapterError` for one whose module is not in `weight_names`,
        the model's.
        """
        content = (
            dict.fromkeys(adapter_weights, adapter_weights)
            if isinstance(adapter_weights, WeightsFile)
            else adapter_weights
        )
        module_map = {}
        for name in weight_names:
            keys = {factor: _key(factor, name) for factor in FACTORS}
            if all(key in content for key in keys.values()):
                module_map[name] = {factor: (content[key], key) for factor, key in keys.items()}
        matched = {key for factors in module_map.values() for _, key in factors.values()}
        # An adapter without some of its tensors gives other answers.
        strays = sorted(content.keys() - matched)
        for name in strays:
            module = plain_module(name)
            missing = [factor[-1] for factor in FACTORS if _key(factor, module) not in content]
            if missing:
                raise AdapterFormatError(
                    f"tensor {shorten(name, 200)!r} has no {missing[0]} beside it; save the adapter"
                    " again"
                )
        if strays:
            raise IncompatibleAdapterError(
                f"the model has no such module: {_first(strays)}; use an adapter of this base, or"
                " take these tensors out"
            )
        if self._targeting is not None:
            require_targeted(self._targeting, dict.fromkeys(module_map, False))
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


def _first(names: Sequence[str]) -> str:
    shown = ", ".join([*(shorten(name, 200) for name in names[:3]), "…"][: len(names)])
    return f"{shown} ({len(names)} tensor{'s' * (len(names) > 1)} in all)"


def require_all_used(unused_weight_names: Set[str]) -> None:
    """Raise `IncompatibleAdapterError` if a tensor is left after every layer type was loaded."""
    if unused_weight_names:
        raise IncompatibleAdapterError(
            f"no layer type has loaded {_first(sorted(unused_weight_names))}; load every type that"
            " the adapter changes, or use another adapter"
        )


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
        rank = a.shape[2]
        stored = a.mT if rank in BY_RANK else a
        self._take(stored.contiguous(), b.contiguous(), rank, adapter_config)

    @classmethod
    def _of(cls, found: StackedLayers, config: LoraConfig) -> Self:
        """Return the weights of new stacks, which no other object uses: they are not copied."""
        self = cls.__new__(cls)
        config = replace(config, padded_rank=found.padded_rank)
        self._take(found.a, found.b, found.local_rank, config)
        return self

    def _take(self, a: torch.Tensor, b: torch.Tensor, local_rank: int, config: LoraConfig) -> None:
        self.lora_a_r, self.lora_b_r = local_rank, b.shape[1]
        self._weights_a, self._weights_b, self.adapter_config = a, b, config
        self._turned = {"a": a} if local_rank in BY_RANK else {}
        self._turning = Lock()

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
        return self._turn("a", self._weights_a)

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
        After success, names of used tensors are removed from `unused_weight_names`. Raise
        `AdapterFormatError` or `UnsupportedAdapterError` for A and B that are not a pair of the
        config's rank, not of floating point, or too large once scaled; `IncompatibleAdapterError`
        if they do not fit the base or cannot be stacked or shared evenly; `UsageError` for an
        unknown type; `FetchError`, `IntegrityError` or `CapacityError` if the file cannot be read,
        changed since it was opened, or there is no memory. A file that is named by its path is
        opened here, as `WeightsFile.at` does.
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
        with open_factors(module_map) as factors:
            found = load_layers(config.spec, model, factors, layer_type, is_wanted)
        if found is None:
            return None, set()
        used = {_key(factor, name) for name in found.names for factor in FACTORS}
        return cls._of(found, config), used

    @classmethod
    def from_adapter(cls, handle: AdapterHandle, layer_type: str) -> Self | None:
        """Copy the weights of one layer type from a handle, or return None. Blocks.

        The copy is on the loader's device, for one process; the handle may be released afterwards.
        The config has the data that the loader keeps: rank, modules, and alpha from the scale.
        Raise `UsageError` for a sharded loader's handle and for a layer that is not loaded yet,
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
            assert isinstance(a, torch.Tensor)
            found = stack_layers(layers, a.dtype, a.device, is_wanted)
        assert found is not None
        highest = max(present, key=lambda layer: layer.a.shape[0])
        rank = highest.a.shape[0]
        config = LoraConfig(None, rank, found.names, False, highest.scale * rank, False)
        return cls._of(found, config)


def _stack(weights: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor | None:
    """Return a new `[layers, …, …]`, or None unless all are matrices of one shape."""
    if isinstance(weights, torch.Tensor):
        return weights.clone() if weights.dim() == 3 else None
    layers = list(weights)
    alike = len({one.shape for one in layers}) == 1 and layers[0].dim() == 2
    return torch.stack(layers) if alike else None


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
    layers = list[Layer | None]()
    for expected in layers_of(modules_by_type(layout), layer_type).values():
        module = modules.get(expected.name)
        for vector, feature in (("bias", "lora_bias"), ("magnitude", "DoRA")):
            if getattr(module, vector, None) is not None:
                raise inexpressible(f"module {shorten(expected.name, 200)!r}", feature)
        layers.append(
            None if module is None else Layer(expected.name, module.a, module.b, module.scale)
        )
    return layers


# -- the base --------------------------------------------------------------------------------------


def check_architectures(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """Compare the served base (`model_id`, `architectures`) with the adapter's. Blocks.

    Accept equal names, and a config without a name. Otherwise look up the architectures of the
    adapter's base in the hub cache: warn if they are equal or unknown, and raise
    `IncompatibleAdapterError` if they differ.
    """
    if doubt := _compare_bases(model_id, adapter_id, adapter_config, architectures):
        warnings.warn(doubt, stacklevel=2)


async def check_architectures_async(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """As `check_architectures`, with the look-up in a thread."""
    given = model_id, adapter_id, adapter_config, architectures
    if doubt := await in_thread(lambda _: _compare_bases(*given)):
        warnings.warn(doubt, stacklevel=2)


def _compare_bases(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, served: Sequence[str]
) -> str | None:
    """Return the text of the warning, if any."""
    name = adapter_config.base_model_name_or_path
    if not name or name == model_id:
        return None
    adapter, base = shorten(str(adapter_id), 100), shorten(name, 100)
    trained_on = cached_architectures(name)
    if trained_on not in {None, tuple(served)}:
        raise IncompatibleAdapterError(
            f"adapter {adapter!r} is for {base!r} ({shorten(', '.join(trained_on or ()), 100)}),"
            f" and {model_id!r} is another architecture ({', '.join(served)}); serve {base!r}, or"
            f" use an adapter of {model_id!r}"
        )
    return (
        f"adapter {adapter!r} was not trained on base model {model_id!r}; if its answers are"
        f" wrong, serve {base!r} instead"
    )


def cached_architectures(base: str) -> tuple[str, ...] | None:
    """Return the architectures in the `config.json` of a base in the hub cache, if any. Blocks.

    The name is untrusted: no folder outside the cache is read.
    """
    name, limit = "config.json", LIMITS.max_config_bytes
    try:
        path = cached_file(base, name)
        if path is None:
            return None
        text = read_small(path, limit)
        config = parse_object(text, what=name, max_bytes=limit, max_depth=LIMITS.max_json_depth)
    except LoraxError:  # not an id of the hub, or not a config
        return None
    names = config.get("architectures")
    return tuple(map(str, names)) if isinstance(names, list) and names else None


# -- merges ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterParameters:
    """The merge parameters of a LoRAX request. Case of strategies and signs is ignored.

    `weights` default to 1. The density has no default, and must not be 0.
    """

    adapter_ids: Sequence[str | Path]
    weights: Sequence[float] = ()
    merge_strategy: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """The same in this package's form. Raises `UsageError` as `Recipe` does."""
        return Recipe(
            self.merge_strategy.lower(),
            self.weights or [1.0] * len(self.adapter_ids),
            self.density,
            self.majority_sign_method.lower(),
            self.seed,
        )


def merge_adapters(
    adapters: Sequence[tuple[ModuleMap, LoraConfig]], merge_params: AdapterParameters
) -> tuple[ModuleMap, LoraConfig]:
    """Merge several module maps; return one with its config. Blocks if the maps hold files.

    This is LoRAX's `lorax_server.utils.merges` with PEFT's numbers; to make a merge resident, use
    `merge_folders`. `adapters` are module map and config of each of `merge_params.adapter_ids`, in
    this order. DARE drops the same weights as PEFT if the first map has all modules, in the model's
    order. The result holds float32 tensors, all of the config's rank (smaller ranks padded with
    zeros), with the scale 1: all scales and weights are in A and B. Raise `AdapterFormatError` for
    a scale, or its product with the weight, beyond float32, and `IncompatibleAdapterError` for
    shapes that do not fit each other.
    """
    recipe, ids = merge_params.recipe, merge_params.adapter_ids
    if not len(adapters) == len(ids) == len(recipe.weights):
        raise UsageError(
            f"{len(ids)} adapter_ids, but {len(adapters)} adapters and {len(recipe.weights)}"
            " weights; pass one of each"
        )
    keys, first = dict[str, Mapping[str, tuple[Any, str]]](), adapters[0][1]
    modules: dict[str, list[tuple[int, Layer]]] = {}
    with ExitStack() as stack:
        for number, (module_map, config) in enumerate(adapters):
            for name, factors in stack.enter_context(open_factors(module_map)).items():
                layer = Layer.of(name, factors, config.spec)
                modules.setdefault(name, []).append((number, layer))
                keys.setdefault(name, module_map[name])
        for layers in modules.values():
            _require_same_shapes(recipe.strategy, [layer for _, layer in layers])
        merged = merge_modules(recipe, modules, ids, first.spec, start=True)
    result = {
        name: {
            factor: (one, keys[name][factor][1]) for factor, one in zip(FACTORS, pair, strict=True)
        }
        for name, pair in merged.items()
    }
    rank = next((len(a) for a, _ in merged.values()), first.r)
    config = replace(
        first,
        r=rank,
        target_modules=list(merged),
        lora_alpha=rank,
        use_rslora=False,
        padded_rank=None,
        _rank_patterns=(),
        _alpha_patterns=(),
        _targeting=None,
    )
    return result, config


async def merge_adapters_async(
    adapters: Sequence[tuple[ModuleMap, LoraConfig]], merge_params: AdapterParameters
) -> tuple[ModuleMap, LoraConfig]:
    """Call `merge_adapters` in a thread."""
    return await in_thread(lambda _: merge_adapters(adapters, merge_params))


def _require_same_shapes(strategy: str, layers: Sequence[Layer]) -> None:
    for along, factor in enumerate(FACTORS):
        shapes = [tuple((layer.b if along else layer.a).shape) for layer in layers]
        sizes = {shape[1 - along] if strategy == "linear" else shape for shape in shapes}
        if len(sizes) > 1:
            raise IncompatibleAdapterError(
                f"module {shorten(layers[0].name, 200)!r}: {strategy!r} cannot merge {factor} of"
                f" the shapes {' and '.join(str(list(shape)) for shape in shapes)}"
            )
