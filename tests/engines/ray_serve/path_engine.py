"""An engine for Ray LLM's server, without a model; only its replicas import it."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig, LLMConfig
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse
from ray.llm._internal.serve.core.engine.protocol import LLMEngine


class PathEngine(LLMEngine):  # type: ignore[misc]  # Ray is not installed everywhere
    """Answers with the path and the number of the request's adapter, as Ray LLM gave them.

    Like vLLM's, it keeps no reference to what Ray LLM gave it.
    """

    def __init__(self, _: LLMConfig) -> None:
        self._loras: dict[str, tuple[str, int]] = {}

    async def start(self) -> None: ...

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def resolve_lora(self, lora_model: DiskMultiplexConfig) -> None:
        self._loras[lora_model.model_id] = lora_model.local_path, lora_model.lora_assigned_int_id

    async def completions(self, request: Any, _: Any = None) -> AsyncIterator[Any]:
        text = json.dumps(self._loras[request.model])
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        usage = Counter(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        yield CompletionResponse(
            model=request.model, choices=[choice], usage=usage, created=int(time.time())
        )

    async def reset_prefix_cache(self) -> None: ...

    chat = embeddings = transcriptions = completions
