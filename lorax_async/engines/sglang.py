"""Plug-in for SGLang: adapters that requests name, and the scale of rsLoRA.

`register` is an entry point of `sglang.srt.plugins`, which SGLang calls in each of its processes.
It hooks four methods by SGLang's `HookRegistry`: the one that looks for a request's adapters, the
one that unloads an adapter, the constructor of their class, which logs the settings, and that of an
adapter's weights, which sets their scale.

SGLang is imported only by functions that SGLang itself calls. docs/sglang.md is for users.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from math import sqrt
from pathlib import Path
from typing import Any

from lorax_async.config import Limits, StoreConfig
from lorax_async.engines.plugin_settings import (
    BaseRequirements,
    FailureLog,
    PluginSettings,
    explain,
    layout_for,
    response_to,
)
from lorax_async.errors import (
    ConfigError,
    IncompatibleAdapterError,
    IntegrityError,
    LoraxError,
    UnsupportedAdapterError,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import parse_tensor_name
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.sources.local import CONFIG, read_header
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterRef, AdapterSpec

NAME = "lorax_async"

MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
WEIGHTS = "sglang.srt.lora.lora.LoRAAdapter"

ATTRIBUTE = "lorax_async"
"""The attribute of SGLang's TokenizerManager with its `RequestedAdapters`, or None."""

EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
"""The modules outside of the layers that SGLang changes."""

ONE_SCALE = (
    "SGLang applies one rank and one scale to all modules of an adapter, and this one has a"
    " rank_pattern or an alpha_pattern"
)

ATTEMPTS = 3
"""Loads of a local adapter whose files change meanwhile."""

_LAYER = re.compile(r"layers\.\d+\.")

Method = Callable[..., Coroutine[Any, Any, Any]]

_logger = logging.getLogger("lorax_async.engines.sglang")


def register() -> None:
    """Register the hooks, if `SGLANG_PLUGINS` names this plug-in.

    A method that SGLang has not, or not with these parameters, is not hooked; a warning says so.
    Raise `SystemExit`, which ends the start before the model is loaded, for wrong settings: SGLang
    logs other exceptions of plug-ins, and starts without them.
    """
    from sglang.srt.environ import envs  # noqa: PLC0415

    # SGLang calls all plug-ins if it is not set, and installing a package must not open a server.
    names = {name.strip() for name in (envs.SGLANG_PLUGINS.get() or "").split(",")}
    if NAME not in names:
        return
    try:
        hooks = RequestHooks(PluginSettings.from_environment(os.environ))
    except ConfigError as error:
        raise SystemExit(f"the plug-in lorax_async: {error}") from error
    from sglang.srt.lora.lora import LoRAAdapter  # noqa: PLC0415
    from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: PLC0415
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    if _takes(LoRAAdapter, __init__=("self", "uid", "config")):
        HookRegistry.register(f"{WEIGHTS}.__init__", scale_as_peft, HookType.AROUND)
    else:
        _logger.warning("the scale of rsLoRA is left to SGLang: %s is not as expected", WEIGHTS)
    if _takes(
        TokenizerManager,
        _resolve_lora_path=("self", "obj"),
        _unload_lora_adapter_locked=("self", "obj"),
        load_lora_adapter=("self", "obj"),
        unload_lora_adapter=("self", "obj"),
    ):
        HookRegistry.register(f"{MANAGER}.__init__", hooks.construct, HookType.AROUND)
        HookRegistry.register(f"{MANAGER}._resolve_lora_path", hooks.resolve, HookType.AROUND)
        unload = f"{MANAGER}._unload_lora_adapter_locked"
        HookRegistry.register(unload, hooks.unload, HookType.AROUND)
    else:
        _logger.warning("requests may name loaded adapters only: %s is not as expected", MANAGER)


def _takes(owner: type, **expected: tuple[str, ...]) -> bool:
    """Return whether `owner` has these methods, and their first parameters these names."""
    for name, parameters in expected.items():
        method = getattr(owner, name, None)
        if method is None:
            return False
        if tuple(inspect.signature(method).parameters)[: len(parameters)] != parameters:
            return False
    return True


