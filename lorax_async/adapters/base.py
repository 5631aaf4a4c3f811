"""The module map, the model protocol and the base classes of LoRAX's kinds of adapters.

Names and signatures are those of `config` and `weights` in `lorax_server.adapters`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lorax_async.adapters.weights_file import WeightsFile

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
