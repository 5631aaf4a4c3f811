"""The names of vLLM that the plug-in uses, in one table: the start checks and names them.

Most are private, or not promised: another version may have others. Then the part that needs them
falls back whole at the start, where a request would fail otherwise.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple


class Name(NamedTuple):
    """A name that vLLM must have: below `vllm`, or below an object that `find_missing` gets."""

    path: str
    parameters: tuple[str, ...] = ()
    """Parameters of a function, or of a class whose objects have attributes of these names."""
    is_exact: bool = False
    """Whether it must have no others: ours takes its place, or calls it with these alone."""

    def __str__(self) -> str:
        return f"{self.path}({', '.join(self.parameters)})" if self.parameters else self.path


_ENTRYPOINTS, _OUTPUTS = "vllm.entrypoints.serve", "vllm.v1.engine.output_processor"

SERVER_MODULES = (
    Name(f"{_ENTRYPOINTS}.utils.api_utils.validate_json_request", ("raw_request",)),
    Name(f"{_ENTRYPOINTS}.engine.protocol.ErrorResponse"),
    Name(f"{_ENTRYPOINTS}.lora.protocol.LoadLoRAAdapterRequest", ("lora_name", "lora_path")),
    Name(f"{_ENTRYPOINTS}.lora.protocol.UnloadLoRAAdapterRequest", ("lora_name",)),
    Name(f"{_OUTPUTS}.RequestState", ("request_id", "lora_request", "queue")),
    Name(f"{_OUTPUTS}.RequestOutputCollector.put", ("output",)),
    Name("vllm.exceptions.GracefulHTTPError"),
    Name("vllm.utils.network_utils.get_ip"),
    Name("vllm.utils.network_utils.get_loopback_ip"),
)
"""What the API server's part imports."""

SERVER_OBJECTS = (
    Name("client.collective_rpc", ("method", "args")),
    Name("client.add_lora", ("lora_request",)),
    Name("client.remove_lora"),
    Name("client.abort", ("internal",)),
    Name("client.output_processor.request_states"),
    Name("client.vllm_config.lora_config.max_lora_rank"),
    Name("client.vllm_config.model_config.is_multimodal_model"),
    Name("client.vllm_config.model_config.is_moe"),
    Name("client.vllm_config.model_config.dtype"),
    Name("client.vllm_config.model_config.hf_config"),
    Name("client.vllm_config.model_config.model"),
    Name("client.vllm_config.model_config.revision"),
    Name("client.vllm_config.parallel_config.local_engines_only"),
    Name("client.vllm_config.parallel_config.data_parallel_size"),
    Name("client.vllm_config.parallel_config.data_parallel_size_local"),
    Name("client.vllm_config.parallel_config.data_parallel_index"),
    Name("models.lora_requests"),
    Name("models.lora_resolver_lock"),
    Name("models.lora_id_counter.inc"),
    Name("models.load_lora_adapter", ("request",)),
    Name("models.unload_lora_adapter", ("request",)),
)
"""Of the server's `EngineClient` and `OpenAIServingModels`."""

WORKER = (
    Name("lora._load_adapter", ("lora_request",), is_exact=True),
    Name("lora.set_active_adapters", ("requests", "mapping"), is_exact=True),
    Name("lora.embedding_modules"),
    Name("lora._adapter_manager._create_merged_loras_inplace", ("lora_model",), is_exact=True),
    Name("lora._adapter_manager.create_dummy_lora", ("lora_id", "rank", "embedding_modules")),
    Name("lora._adapter_manager.list_adapters"),
    Name("lora._adapter_manager.lora_index_to_id"),
    Name("lora._adapter_manager.modules"),
    Name("lora._adapter_manager.device"),
    Name("lora._adapter_manager._is_moe"),
    Name("vllm.lora.request.LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    Name("vllm.lora.lora_model.LoRAModel", ("loras",)),
    Name("vllm.lora.lora_model.LoRAModel.clone", ("lora_model_id",)),
    Name("vllm.lora.lora_weights.LoRALayerWeights", ("lora_a", "lora_b")),
    Name("vllm.lora.layers.LoRAMapping", ("index_mapping",)),
    Name("vllm.distributed.get_pp_group"),
)
"""Of a worker's `WorkerLoRAManager`, and what its part imports."""


def find_missing(names: Iterable[Name], **objects: object) -> list[str]:
    """Return the names that this version of vLLM lacks, or has in another form.

    `objects` are those below which names are, by the first word of their paths.
    """
    return [str(name) for name in names if not _is_there(name, objects)]


def _is_there(name: Name, objects: dict[str, object]) -> bool:
    root, _, rest = name.path.partition(".")
    try:
        if root in objects:
            found = attrgetter(rest)(objects[root])
        else:
            found = pkgutil.resolve_name(name.path)
        if not name.parameters:
            return True
        parameters = tuple(inspect.signature(found).parameters)
    except (AttributeError, ImportError, TypeError, ValueError):
        return False
    if name.is_exact:
        return parameters == name.parameters
    return set(name.parameters) <= set(parameters)