def scale_as_peft(original: Callable[..., None], adapter: Any, *args: Any, **kwargs: Any) -> None:
    """Construct SGLang's `LoRAAdapter`, and give it PEFT's scale: alpha / sqrt(r) with rsLoRA.

    Raise ValueError, which SGLang reports, if one scale is not enough.
    """
    original(adapter, *args, **kwargs)
    config = adapter.config
    if config.hf_config.get("rank_pattern") or config.hf_config.get("alpha_pattern"):
        raise ValueError(ONE_SCALE)
    # A version of SGLang that knows rsLoRA has another scale already.
    if config.hf_config.get("use_rslora") and adapter.scaling == config.lora_alpha / config.r:
        adapter.scaling = config.lora_alpha / sqrt(config.r)


class RequestHooks:
    """The hooks of SGLang's TokenizerManager."""

    def __init__(self, settings: PluginSettings) -> None:
        self._settings = settings

    def construct(
        self, original: Callable[..., None], manager: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Construct SGLang's TokenizerManager, and log the settings, which is once for a server."""
        original(manager, *args, **kwargs)
        _logger.info("lorax_async: %s", self._settings.describe())

    async def resolve(self, original: Method, manager: Any, request: Any) -> None:
        """Load the adapters that a request names and SGLang lacks, or has in another version.

        SGLang does the rest.
        """
        if not hasattr(manager, ATTRIBUTE):
            reason = _find_obstacle(manager)
            if reason is not None:
                _logger.warning("requests may name loaded adapters only: %s", reason)
            adapters = None if reason is not None else RequestedAdapters(manager, self._settings)
            setattr(manager, ATTRIBUTE, adapters)
        adapters = getattr(manager, ATTRIBUTE)
        if adapters is None:
            await original(manager, request)
            return
        paths = request.lora_path
        names = {paths} if isinstance(paths, str) else set(paths)  # with None, as SGLang counts
        with adapters.use(names):
            await adapters.load(names)
            with adapters.enter(names):
                await original(manager, request)

    async def unload(self, original: Method, manager: Any, request: Any) -> Any:
        """Let SGLang unload an adapter, and release its folder."""
        result = await original(manager, request)
        if (adapters := getattr(manager, ATTRIBUTE, None)) is not None:
            adapters.release_unused(request.lora_name)
        return result


def _find_obstacle(manager: Any) -> str | None:
    """Return why adapters cannot be loaded for requests, or None."""
    try:
        from sglang.srt.lora import utils  # noqa: PLC0415
        from sglang.srt.managers import io_struct  # noqa: PLC0415
        from sglang.srt.runtime_context import get_lora, get_parallel, get_serving  # noqa: PLC0415

        for owner, *names in (
            (manager, "lora_registry", "lora_ref_cache", "pending_lora_unloads"),
            (manager, "lora_update_lock", "model_config"),
            (utils, "get_normalized_target_modules", "_KNOWN_LORA_TARGET_MODULES"),
            (io_struct, "LoadLoRAAdapterReqInput", "UnloadLoRAAdapterReqInput"),
            (get_lora(), "max_lora_rank", "lora_target_modules"),
        ):
            for name in names:
                getattr(owner, name)
        if get_parallel().dp_size > 1:
            return "SGLang loads no adapters at run time with data parallel replicas"
        if get_serving().tokenizer_worker_num > 1:
            return "with several tokenizer workers, none knows what the others have loaded"
        if get_lora().max_loaded_loras is None:
            _logger.warning("without --max-loaded-loras, SGLang keeps all requested adapters")
    except (ImportError, AttributeError) as error:
        return f"this version of SGLang is not as expected ({error})"
    return None


class RequestedAdapters:
    """The adapters that SGLang loaded because requests named them. On its event loop.

    SGLang's registry is the truth about what is loaded. It unloads the least recently used adapter
    beyond `--max-loaded-loras`, and would load it again from its folder by `lora_ref_cache`. So a
    folder is leased while SGLang has the adapter, or a request is between its check here and its
    start there; with the lease, the entry of that cache goes.
    """

    def __init__(self, manager: Any, settings: PluginSettings) -> None:
        self._manager = manager
        self._settings = settings
        self._opening = asyncio.Lock()
        self._store: AdapterStore | None = None
        self._check: Callable[[Path], None]
        self._folders: dict[str, AdapterFolder] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._users: Counter[str | None] = Counter()
        self._entering: Counter[str | None] = Counter()
        self._entered = asyncio.Event()
        self._failures = FailureLog(_logger)

    @contextmanager
    def use(self, names: set[str | None]) -> Iterator[None]:
        """Keep the folders of these adapters meanwhile."""
        self._users.update(names)
        try:
            yield
        finally:
            self._users -= Counter(names)  # drops names without users
            for name in filter(None, names):
                self.release_unused(name)

    @contextmanager
    def enter(self, names: set[str | None]) -> Iterator[None]:
        """Unload none of these meanwhile: SGLang looks for them, and counts their requests."""
        self._entering.update(names)
        try:
            yield
        finally:
            self._entering -= Counter(names)
            self._entered.set()

    async def load(self, names: set[str | None]) -> None:
        """Load adapters that SGLang lacks, or has in another version; one at a time each.

        Raise what SGLang answers to the client if one cannot be used. A load goes on if its callers
        leave.
        """
        from sglang.srt.runtime_context import get_lora  # noqa: PLC0415

        limit = get_lora().max_loaded_loras
        if limit is not None and len(names) > limit:
            return  # SGLang refuses the request
        loads = [self._start(name) for name in names if name]
        for load in filter(None, loads):
            await asyncio.shield(load)

    def _start(self, name: str) -> asyncio.Task[None] | None:
        """Return the adapter's load, which is running or begins; None if it needs none of ours."""
        if name in self._loads:
            return self._loads[name]
        manager = self._manager
        folder = self._folders.get(name)
        loaded = manager.lora_registry.get_all_adapters()
        known = loaded.get(name) or manager.lora_ref_cache.get(name)
        if known and (folder is None or known.lora_path != str(folder.path)):
            return None  # another client loaded it
        ref = self._settings.find(name)
        if ref is None:
            return None  # SGLang refuses the request
        is_leaving = name in manager.pending_lora_unloads
        if known and folder and not is_leaving and self._is_current(ref, folder):
            return None

        def end(load: asyncio.Task[None]) -> None:
            del self._loads[name]
            self.release_unused(name)
            if not load.cancelled():
                load.exception()  # its callers may have left

        load = self._loads[name] = asyncio.create_task(self._load(name, ref), name=f"load {name}")
        load.add_done_callback(end)
        return load

    def _is_current(self, ref: AdapterRef, folder: AdapterFolder) -> bool:
        return self._store is not None and self._store.current_key(ref) == folder.key

    async def _load(self, name: str, ref: AdapterRef) -> None:
        """Load what `ref` means now, unless SGLang has it; what it has of another version goes."""
        try:
            for _ in range(ATTEMPTS):
                folder = await self._take(name, ref)
                if folder is None or await self._load_folder(name, ref, folder):
                    self._failures.clear(name)
                    return
            raise IntegrityError(
                "its files changed each time while they were read; save to a new folder and"
                " rename it into place"
            )
        except LoraxError as error:
            located = explain(error.located(id=ref.text), ref)
            self._failures.note(name, located)
            raise _refuse(located, name) from error

    async def _take(self, name: str, ref: AdapterRef) -> AdapterFolder | None:
        """Lease and check the folder of `ref`; None if SGLang has this version.

        An earlier version is unloaded, which waits for its requests.
        """
        store, manager = await self._open_store(), self._manager
        folder, before = await store.checkout(ref), self._folders.get(name)
        try:
            registered = name in manager.lora_registry.get_all_adapters()
            if before is not None and before.key == folder.key and registered:
                folder.release()
                return None
            await asyncio.to_thread(self._check, folder.path)
            if before is not None and registered:
                await self._unload(name, folder)
        except BaseException:
            folder.release()
            raise
        if before is not None:  # SGLang may not have unloaded it from all workers
            before.release()
        self._folders[name] = folder
        return folder

    async def _unload(self, name: str, successor: AdapterFolder) -> None:
        """Unload an adapter when its requests have ended.

        A request that comes between, for several adapters, makes SGLang load the successor.
        """
        from sglang.srt.managers import io_struct  # noqa: PLC0415

        manager = self._manager
        while name in self._entering:
            self._entered.clear()
            await self._entered.wait()
        if (known := manager.lora_ref_cache.get(name)) is not None:
            path = str(successor.path)
            manager.lora_ref_cache[name] = type(known)(lora_name=name, lora_path=path)
        await manager.unload_lora_adapter(io_struct.UnloadLoRAAdapterReqInput(lora_name=name))

    async def _load_folder(self, name: str, ref: AdapterRef, folder: AdapterFolder) -> bool:
        """Load an adapter. Return whether all that SGLang read is of the folder's version."""
        from sglang.srt.managers import io_struct  # noqa: PLC0415

        if name in self._manager.pending_lora_unloads:
            await self._finish_unload(name)
        load = io_struct.LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(folder.path))
        result = await self._manager.load_lora_adapter(load)
        if not result.success:  # it may be in some workers only
            await self._finish_unload(name)
        # Another client may have loaded it by SGLang's own route.
        if not result.success and "already loaded" not in result.error_message:
            raise ValueError(f"SGLang cannot load the adapter {name!r}: {result.error_message}")
        store = await self._open_store()
        return not folder.key.files or await store.resolve(ref) == folder.key

    async def _finish_unload(self, name: str) -> None:
        """Unload an adapter whose unload was cut short, as by a caller that left."""
        from sglang.srt.managers import io_struct  # noqa: PLC0415

        async with self._manager.lora_update_lock:  # now no unload is in progress
            if name in self._manager.pending_lora_unloads:
                unload = io_struct.UnloadLoRAAdapterReqInput(lora_name=name)
                await self._manager._unload_lora_adapter_locked(unload)  # noqa: SLF001

    def release_unused(self, name: str) -> None:
        """Release an adapter's folder if SGLang has unloaded it and no request is on its way."""
        folder = self._folders.get(name)
        if folder is None or name in self._users or name in self._loads:
            return
        manager = self._manager
        loaded = manager.lora_registry.get_all_adapters().get(name)
        if name in manager.pending_lora_unloads or (
            loaded and loaded.lora_path == str(folder.path)
        ):
            return
        self._release(name)

    def _release(self, name: str) -> None:
        folder, known = self._folders.pop(name), self._manager.lora_ref_cache.get(name)
        if known is not None and known.lora_path == str(folder.path):
            del self._manager.lora_ref_cache[name]
        folder.release()

    async def _open_store(self) -> AdapterStore:
        async with self._opening:
            if self._store is None:
                self._check = await asyncio.to_thread(
                    _make_check, self._manager.model_config, self._settings
                )
                store = AdapterStore(StoreConfig(**self._settings.store_settings()))
                self._store = await store.__aenter__()
            return self._store

    async def close(self) -> None:
        """Release all folders and close the store; SGLang has no moment for it but its exit."""
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for folder in self._folders.values():
            folder.release()
        self._folders.clear()
        if self._store is not None:
            await self._store.close()


