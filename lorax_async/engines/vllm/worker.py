"""Weights for vLLM's workers, built in a thread beside the engine's loop and kept in host memory.

vLLM loads an adapter inside its loop: it opens the file, casts, packs and pins tensor by tensor,
and does so again whenever the adapter has left its own cache. Here the same code of vLLM's runs in
a thread; the loop only copies the result into a slot.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lorax_async.engines.vllm.interface import WORKER, find_missing
from lorax_async.engines.vllm.notices import (
    AdapterLost,
    BuildEnded,
    NoticeAddress,
    network_namespace,
    send_notice,
)
from lorax_async.errors import shorten
from lorax_async.lru import remember

FILES = ("adapter_config.json", "adapter_model.safetensors")

MAX_REQUESTS = 4096
"""LoRARequests that a worker remembers; the one that was loaded longest ago goes first."""


def unexpected_interface(lora: Any) -> str | None:
    """Return why a worker's LoRA object cannot be extended, or None if it is as expected."""
    if missing := find_missing(WORKER, lora=lora):
        return f"this version of lorax_async needs vLLM's {', '.join(missing)}"
    if lora._adapter_manager._is_moe:  # noqa: SLF001
        return "vLLM stacks the experts of this model while it loads, which cannot be done twice"
    return None


class WorkerExtension:
    """What `--worker-extension-cls` adds to each worker, for `collective_rpc`.

    Each call returns at once: it runs in the engine's loop.
    """

    def lorax_setup(self, host_bytes: int, added: Sequence[int]) -> str | None:
        """Begin to serve weights from host memory. Return the reason if that is not possible.

        `added` are the numbers of the adapters that vLLM has already.
        """
        lora = getattr(getattr(self, "model_runner", None), "lora_manager", None)
        reason = unexpected_interface(lora)
        if reason is None and getattr(self, "_lorax_weights", None) is None:
            self._lorax_weights = BuiltWeights(lora, host_bytes, added)
            # On this object alone: other workers and other users of the class keep theirs.
            lora._load_adapter = self._lorax_weights.load  # type: ignore[union-attr]  # noqa: SLF001
            lora.set_active_adapters = self._lorax_weights.activate  # type: ignore[union-attr]
        return reason

    def lorax_namespace(self) -> str:
        return network_namespace()

    def lorax_notify(self, address: NoticeAddress) -> None:
        self._lorax_weights.address = address

    def lorax_prepare(self, path: str) -> str | None:
        """Begin to build the weights in folder `path`, unless they are built already.

        Return the ticket of the notice that will tell its end, or None if it is built.
        """
        return self._lorax_weights.prepare(path)

    def lorax_prepared(self, path: str) -> tuple[bool, str | None]:
        """Return whether `lorax_prepare` has ended, and its error."""
        return self._lorax_weights.progress(path)

    def lorax_forget(self, path: str, keep_copy: bool) -> None:
        """Close the files of `path`, and drop its weights unless `keep_copy`."""
        self._lorax_weights.forget(path, keep_copy=keep_copy)

    def lorax_report(self) -> dict[str, Any]:
        """Return what is where, and counts since the start; see `BuiltWeights.report`."""
        return self._lorax_weights.report()


class Build(NamedTuple):
    """A build that runs, or has ended since the last call."""

    ticket: str
    """Another one for each build: a notice of an earlier one is not taken for it."""
    future: Future[Any]


