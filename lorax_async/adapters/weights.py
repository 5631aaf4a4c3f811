"""One adapter's weights of one layer type, stacked over the layers as LoRAX's kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, Self

import torch

from lorax_async.adapters.base import AdapterModel, AdapterWeights, ModuleMap, opened
from lorax_async.adapters.batches import BatchLoraWeights
from lorax_async.adapters.config import LoraConfig
from lorax_async.adapters.loading.layers import TypeLayers, find_layers
from lorax_async.adapters.loading.resident import ResidentAdapter, resident_layers
from lorax_async.adapters.loading.stacking import BY_RANK, Stack, stack_layers
from lorax_async.adapters.loading.threads import GoOn, always, in_thread
from lorax_async.errors import UsageError


class LoraWeights(AdapterWeights):
    """The weights of one layer type, the scale in B, ranks padded, this process's share only.

    Immutable. The forms for decoding are made once, when they are first asked for.

    Parameters
    ----------
    weights_a, weights_b
        Of each layer A `[in, r]` and B `[r, out]`: scaled, padded and shared out already.
    adapter_config
        Of the adapter.

    Attributes
    ----------
    lora_a_r, lora_b_r
        The ranks of A and B; A's is the smaller where processes share it.
    """

    def __init__(
        self,
        weights_a: Sequence[torch.Tensor],
        weights_b: Sequence[torch.Tensor],
        adapter_config: LoraConfig,
    ) -> None:
        self._adopt(_stack(list(weights_a), list(weights_b)), adapter_config)

    def _adopt(self, stack: Stack, adapter_config: LoraConfig) -> None:
        self._weights_a, self._weights_b = stack.stored_a, stack.b
        self._turned: dict[str, torch.Tensor] = {}
        self._turning = Lock()
        self.adapter_config = adapter_config
        self.lora_a_r = stack.a.shape[2]
        self.lora_b_r = stack.b.shape[1]

    @classmethod
    def _of(cls, stack: Stack, adapter_config: LoraConfig) -> Self:
        weights = cls.__new__(cls)
        weights._adopt(stack, adapter_config)  # noqa: SLF001 - its own
        return weights

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
        return self._weights_a if self.lora_a_r in BY_RANK else self._turn("a", self._weights_a)

    @property
    def weights_b_t(self) -> torch.Tensor:
        """`[layers, out, r]`, as decoding takes it: copied once, which takes milliseconds."""
        return self._turn("b", self._weights_b)

    def _turn(self, which: str, stored: torch.Tensor) -> torch.Tensor:
        with self._turning:  # of two copies, one would go while kernels have its address
            turned = self._turned.get(which)
            if turned is None:
                turned = self._turned[which] = stored.mT.contiguous()
            return turned

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
        """The weights of one layer type, or None where the adapter has none of it. Blocks.

        Layers that the adapter leaves out are zeros. The config stays as it is; the result's own
        has the `padded_rank`. The names of the tensors that were used are taken out of
        `unused_weight_names`, after all went well.

        Raises
        ------
        AdapterFormatError
            A and B are no pair of the rank that the config says, or the scale takes B beyond what
            the model's dtype holds.
        IncompatibleAdapterError
            They do not fit the base, cannot be stacked, or not be shared evenly.
        UnsupportedAdapterError
            They are no numbers of floating point.
        UsageError
            The model has no such type, or its layers are on several devices.
        FetchError, IntegrityError
            The file cannot be read, or changed since it was opened. A file that is named by its
            path is opened here; what is wrong with it is raised as by `WeightsFile.at`.
        CapacityError
            There is no memory for them.
        """
        made = _load(config, model, module_map, layer_type, always)
        return cls._used(made, config, unused_weight_names)

    @classmethod
    async def load_async(
        cls,
        config: LoraConfig,
        model: AdapterModel,
        module_map: ModuleMap,
        layer_type: str,
        unused_weight_names: set[str],
    ) -> Self | None:
        """As `load`, in a thread. A cancelled call leaves `unused_weight_names` as it was."""
        made = await in_thread(lambda go_on: _load(config, model, module_map, layer_type, go_on))
        return cls._used(made, config, unused_weight_names)

    @classmethod
    def _used(cls, made: _Made | None, config: LoraConfig, unused: set[str]) -> Self | None:
        if made is None:
            return None
        found, stack = made
        unused.difference_update(found.keys)
        return cls._of(stack, config.padded_to(found.padded_rank))

    @classmethod
    def from_adapter(cls, handle: ResidentAdapter, layer_type: str) -> Self | None:
        """The weights of one layer type of an adapter that a loader holds, or None. Blocks.

        A copy on the loader's device, for one process; the handle may be released afterwards. The
        config says as much as the loader keeps: rank, modules, and an alpha that gives the scale.

        Raises
        ------
        UsageError
            The loader holds one shard of each module only; or a layer is not here yet.
        HandleClosedError
            The handle was released.
        IncompatibleAdapterError, CapacityError
            As `load`.
        """
        return cls._resident(_copy(handle, layer_type, always))

    @classmethod
    async def from_adapter_async(cls, handle: ResidentAdapter, layer_type: str) -> Self | None:
        """As `from_adapter`, in a thread."""
        return cls._resident(await in_thread(lambda go_on: _copy(handle, layer_type, go_on)))

    @classmethod
    def _resident(cls, made: _Made | None) -> Self | None:
        if made is None:
            return None
        found, stack = made
        return cls._of(stack, _resident_config(found).padded_to(found.padded_rank))


_Made = tuple[TypeLayers, Stack]


def _load(
    config: LoraConfig, model: AdapterModel, module_map: ModuleMap, layer_type: str, go_on: GoOn
) -> _Made | None:
    with opened(module_map) as open_map:
        found = find_layers(config, model, open_map, layer_type)
        return None if found is None else (found, stack_layers(found, model, layer_type, go_on))


def _copy(handle: ResidentAdapter, layer_type: str, go_on: GoOn) -> _Made | None:
    with handle.use():
        found = resident_layers(handle, layer_type)
        return None if found is None else (found, stack_layers(found, None, layer_type, go_on))


def _resident_config(found: TypeLayers) -> LoraConfig:
    """Of an adapter whose own config is not at hand."""
    first = max(found.present, key=lambda layer: layer.rank)
    return LoraConfig(
        base_model_name_or_path=None,
        r=first.rank,
        target_modules=[layer.name for layer in found.present],
        fan_in_fan_out=False,
        lora_alpha=first.scale * first.rank,
        use_rslora=False,
    )


def _stack(weights_a: list[torch.Tensor], weights_b: list[torch.Tensor]) -> Stack:
    shapes = {tuple(w.shape) for w in weights_a}, {tuple(w.shape) for w in weights_b}
    matrices = all(w.dim() == 2 for w in (*weights_a, *weights_b))
    if not matrices or len(weights_a) != len(weights_b) or any(len(s) != 1 for s in shapes):
        raise UsageError(
            "LoraWeights takes A and B of every layer, [in, r] and [r, out], of equal shapes"
        )
    turned = weights_a[0].shape[1] in BY_RANK
    a = torch.stack([w.mT if turned else w for w in weights_a])
    return Stack(a.mT if turned else a, torch.stack(weights_b))