def _refuse(error: LoraxError, name: str) -> Exception:
    """Return what SGLang answers: a ValueError with status 400, an HTTPException with its own."""
    from fastapi import HTTPException  # noqa: PLC0415

    status, text, headers = response_to(error, name)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return HTTPException(status, text, headers)
    return ValueError(text)


def _make_check(model_config: Any, settings: PluginSettings) -> Callable[[Path], None]:
    """Return what raises the `AdapterError` that says why an adapter does not fit. Both block."""
    from sglang.srt.runtime_context import get_lora  # noqa: PLC0415

    layout = layout_for(model_config.hf_config.to_dict(), _logger)
    base = BaseRequirements(
        layout,
        get_lora().max_lora_rank,
        check_finite=settings.check_finite,
        engine="SGLang",
        base=model_config.model_path,
        base_copies=settings.base_copies,
        limits=settings.limits,
    )
    gated = layout is not None and any(".gate_proj" in module.name for module in layout.modules)
    served = _served_names()

    def check(folder: Path) -> None:
        base.check(folder)
        spec, modules = _read_modules(folder, base.limits)
        _require_one_stack(modules)
        _require_fusable(modules, gated=gated)
        _require_targets(modules, spec, served)
        _require_both_embeddings(modules, served)

    return check


def _served_names() -> set[str] | None:
    """Return SGLang's names of the modules that a server changes, None if it infers them."""
    from sglang.srt.lora import utils  # noqa: PLC0415
    from sglang.srt.runtime_context import get_lora  # noqa: PLC0415

    targets = get_lora().lora_target_modules
    if not targets:
        return None
    if "all" in targets:  # those of these that the base has
        return set(utils._KNOWN_LORA_TARGET_MODULES)  # noqa: SLF001
    return set(utils.get_normalized_target_modules(targets))