class BuiltWeights:
    """The LoRA weights of one worker in host memory, by their folder, within a budget of bytes.

    All methods run in the engine's loop; `_build` and `_tell` run in a thread.
    """

    address: NoticeAddress | None = None
    """Where to send notices."""

    def __init__(self, lora: Any, budget: int, added: Iterable[int] = ()) -> None:
        self._lora = lora
        self._load: Callable[[Any], Any] = lora._load_adapter  # noqa: SLF001
        self._activate: Callable[[Any, Any], None] = lora.set_active_adapters
        self._budget = budget
        self._models: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._files: dict[str, OpenFiles] = {}
        self._building: dict[str, Build] = {}
        self._lost: dict[str, str] = {}
        self._added = set(added)
        self._requests: OrderedDict[int, Any] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorax-build")
        self.counts = dict.fromkeys(("built", "hits", "loads", "reopened", "lost"), 0)

    # -- building ---------------------------------------------------------------------------------

    def prepare(self, path: str) -> str | None:
        """Begin to open the files of `path` and to build it; return the ticket of the build.

        Return None if it is built already.
        """
        self.progress(path)
        if path in self._models:
            self._models.move_to_end(path)
            if path in self._files:
                return None
        build = self._building.get(path)
        if build is None or build.future.done():  # it failed
            build = Build(secrets.token_hex(8), self._thread.submit(self._build, path))
            self._building[path] = build
            build.future.add_done_callback(partial(self._tell, build.ticket, path))
        return build.ticket

    def _tell(self, ticket: str, path: str, future: Future[Any]) -> None:
        if self.address is not None and not future.cancelled():
            send_notice(self.address, BuildEnded(ticket, _error_of(future, path)))

    def progress(self, path: str) -> tuple[bool, str | None]:
        """Return whether building has ended, and its error. Take the weights that it built."""
        build = self._building.get(path)
        if build is None:
            return True, None
        if not build.future.done():
            return False, None
        if (error := _error_of(build.future, path)) is not None:
            return True, error  # and again, until `forget`: several may ask
        del self._building[path]
        files, model, nbytes = build.future.result()
        if (before := self._files.get(path)) is not None and before is not files:
            before.close()
        self._files[path] = files
        self._lost.pop(path, None)
        if model is not None:
            self._keep(path, model, nbytes)
        return True, None

    def _build(self, path: str) -> tuple[OpenFiles, Any, int]:
        """Load the weights as vLLM does, and as it adds them, so that adding repeats nothing.

        What was built before is built from the same files: a path stands for one version.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        before = self._files.get(path)
        if before is not None and not before.are_unchanged():
            before = None
        files = before or OpenFiles(path)
        try:
            if path in self._models:
                return files, None, 0
            adapters = self._lora._adapter_manager  # noqa: SLF001
            if adapters.device.type == "cuda":
                import torch  # noqa: PLC0415

                torch.cuda.set_device(adapters.device)  # pinning must not open another GPU
            with nullcontext(path) if before is None else files.folder() as folder:
                model, nbytes = self._load_merged(LoRARequest("lorax-async", 1, folder))
            _require_applied(model, adapters)
            self.counts["built"] += 1
        except BaseException:
            if before is None:
                files.close()
            raise
        return files, model, nbytes

    def _load_merged(self, lora_request: Any) -> tuple[Any, int]:
        """Load and merge an adapter as vLLM does; return its weights and their bytes.

        Merging multiplies B by the scale in place, once: clones share the result.
        """
        model = self._load(lora_request)
        self._lora._adapter_manager._create_merged_loras_inplace(model)  # noqa: SLF001
        return model, _detach(model)

    def _keep(self, path: str, model: Any, nbytes: int) -> None:
        """Keep weights within the budget; not those that are larger than all of it."""
        self._models.pop(path, None)
        if nbytes > self._budget:
            return
        used = sum(size for _, size in self._models.values())
        while used + nbytes > self._budget:
            _, (_, size) = self._models.popitem(last=False)
            used -= size
        self._models[path] = model, nbytes

    def forget(self, path: str, *, keep_copy: bool) -> None:
        self.progress(path)
        self._cancel(path)
        if (files := self._files.pop(path, None)) is not None:
            files.close()
        self._lost.pop(path, None)
        if not keep_copy:
            self._models.pop(path, None)

    def _cancel(self, path: str) -> None:
        build = self._building.pop(path, None)
        if build is not None and not build.future.cancel():
            build.future.add_done_callback(_close_files)

    # -- serving ----------------------------------------------------------------------------------

    def load(self, lora_request: Any) -> Any:
        """Return an adapter's weights; replaces `WorkerLoRAManager._load_adapter`.

        Called by `add_lora`, where an exception becomes the call's, and by the step for an adapter
        that left vLLM's cache, where one ends the engine. So an adapter that was added before falls
        back to its open files, and at last to zeros: then the server is told at once, and fails the
        adapter's requests.
        """
        path, number = lora_request.lora_path, lora_request.lora_int_id
        self._remember(lora_request)
        self.progress(path)  # of several engines, the server waits for the first one alone
        if path in self._models:
            self._models.move_to_end(path)
            self.counts["hits"] += 1
            model = self._models[path][0].clone(number)
        else:
            model = self._load_in_loop(lora_request)
        self._added.add(number)
        return model

    def _load_in_loop(self, lora_request: Any) -> Any:
        self.counts["loads"] += 1
        path, number = lora_request.lora_path, lora_request.lora_int_id
        try:
            if path in self._files:
                model, nbytes = self._load_again(lora_request)
                self._keep(path, model.clone(1), nbytes)
            else:  # not one of ours
                model = self._load(lora_request)
        except Exception as error:
            if number not in self._added:
                raise
            self._report_loss(path, error)
            return self._lora._adapter_manager.create_dummy_lora(  # noqa: SLF001
                number, 1, self._lora.embedding_modules
            )
        self._lost.pop(path, None)
        return model

    def _load_again(self, lora_request: Any) -> tuple[Any, int]:
        """Load an adapter from the files that were built, which need not be in its folder now."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        files = self._files[lora_request.lora_path]
        if not files.are_in_place():
            self.counts["reopened"] += 1
        name, number = lora_request.lora_name, lora_request.lora_int_id
        with files.folder() as folder:
            return self._load_merged(LoRARequest(name, number, folder))

    def _report_loss(self, path: str, error: Exception) -> None:
        self.counts["lost"] += 1
        self._lost[path] = _describe(error, path)
        if self.address is not None:
            send_notice(self.address, AdapterLost(path, self._lost[path]))

    def activate(self, requests: Iterable[Any], mapping: Any) -> None:
        """Bring a step's adapters into slots; replaces `WorkerLoRAManager.set_active_adapters`.

        vLLM gives it a set in which requests are equal by name: while an earlier version of a name
        has requests, one of the two is missing, and the step would end the engine.
        """
        present = {each.lora_int_id: each for each in requests}
        for number in present.keys() - self._requests.keys():
            self._remember(present[number])
        numbers = set() if mapping is None else set(mapping.index_mapping)
        missing = self._requests.keys() & (numbers - present.keys())
        self._activate([*present.values(), *map(self._requests.__getitem__, missing)], mapping)

    def _remember(self, lora_request: Any) -> None:
        remember(self._requests, lora_request.lora_int_id, lora_request, MAX_REQUESTS)

    def report(self) -> dict[str, Any]:
        """Return the numbers of adapters in slots and in vLLM's cache, and our bytes by path."""
        for path in tuple(self._building):
            self.progress(path)
        adapters = self._lora._adapter_manager  # noqa: SLF001
        return {
            "device": [number for number in adapters.lora_index_to_id if number is not None],
            "cached": list(adapters.list_adapters()),
            "built": {path: nbytes for path, (_, nbytes) in self._models.items()},
            "lost": dict(self._lost),
            "counts": dict(self.counts),
        }


