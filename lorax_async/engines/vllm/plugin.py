"""What vLLM's entry points load: a resolver of adapter names, and the server's part.

`register` is `vllm.general_plugins`, called in every process of vLLM; `ServerPlugin` is
`vllm.endpoint_plugins`, made in the API server only. Both do nothing unless `VLLM_PLUGINS` names
this plug-in, because installing a package must not open a server to new adapters.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from lorax_async import layouts
from lorax_async.config import StoreConfig
from lorax_async.engines.plugin_settings import BaseRequirements, PluginSettings, fused_width
from lorax_async.engines.vllm.checked_folders import CheckedFolders
from lorax_async.engines.vllm.engine_calls import EngineCalls
from lorax_async.engines.vllm.interface import SERVER_MODULES, SERVER_OBJECTS, find_missing
from lorax_async.engines.vllm.notices import network_namespace
from lorax_async.engines.vllm.routes import attach_metrics, attach_refusals, attach_routes, refuse
from lorax_async.engines.vllm.served_adapters import ServedAdapters
from lorax_async.errors import ConfigError, LoraxError
from lorax_async.planning.layout import ModelLayout
from lorax_async.store import AdapterStore

NAME = "lorax_async"

_logger = logging.getLogger("vllm.lorax_async")  # vLLM writes what its children log


class NameResolver:
    """A `vllm.lora.resolver.LoRAResolver`. vLLM awaits it before a request reaches the engine."""

    def __init__(self) -> None:
        self.serving: tuple[PluginSettings, ServedAdapters] | None = None
        self.folders: CheckedFolders | None = None
        """In place of `serving` where vLLM is not as expected."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:  # noqa: ARG002
        """Return a LoRARequest, or None for a name that requests may not use.

        Raise an `AdapterRefusal`, which is a fastapi HTTPException, for an adapter that fails.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        if self.folders is not None:
            return await self._resolve_folder(self.folders, lora_name)
        if self.serving is None:
            return None
        settings, served = self.serving
        ref = settings.find(lora_name)
        if ref is None:
            return None  # another resolver may know it
        try:
            adapter = await served.prepare(lora_name, ref)
        except LoraxError as error:
            raise refuse(error, lora_name) from error
        request = LoRARequest(lora_name, 1, adapter.path)  # vLLM sets the number
        adapter.is_resolvable = True
        served.add(adapter, request)
        return request

    async def _resolve_folder(self, folders: CheckedFolders, lora_name: str) -> Any:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        if (ref := folders.settings.find(lora_name)) is None:
            return None
        try:
            return LoRARequest(lora_name, 1, await folders.fetch(lora_name, ref))
        except LoraxError as error:
            raise refuse(error, lora_name) from error


RESOLVER = NameResolver()
"""One for the process: vLLM may call `register` again."""


def register() -> None:
    """Register the resolver, if `VLLM_PLUGINS` names this plug-in.

    Raise `ConfigError` for wrong settings: vLLM calls this first before it parses its arguments, so
    that they end the start in seconds, not when the model is loaded.
    """
    from vllm import envs  # noqa: PLC0415
    from vllm.lora.resolver import LoRAResolverRegistry  # noqa: PLC0415

    if NAME not in (envs.VLLM_PLUGINS or ()):
        return
    if parent_process() is None:  # engine and workers use none, and may not have the folders
        read_settings()
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, RESOLVER)


def read_settings() -> PluginSettings:
    """Return the settings of the environment. Raise `ConfigError` if they, or vLLM's, are wrong."""
    from vllm import envs  # noqa: PLC0415

    settings = PluginSettings.from_environment(os.environ)
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError(
            "the plug-in lorax_async needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: without it vLLM asks"
            " no resolver"
        )
    return settings


