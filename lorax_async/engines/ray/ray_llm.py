"""Adapters of Ray LLM from an `AdapterStore`: verified, within a budget.

Ray LLM's `LLMServer` takes a `model_downloader` class. The names of its modules are private: these
are Ray 2.60's.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from fastapi import HTTPException

from lorax_async.config import PEERS_REMOVED, StoreConfig
from lorax_async.engines.plugin_settings import response_to
from lorax_async.errors import ConfigError, LoraxError
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterId


def model_downloader(
    config: StoreConfig, adapter_of: Callable[[str], AdapterId] | None = None, fleet: None = None
) -> type:
    """Return a class for `LLMServer(model_downloader=…)`, with one store for each replica.

    `adapter_of` returns the adapter of Ray LLM's id "base:adapter"; by default, the folder
    "adapter" below `dynamic_lora_loading_path`, or without one the id "adapter" itself. Its folder
    is leased until Ray LLM drops the adapter (`max_num_adapters_per_replica`).
    """
    if fleet is not None:
        raise ConfigError(PEERS_REMOVED)

    class StoreDownloader(ModelDownloader):
        def __init__(self, download_timeout_s: float | None = None, max_tries: int = 1) -> None:
            super().__init__(config, adapter_of, download_timeout_s, max_tries)

    return StoreDownloader


class ModelDownloader:
    """What Ray LLM calls for an adapter's files. The store opens with the first call."""

    def __init__(
        self,
        config: StoreConfig,
        adapter_of: Callable[[str], AdapterId] | None,
        download_timeout_s: float | None,
        max_tries: int,  # noqa: ARG002 - the store retries within its deadline
    ) -> None:
        self._config = config
        self._adapter_of = adapter_of
        self._timeout = download_timeout_s
        self._opening: asyncio.Task[AdapterStore] | None = None

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Any:
        """Return a `DiskMultiplexConfig` with the folder of an adapter.

        Raise an `HTTPException`, as Ray LLM's own: of other errors, clients get status 500.
        """
        from ray.llm._internal.common.models import global_id_manager  # noqa: PLC0415
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig  # noqa: PLC0415

        try:
            folder = await self._checkout(lora_model_id, llm_config)
        except LoraxError as error:
            raise HTTPException(*response_to(error, lora_model_id)) from error
        found = DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=str(folder.path),
            lora_assigned_int_id=global_id_manager.next(),
        )
        release = partial(asyncio.get_running_loop().call_soon_threadsafe, folder.release)
        weakref.finalize(found, release).atexit = False
        return found

    async def _checkout(self, lora_model_id: str, llm_config: Any) -> AdapterFolder:
        if self._adapter_of is not None:
            adapter = self._adapter_of(lora_model_id)
        else:
            name = lora_model_id.partition(":")[2]
            root = llm_config.lora_config.dynamic_lora_loading_path
            adapter = name if root is None else f"{root}/{name}/"
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            # Others wait for it, too. Ray cancels the calls of a request whose client leaves: those
            # made in its context.
            self._opening = asyncio.create_task(self._open(), context=Context())
        store = await asyncio.shield(self._opening)
        return await store.checkout(adapter, timeout=self._timeout)

    async def _open(self) -> AdapterStore:
        return await AdapterStore(self._config).__aenter__()  # it ends with the replica's process