def _read_modules(folder: Path, limits: Limits) -> tuple[AdapterSpec, set[str]]:
    """Return an adapter's config and modules.

    Raise `UnsupportedAdapterError` for what SGLang cannot apply.
    """
    spec = parse_config((folder / CONFIG).read_bytes(), limits)
    if spec.rank_patterns or spec.alpha_patterns:
        raise UnsupportedAdapterError(ONE_SCALE)
    header, _ = read_header(folder, limits)
    return spec, {parse_tensor_name(tensor.name).module for tensor in header.tensors}


def _require_one_stack(modules: set[str]) -> None:
    """Raise `UnsupportedAdapterError` for modules that SGLang would leave out or confuse.

    It reads the number of a layer, and not of which part of the base it is a layer.
    """
    stacks: dict[str, str] = {}
    for module in sorted(modules):
        stack = _LAYER.split(module, maxsplit=1)[0]
        if stack != module:
            stacks.setdefault(stack, module)
        elif module.rpartition(".")[2] not in EMBEDDINGS:
            raise UnsupportedAdapterError(f"SGLang leaves out {module!r}, which is in no layer")
    if len(stacks) > 1:
        one, other, *_ = stacks.values()
        raise UnsupportedAdapterError(f"SGLang cannot tell the layers of {one!r} and {other!r}")