class ServerPlugin:
    """A `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = NAME
    required_tasks: tuple[str, ...] | None = (
        "generate",
        "embed",
        "classify",
        "token_embed",
        "token_classify",
    )

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._detach: Callable[[], None] = lambda: None
        """Take the routes away again."""

    def attach_router(self, app: Any) -> None:
        """Add routes, and close the store when the server ends."""
        attach_refusals(app)
        if not find_missing(SERVER_MODULES):
            self._detach = attach_routes(app)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with self._stack, inner(app) as state:
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:  # noqa: ARG002
        """Open the store and extend the workers.

        Raise `ConfigError`, which ends the start, for wrong settings and a server without LoRA.
        """
        settings = read_settings()
        config = getattr(engine_client, "vllm_config", None)
        if config is not None and getattr(config, "lora_config", None) is None:
            raise ConfigError("the plug-in lorax_async needs vLLM's --enable-lora")
        store = AdapterStore(StoreConfig(**settings.store_settings()))
        await self._stack.enter_async_context(store)
        models = getattr(state, "openai_serving_models", None)
        names = (*SERVER_MODULES, *SERVER_OBJECTS)
        if missing := find_missing(names, client=engine_client, models=models):
            self._detach()
            await self._serve_folders(config, settings, store, missing)
        else:
            state.lorax = await self._serve(engine_client, models, settings, store)
            RESOLVER.serving = state.lorax
        _logger.info("lorax_async: %s", settings.describe())

    async def _serve(
        self, client: Any, models: Any, settings: PluginSettings, store: AdapterStore
    ) -> tuple[PluginSettings, ServedAdapters]:
        engine, config = EngineCalls(client), client.vllm_config

        def read_base() -> BaseRequirements:
            return BaseRequirements(
                read_layout(config.model_config),
                config.lora_config.max_lora_rank,
                check_finite=settings.check_finite,
                engine="vLLM",
                fused_width=fused_width(config.model_config.hf_config.to_dict()),
                base=config.model_config.model,
                base_copies=settings.base_copies,
                limits=settings.limits,
            )

        served = ServedAdapters(settings, store, engine, models, read_base)
        added = [request.lora_int_id for request in models.lora_requests.values()]
        await engine.setup(settings.host_bytes, added)
        if engine.extended:
            namespaces = await engine.call("lorax_namespace")
            host = notice_host(namespaces, config.parallel_config)
            notices = await engine.listen(host, served.handle_loss)
            self._stack.callback(notices.close)
        await served.load_base()
        self._stack.push_async_callback(served.close)
        served.add_loaded()
        watch = asyncio.create_task(served.watch(), name="lorax watch")
        self._stack.callback(watch.cancel)
        attach_metrics(served, config.parallel_config.data_parallel_index)
        return settings, served

    async def _serve_folders(
        self, config: Any, settings: PluginSettings, store: AdapterStore, missing: Sequence[str]
    ) -> None:
        """Fetch and check adapters, and leave all else to vLLM, which lacks the names `missing`."""
        _logger.warning(
            "adapters are fetched and checked beside vLLM's engine, and loaded by vLLM alone, each"
            " once: there are none of the plug-in's routes and metrics, and other versions are not"
            " noticed. This version of lorax_async needs vLLM's %s",
            ", ".join(missing),
        )
        layout = width = None
        with suppress(AttributeError):  # among the missing ones
            layout = await asyncio.to_thread(read_layout, config.model_config)
            width = fused_width(config.model_config.hf_config.to_dict())
        rank = getattr(getattr(config, "lora_config", None), "max_lora_rank", None)
        base = BaseRequirements(
            layout,
            rank,
            check_finite=settings.check_finite,
            engine="vLLM",
            fused_width=width,
            base=getattr(config.model_config, "model", ""),
            base_copies=settings.base_copies,
            limits=settings.limits,
        )
        RESOLVER.folders = CheckedFolders(settings, store, base)
        self._stack.callback(RESOLVER.folders.close)


def notice_host(namespaces: Iterable[str], parallel: Any) -> str:
    """Return where workers reach this process: by loopback, unless one is on another host."""
    from vllm.utils.network_utils import get_ip, get_loopback_ip  # noqa: PLC0415

    engines = 1 if parallel.local_engines_only else parallel.data_parallel_size
    are_here = parallel.data_parallel_size_local >= engines  # vLLM asks the first one alone
    is_local = are_here and set(namespaces) == {network_namespace()}
    host: str = get_loopback_ip() if is_local else get_ip()
    return host


def read_layout(model_config: Any) -> ModelLayout | None:
    """Return the base's layout, or None, after a warning, if its modules have other names here.

    Then vLLM judges alone whether an adapter fits. Blocks.
    """
    reason = None
    if model_config.is_multimodal_model or model_config.is_moe:
        reason = "adapters of multimodal and mixture-of-experts models have several spellings"
    else:
        try:
            return layouts.from_pretrained(_config_folder(model_config), model_config.dtype)
        except LoraxError as error:
            reason = error.problem
    _logger.warning("adapters are not compared with the shapes of the base: %s", reason)
    return None


def _config_folder(model_config: Any) -> Path:
    """Return a folder with the base's config.json, which vLLM has read from there."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    try:
        folder = snapshot_download(
            model_config.model, revision=model_config.revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        raise ConfigError(f"there is no config.json of {model_config.model!r}: {error}") from error
    return Path(folder)
