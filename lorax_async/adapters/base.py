"""What LoRAX's adapters have in common: configs, weights, the check of the base model."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lorax_async.adapters.weights_file import LIMITS, HubFiles, WeightsFile, read_small
from lorax_async.concurrency import in_thread
from lorax_async.errors import IncompatibleAdapterError, LoraxError, shorten
from lorax_async.formats.strict_json import parse_object

Content = torch.Tensor | WeightsFile
"""A tensor, or the open file that holds it."""

ModuleMap = Mapping[str, Mapping[str, tuple[Content | str | Path, str]]]
"""Module name → "lora_A" and "lora_B" → (tensor, open file or a file's path; name in the file)."""

OpenModuleMap = Mapping[str, Mapping[str, tuple[Content, str]]]


@contextmanager
def open_files(module_map: ModuleMap) -> Iterator[OpenModuleMap]:
    """Open every file that is named by its path, once each. Blocks, as `WeightsFile.at`."""
    files: dict[str | Path, WeightsFile] = {}
    with ExitStack() as stack:

        def open_content(entry: Content | str | Path) -> Content:
            if isinstance(entry, str | Path):
                if entry not in files:
                    files[entry] = stack.enter_context(WeightsFile.at(entry))
                return files[entry]
            return entry

        yield {
            name: {factor: (open_content(entry), key) for factor, (entry, key) in factors.items()}
            for name, factors in module_map.items()
        }


class AdapterModel(Protocol):
    """The part of a model that loading needs: a LoRAX model, or `LayoutModel`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def world_size(self) -> int: ...

    @property
    def target_to_layer(self) -> Mapping[Any, tuple[str, Any]]:
        """(layer id, layer type) → module name and a layer with `base_layer.linear.weight`."""

    def get_num_layers_for_type(self, layer_type: str, /) -> int | Sequence[int]:
        """Return how many layers have this type, or their ids if not consecutive from 0."""

    def shard_lora_weights(
        self, weights_a: list[torch.Tensor], weights_b: list[torch.Tensor], layer_type: str, /
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return this process's parts of every A `[in, r]` and B `[r, out]`."""


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


_CONFIG = "config.json"


def check_architectures(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """Compare the served base (`model_id`, `architectures`) with the adapter's. Blocks.

    Accept equal names, and a config without a name. Otherwise look up the architectures of the
    adapter's base in the hub cache: warn if they are equal or unknown, and raise
    `IncompatibleAdapterError` if they differ.
    """
    base = adapter_config.base_model_name_or_path
    if base and base != model_id:
        _compare(model_id, adapter_id, base, cached_architectures(base), tuple(architectures))


async def check_architectures_async(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """As `check_architectures`, with the look-up in a thread."""
    base = adapter_config.base_model_name_or_path
    if base and base != model_id:
        trained_on = await in_thread(lambda _: cached_architectures(base))
        _compare(model_id, adapter_id, base, trained_on, tuple(architectures))


def _compare(
    model_id: str,
    adapter_id: str,
    base: str,
    trained_on: tuple[str, ...] | None,
    served: tuple[str, ...],
) -> None:
    adapter, base = shorten(str(adapter_id), 100), shorten(base, 100)
    if trained_on not in {None, served}:
        raise IncompatibleAdapterError(
            f"adapter {adapter!r} is for {base!r} ({shorten(', '.join(trained_on or ()), 100)}),"
            f" and {model_id!r} is another architecture ({', '.join(served)}); serve {base!r}, or"
            f" use an adapter of {model_id!r}"
        )
    warnings.warn(
        f"adapter {adapter!r} was not trained on base model {model_id!r}; if its answers are"
        f" wrong, serve {base!r} instead",
        stacklevel=3,  # the caller of the check
    )


def cached_architectures(base: str) -> tuple[str, ...] | None:
    """Return the architectures in the `config.json` of a base in the hub cache, if any. Blocks.

    The name is untrusted: no folder outside the cache is read.
    """
    try:
        path = HubFiles(base, None, None).cached(_CONFIG)
        if path is None:
            return None
        text = read_small(os.path.dirname(path), _CONFIG, LIMITS.max_config_bytes)
        depth = LIMITS.max_json_depth
        config = parse_object(text, what=_CONFIG, max_bytes=len(text), max_depth=depth)
    except LoraxError:  # not an id of the hub, or not a config
        return None
    names = config.get("architectures")
    return tuple(map(str, names)) if isinstance(names, list) and names else None
