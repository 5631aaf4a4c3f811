"""Adapters of Ray LLM from an `AdapterStore`: verified, within a budget, from peers first.

Ray LLM's `LLMServer` takes a `model_downloader` class. The names of its modules are private: these
are Ray 2.60's.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from contextvars import Context
from functools import partial
from typing import Any

from fastapi import HTTPException

from lorax_async.config import StoreConfig
from lorax_async.engines.plugins import response_to
from lorax_async.engines.ray.replicas import join_fleet
from lorax_async.errors import LoraxError
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterId


def model_downloader(
    config: StoreConfig, adapter_of: Callable[[str], AdapterId] | None = None, fleet: str = "fleet"
) -> type:
    """Return a class for `LLMServer(model_downloader=…)`, with one store for each replica.

    `adapter_of` returns the adapter of Ray LLM's id "base:adapter"; by default, the folder
    "adapter" below `dynamic_lora_loading_path`, or without one the id "adapter" itself. Its folder
    is leased until Ray LLM drops the adapter (`max_num_adapters_per_replica`).
    """

    class StoreDownloader(ModelDownloader):
        def __init__(self, download_timeout_s: float | None = None, max_tries: int = 1) -> None:
            super().__init__(config, adapter_of, fleet, download_timeout_s, max_tries)

    return StoreDownloader


class ModelDownloader:
    """What Ray LLM calls for an adapter's files. The store opens with the first call."""

    def __init__(
        self,
        config: StoreConfig,
        adapter_of: Callable[[str], AdapterId] | None,
        fleet: str,
        download_timeout_s: float | None,
        max_tries: int,  # noqa: ARG002 - the store retries within its deadline
    ) -> None:
        self._config = config
        self._adapter_of = adapter_of
        self._fleet = fleet
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
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(AdapterStore(self._config))
            await stack.enter_async_context(join_fleet(store, self._fleet))
            self._closing = stack.pop_all()  # both end with the replica's process
        return store
