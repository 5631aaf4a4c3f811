"""What every kind of adapter has in LoRAX's form: a config, and the weights of each layer type.

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

from lorax_async.adapters.loading.weights_file import WeightsFile

Content = torch.Tensor | WeightsFile
"""A tensor, or the open file in which a tensor lies."""

ContentOrPath = Content | str | Path
"""LoRAX's servers name the file by its path; whoever loads opens it, once for each layer type."""

ModuleMap = Mapping[str, Mapping[str, tuple[ContentOrPath, str]]]
"""By module name, "lora_A" and "lora_B": each the tensor, or its file, and its name in the file."""

OpenModuleMap = Mapping[str, Mapping[str, tuple[Content, str]]]
"""A module map whose files are open."""


@contextmanager
def opened(module_map: ModuleMap) -> Iterator[OpenModuleMap]:
    """With every file open that is named by its path, once each. Blocks, as `WeightsFile.at`."""
    files: dict[str | Path, WeightsFile] = {}
    with ExitStack() as stack:

        def content(given: ContentOrPath) -> Content:
            if not isinstance(given, str | Path):
                return given
            if given not in files:
                files[given] = stack.enter_context(WeightsFile.at(given))
            return files[given]

        yield {
            name: {factor: (content(given), key) for factor, (given, key) in factors.items()}
            for name, factors in module_map.items()
        }


class AdapterModel(Protocol):
    """Of a model, what loading into LoRAX's form asks. LoRAX's models have it; so has LayoutModel.

    Attributes
    ----------
    dtype
        Of the weights that are loaded.
    world_size
        How many processes share a layer.
    target_to_layer
        By (layer id, layer type), a module's name and a layer with `base_layer.linear.weight`.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def world_size(self) -> int: ...

    @property
    def target_to_layer(self) -> Mapping[Any, tuple[str, Any]]: ...

    def get_num_layers_for_type(self, layer_type: str, /) -> int | Sequence[int]:
        """How many layers have this type, or their ids where these are not 0, 1, …"""

    def shard_lora_weights(
        self, weights_a: list[torch.Tensor], weights_b: list[torch.Tensor], layer_type: str, /
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parts that this process has of every A `[in, r]` and B `[r, out]`."""


@dataclass(frozen=True, slots=True)
class AdapterConfig(ABC):
    """What an adapter's config says, and how its weights are found and loaded."""

    base_model_name_or_path: str | None

    @abstractmethod
    def map_weights_for_model(
        self,
        adapter_weights: Mapping[str, torch.Tensor | str | Path] | WeightsFile,
        weight_names: Sequence[str],
    ) -> tuple[ModuleMap, set[str]]:
        """The weights of each module that the adapter changes, and all names that were matched."""

    @abstractmethod
    def load_batched_adapter_weights(
        self,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
        dynamic: bool,
    ) -> AdapterWeights | None:
        """The weights of one layer type, or None where the adapter has none."""


class AdapterWeights(ABC):
    """One adapter's weights of one layer type."""

    @classmethod
    @abstractmethod
    def get_batch_types(cls) -> list[type[Any]]:
        """The classes that put weights of this kind into batches."""

    @property
    def speculative_tokens(self) -> int:
        """How many tokens it predicts ahead."""
        return 0