def _require_fusable(modules: set[str], *, gated: bool) -> None:
    """Raise `UnsupportedAdapterError` if SGLang cannot fuse q, k, v or, where `gated`, gate and up.

    It makes zeros for k and for up only. Without the others its load fails, or its scheduler ends
    when the adapter is first used.
    """
    for module in sorted(modules):
        parent, _, last = module.rpartition(".")
        needed = {"q_proj", "v_proj"} if last in {"q_proj", "k_proj", "v_proj"} else set()
        if last == "up_proj" and gated:
            needed = {"gate_proj"}
        missing = sorted(name for name in needed if f"{parent}.{name}" not in modules)
        if missing:
            raise UnsupportedAdapterError(
                f"SGLang applies {module!r} only together with {missing[0]!r}, which it does not"
                " change"
            )


def _require_targets(modules: set[str], spec: AdapterSpec, served: set[str] | None) -> None:
    """Raise `IncompatibleAdapterError` for a module that the server does not change.

    Its tensors end SGLang's scheduler, or are left out in the embeddings. A server that infers its
    modules does so from `target_modules`, which name all of the adapter's (`pair_tensors`).
    """
    from sglang.srt.lora.utils import get_normalized_target_modules  # noqa: PLC0415

    targets = spec.targets
    if served is None and (targets is None or isinstance(targets, str) or "all" in targets):
        raise IncompatibleAdapterError(
            "its config names no target modules, which a server without --lora-target-modules needs"
        )
    for module in sorted(modules):
        if served is not None and not get_normalized_target_modules([module]) <= served:
            raise IncompatibleAdapterError(
                f"it changes {module!r}, which is not among the target modules of this server"
                " (--lora-target-modules)"
            )


def _require_both_embeddings(modules: set[str], served: set[str] | None) -> None:
    """Raise `UnsupportedAdapterError` for one of `EMBEDDINGS` alone, if both are served.

    In the other one, SGLang would apply what the adapter before it left in the slot.
    """
    changed = EMBEDDINGS & {module.rpartition(".")[2] for module in modules}
    if len(changed) == 1 and (served is None or served >= EMBEDDINGS):
        (one,), (other,) = changed, EMBEDDINGS - changed
        raise UnsupportedAdapterError(
            f"it changes {one!r} and not {other!r}, in which SGLang would apply what another"
            " adapter left there; name one of them only in --lora-target-modules"
        )
