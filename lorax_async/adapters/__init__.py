"""LoRA adapters under LoRAX's names and signatures, with PEFT's numbers.

- `lora`: `LoraConfig` and `LoraWeights`, the check of the base's architecture, merges of module
  maps;
- `merging`: merges of folders, for `AdapterLoader.load_tensors`; the arithmetic of all merges;
- `weights_file`: an adapter's files, local or in the standard hub cache;
- `layers`: the weights of one layer type, checked and stacked; `LayoutModel`, a layout in place of
  a LoRAX model;
- `batches`: segments and addresses of a batch; LoRAX's batch on SGMV kernels.

    config = await LoraConfig.load_async("org/sql-adapter", None)
    with await WeightsFile.open_async("org/sql-adapter", None) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        weights = await LoraWeights.load_async(config, model, module_map, "q_proj", names)
"""

from lorax_async.adapters.batches import (
    AdapterBatchMetadata,
    BatchAdapterWeights,
    BatchLoraWeights,
    Bridge,
    RankSegments,
    concat_segments,
    find_segments,
)
from lorax_async.adapters.layers import AdapterModel, LayoutModel, padded_rank
from lorax_async.adapters.lora import (
    AdapterConfig,
    AdapterParameters,
    AdapterWeights,
    LoraConfig,
    LoraWeights,
    cached_architectures,
    check_architectures,
    check_architectures_async,
    get_scaling_factor,
    merge_adapters,
    merge_adapters_async,
    require_all_used,
)
from lorax_async.adapters.merging import Recipe, merge_folders
from lorax_async.adapters.weights_file import ModuleMap, WeightsFile

__all__ = [
    "AdapterBatchMetadata",
    "AdapterConfig",
    "AdapterModel",
    "AdapterParameters",
    "AdapterWeights",
    "BatchAdapterWeights",
    "BatchLoraWeights",
    "Bridge",
    "LayoutModel",
    "LoraConfig",
    "LoraWeights",
    "ModuleMap",
    "RankSegments",
    "Recipe",
    "WeightsFile",
    "cached_architectures",
    "check_architectures",
    "check_architectures_async",
    "concat_segments",
    "find_segments",
    "get_scaling_factor",
    "merge_adapters",
    "merge_adapters_async",
    "merge_folders",
    "padded_rank",
    "require_all_used",
]
