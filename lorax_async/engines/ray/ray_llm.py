"""Adapters of Ray LLM from an `AdapterStore`: verified, for the base, within a budget.

Ray LLM's `LLMServer` takes a `model_downloader` class. The names of its modules are private: these
are Ray 2.60's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from lorax_async.config import PEERS_REMOVED, Limits, StoreConfig
from lorax_async.engines.plugin_settings import (
    BaseRequirements,
    FailureLog,
    fused_width,
    layout_for,
    response_to,
)
from lorax_async.errors import ConfigError, LoraxError
from lorax_async.remote.hub import download_base
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterId, as_ref, text_of

MAX_RANK = 16
"""vLLM's highest rank where `engine_kwargs` has no `max_lora_rank`."""

_logger = logging.getLogger("lorax_async.engines.ray")


def model_downloader(
    config: StoreConfig,
    adapter_of: Callable[[str], AdapterId] | None = None,
    fleet: None = None,
    *,
    check_finite: bool = True,
) -> type:
    """Return a class for `LLMServer(model_downloader=…)`, with one store for each replica.

    An adapter is checked before Ray LLM gets it: against the base's shapes and the server's
    `max_lora_rank`, for weights that are NaN or infinite unless `check_finite` is False, and for
    what vLLM would not apply.

    `adapter_of` returns the adapter of Ray LLM's id "base:adapter"; by default, the folder
    "adapter" below `dynamic_lora_loading_path`, or without one the id "adapter" itself. Its folder
    is leased until Ray LLM drops the adapter (`max_num_adapters_per_replica`).
    """
    if fleet is not None:
        raise ConfigError(PEERS_REMOVED)

    class StoreDownloader(ModelDownloader):
        def __init__(self, download_timeout_s: float | None = None, max_tries: int = 1) -> None:
            super().__init__(
                config, adapter_of, download_timeout_s, max_tries, check_finite=check_finite
            )

    return StoreDownloader


class ModelDownloader:
    """What Ray LLM calls for an adapter's files. The store opens with the first call."""

    def __init__(
        self,
        config: StoreConfig,
        adapter_of: Callable[[str], AdapterId] | None,
        download_timeout_s: float | None,
        max_tries: int,  # noqa: ARG002 - the store retries within its deadline
        *,
        check_finite: bool = True,
    ) -> None:
        self._config = config
        self._adapter_of = adapter_of
        self._timeout = download_timeout_s
        self._check_finite = check_finite
        self._opening: asyncio.Task[tuple[AdapterStore, BaseRequirements]] | None = None
        self._failures = FailureLog(_logger)

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Any:
        """Return a `DiskMultiplexConfig` with the folder of an adapter.

        Raise an `HTTPException`, as Ray LLM's own: of other errors, clients get status 500.
        """
        from ray.llm._internal.common.models import global_id_manager  # noqa: PLC0415
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig  # noqa: PLC0415

        try:
            folder = await self._checkout(lora_model_id, llm_config)
        except LoraxError as error:
            self._failures.note(lora_model_id, error)
            raise HTTPException(*response_to(error, lora_model_id)) from error
        self._failures.clear(lora_model_id)
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
            self._opening = asyncio.create_task(self._open(llm_config), context=Context())
        store, base = await asyncio.shield(self._opening)
        folder = await store.checkout(adapter, timeout=self._timeout)
        try:
            await asyncio.to_thread(base.check, folder.path)
        except BaseException as error:
            folder.release()
            if isinstance(error, LoraxError):
                raise error.located(id=text_of(as_ref(adapter))) from error.__cause__
            raise
        return folder

    async def _open(self, llm_config: Any) -> tuple[AdapterStore, BaseRequirements]:
        limits, check_finite = self._config.limits, self._check_finite
        base = await asyncio.to_thread(_read_base, llm_config, limits, check_finite=check_finite)
        return await AdapterStore(self._config).__aenter__(), base  # it ends with the process


def _read_base(llm_config: Any, limits: Limits, *, check_finite: bool) -> BaseRequirements:
    """Return what the adapters of a replica have to fit. Blocks."""
    rank = int(llm_config.engine_kwargs.get("max_lora_rank", MAX_RANK))
    config = _read_config(llm_config)
    layout, base = None if config is None else layout_for(config, _logger), ""
    with suppress(OSError, LoraxError):  # then its copies of the base's weights are refused
        base = str(_base_folder(llm_config))
    return BaseRequirements(
        layout,
        rank,
        check_finite=check_finite,
        engine="vLLM",
        fused_width=fused_width(config or {}),
        base=base,
        limits=limits,
    )


def _read_config(llm_config: Any) -> dict[str, Any] | None:
    """Return the base's config, or None, after a warning, if it cannot be read. Blocks."""
    try:
        config = json.loads((_base_folder(llm_config) / "config.json").read_bytes())
    except (OSError, ValueError, LoraxError) as error:
        _logger.warning("adapters are not compared with the shapes of the base: %s", str(error))
        return None
    return config if isinstance(config, dict) else {}


def _base_folder(llm_config: Any) -> Path:
    """Return a folder with the base's config.json, which Ray LLM and vLLM have brought here."""
    base = llm_config.model_loading_config.model_source or llm_config.model_id
    if not isinstance(base, str) or "://" in base:
        base = llm_config.get_engine_config().actual_hf_model_id
    if os.path.isdir(base):
        return Path(base)
    revision = llm_config.engine_kwargs.get("revision")
    return Path(download_base(base, revision=revision, token=None, endpoint=None, offline=True))