class OpenFiles:
    """An adapter's files, open, so that they can be read after they were replaced or removed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptors: dict[str, int] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        try:
            for name in FILES:
                file = os.open(os.path.join(path, name), os.O_RDONLY | os.O_CLOEXEC)
                self._descriptors[name] = file
                self._versions[name] = _version_of(os.fstat(file))
        except BaseException:
            self.close()
            raise

    def are_in_place(self) -> bool:
        """Return whether the folder still has these files, unchanged."""
        try:
            return all(
                _version_of(os.stat(os.path.join(self._path, name))) == version
                for name, version in self._versions.items()
            )
        except OSError:
            return False

    @contextmanager
    def folder(self) -> Iterator[str]:
        """Yield a folder with links to the open files.

        Raise OSError if their bytes have changed, also while they were used.
        """
        self._check()
        with tempfile.TemporaryDirectory(prefix="lorax-async-") as folder:
            for name, file in self._descriptors.items():
                Path(folder, name).symlink_to(f"/proc/self/fd/{file}")
            yield folder
        self._check()

    def are_unchanged(self) -> bool:
        """Return whether the open files have the bytes that they had when they were opened."""
        return all(
            _version_of(os.fstat(file)) == self._versions[name]
            for name, file in self._descriptors.items()
        )

    def _check(self) -> None:
        if not self.are_unchanged():
            raise OSError("its files were overwritten; load it again")

    def close(self) -> None:
        for file in self._descriptors.values():
            with suppress(OSError):
                os.close(file)
        self._descriptors.clear()


def _version_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file's bytes do. Unlike ctime, it stays when a link to it goes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _describe(error: BaseException, path: str) -> str:
    """Return an error's text without the server's path, for a client."""
    return shorten((str(error) or repr(error)).replace(path, "its folder"), 500)


def _error_of(build: Future[Any], path: str) -> str | None:
    """Return the text of the error with which a build ended, or None."""
    error = build.exception()
    return None if error is None else _describe(error, path)


def _close_files(build: Future[Any]) -> None:
    if not build.cancelled() and build.exception() is None:
        build.result()[0].close()


def _require_applied(model: Any, adapters: Any) -> None:
    """Raise ValueError for weights that vLLM would ignore: the result would not be the adapter."""
    if getattr(adapters, "is_pooling_model", False):
        return  # its modules have other names
    from vllm.distributed import get_pp_group  # noqa: PLC0415

    if get_pp_group().world_size > 1:
        return  # other layers are in other workers
    ignored = sorted(name for name in model.loras if name not in adapters.modules)
    if ignored:
        raise ValueError(
            f"vLLM would ignore the weights of {len(ignored)} modules, such as {ignored[0]!r};"
            " see --lora-target-modules"
        )


def _detach(model: Any) -> int:
    """Copy tensors out of the mapped file, unless they are pinned; return the bytes of all.

    A mapped one would be read in the engine's loop, and end the process if its file is truncated.
    """
    nbytes = 0
    for weights in model.loras.values():
        for name in ("lora_a", "lora_b"):
            value = getattr(weights, name)
            tensors = value if isinstance(value, list) else [value]
            for place, tensor in enumerate(tensors):
                if tensor is None:
                    continue
                nbytes += tensor.nbytes
                if not tensor.is_pinned():
                    tensors[place] = tensor.clone()
            if not isinstance(value, list):
                setattr(weights, name, tensors[0])
    return nbytes
