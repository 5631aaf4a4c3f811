"""LoRAX's view of an adapter's config, made from the one that our own reader accepts."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from lorax_async.adapter import AdapterSpec, ModulePattern
from lorax_async.adapters.base import AdapterConfig, AdapterModel, ContentOrPath, ModuleMap
from lorax_async.adapters.loading.peft_values import require_agreement
from lorax_async.adapters.loading.places import LIMITS, folder_with_config, named, read_small
from lorax_async.adapters.loading.threads import in_thread
from lorax_async.adapters.loading.unapplied import (
    FACTORS,
    require_all_matched,
    require_plain_spec,
    tensor_name,
)
from lorax_async.adapters.loading.weights_file import WeightsFile
from lorax_async.core.pairing import MAX_MATCHING_STEPS
from lorax_async.core.peft_config import parse_config
from lorax_async.errors import UnsupportedAdapterError, UsageError, shorten_repr

if TYPE_CHECKING:
    from lorax_async.adapters.weights import LoraWeights

_MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True, slots=True)
class LoraConfig(AdapterConfig):
    """What `adapter_config.json` says, under LoRAX's names. It never changes.

    Attributes
    ----------
    base_model_name_or_path
        A label, which may be empty or None.
    r, lora_alpha, use_rslora
        The delta is scaled by alpha / r, or alpha / √r; `r` is the true rank, without padding.
    target_modules
        As written: names, one regular expression, or None. Nothing here compiles it.
    fan_in_fan_out
        The author's word on how the base stores its weights; the file's A and B are not affected.
    padded_rank
        The rank that weights of one type were padded to, before they are shared out; None until
        some are loaded. No part of equality.
    """

    r: int
    target_modules: list[str] | str | None
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

        Parameters
        ----------
        adapter_id
            A `pathlib.Path`, or a str that begins with "/", "./" or "../": a local folder.
            `org/name[@revision]`: an adapter on the hub. What the standard hub cache has of it is
            taken without asking; only this one file is fetched.
        api_token
            What the hub is asked with; None is this machine's own token, if it has one.

        Raises
        ------
        AdapterNotFoundError
            There is no such adapter, or none that the token may see.
        AdapterFormatError, UnsupportedAdapterError
            The config is malformed, or turns on what plain LoRA does not describe.
        InvalidAdapterIdError, ConfigError, UsageError
            The id or the token is none, or the source is not available.
        AccessDeniedError, FetchError
            The file cannot be fetched or read.
        InternalError
            peft understands the config otherwise.
        """
        with named(adapter_id):
            spec = parse_config(read_small(folder_with_config(adapter_id, api_token)), LIMITS)
            require_plain_spec(spec)
            require_agreement(spec)
        return cls._of(spec)

    @classmethod
    async def load_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """As `load`, in a thread.

        The first one imports peft, which holds the interpreter for tenths of a second: a server
        that must not wait imports it before it serves.
        """
        return await in_thread(lambda _: cls.load(adapter_id, api_token))

    @classmethod
    def _of(cls, spec: AdapterSpec) -> Self:
        whole, targets = spec.alpha.is_integer(), spec.targets
        return cls(
            base_model_name_or_path=spec.base_model,
            r=spec.rank,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            fan_in_fan_out=spec.fan_in_fan_out,
            lora_alpha=int(spec.alpha) if whole else spec.alpha,
            use_rslora=spec.rslora,
            _rank_patterns=spec.rank_patterns,
            _alpha_patterns=spec.alpha_patterns,
        )

    @property
    def _spec(self) -> AdapterSpec:
        return AdapterSpec(
            rank=self.r,
            alpha=float(self.lora_alpha),
            rslora=self.use_rslora,
            rank_patterns=self._rank_patterns,
            alpha_patterns=self._alpha_patterns,
        )

    def rank_of(self, module: str) -> int:
        """The true rank of one module, by the config's patterns."""
        return self._spec.rank_of(module)

    def scale_of(self, module: str) -> float:
        """What one module's delta is multiplied with, by the config's patterns."""
        return self._spec.scale_of(module)

    def padded_to(self, rank: int) -> Self:
        """The same config, of weights that were padded to this rank."""
        return replace(self, padded_rank=rank)

    def map_weights_for_model(
        self,
        adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile,
        weight_names: Sequence[str],
    ) -> tuple[ModuleMap, set[str]]:
        """Find A and B of every module that the adapter changes. Touches no file.

        Parameters
        ----------
        adapter_weights
            All tensors of the adapter by their names in the file, or an opened file. Instead of a
            tensor there may be the path of the file that holds it, as LoRAX's servers have it.
        weight_names
            The names of the model's modules.

        Returns
        -------
        By module, "lora_A" and "lora_B" with (tensor or file, name in the file); and all of these
        names.

        Raises
        ------
        AdapterFormatError
            A tensor has no partner.
        IncompatibleAdapterError
            The model has no such module, so that nothing would apply the tensor. To leave it out
            on purpose, take it out of `adapter_weights` first.
        UnsupportedAdapterError
            A tensor belongs to another feature than plain LoRA.
        """
        module_map: dict[str, dict[str, tuple[ContentOrPath, str]]] = {}
        for name in weight_names:
            keys = {factor: tensor_name(factor, name) for factor in FACTORS}
            if all(key in adapter_weights for key in keys.values()):
                module_map[name] = {
                    factor: (_content(adapter_weights, key), key) for factor, key in keys.items()
                }
        matched = {key for factors in module_map.values() for _, key in factors.values()}
        require_all_matched(adapter_weights, matched)
        self._check_matching(module_map)
        return module_map, matched

    def _check_matching(self, names: Collection[str]) -> None:
        """Matching is linear in pattern and path, but a stranger may bring many patterns."""
        steps = sum(pattern.cost for pattern in (*self._rank_patterns, *self._alpha_patterns))
        if steps * sum(map(len, names)) > MAX_MATCHING_STEPS:
            raise UnsupportedAdapterError(
                "rank_pattern and alpha_pattern would take too long to match; write fewer of them"
            )

    def load_batched_adapter_weights(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,  # noqa: ARG002 - LoRAX's, for adapters that change the base itself
    ) -> LoraWeights | None:
        """As `LoraWeights.load`."""
        from lorax_async.adapters.weights import LoraWeights  # noqa: PLC0415 (it knows us)

        return LoraWeights.load(self, model, module_map, layer_type, unused_weight_names)

    async def load_batched_adapter_weights_async(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,  # noqa: ARG002 - as above
    ) -> LoraWeights | None:
        """As `LoraWeights.load_async`."""
        from lorax_async.adapters.weights import LoraWeights  # noqa: PLC0415

        return await LoraWeights.load_async(
            self, model, module_map, layer_type, unused_weight_names
        )


def _content(
    adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile, key: str
) -> ContentOrPath:
    return adapter_weights if isinstance(adapter_weights, WeightsFile) else adapter_weights[key]
