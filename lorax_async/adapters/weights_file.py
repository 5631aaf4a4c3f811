"""An adapter's files for LoRAX's calls: in a local folder, or in the standard hub cache. Blocks.

The embedding program itself chooses these ids, so paths are trusted and followed anywhere. Files in
the hub cache are used without a request; huggingface_hub fetches the others into it, as for LoRAX.
All files of an adapter are of one commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from lorax_async.concurrency import in_thread
from lorax_async.config import Limits
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.files import (
    FileReader,
    Reader,
    changed_error,
    code_of,
    locate,
    open_same,
    read_prefix,
    require_file,
    to_adapter_error,
)
from lorax_async.formats.peft_names import WEIGHT_DTYPES, TensorRole, parse_tensor_name
from lorax_async.formats.safetensors import TensorSpan, parse_header
from lorax_async.formats.split_weights import INDEX, parse_index
from lorax_async.ids import HubRepository, LocalFolder, parse_ref
from lorax_async.remote import hub
from lorax_async.sources.local import CONFIG, WEIGHTS, find_adapter, open_weights
from lorax_async.types import AdapterRef

LIMITS = Limits()
_MAIN = "main"
_TIMEOUT = 10.0  # seconds, to connect and for each read


@contextmanager
def naming_adapter(adapter_id: object) -> Iterator[None]:
    """Name the adapter in errors of the block."""
    try:
        yield
    except LoraxError as error:
        raise error.located(id=shorten(str(adapter_id), 200)) from error.__cause__


def adapter_folder(adapter_id: str | Path, token: str | None, *, weights: bool) -> str:
    """Return the folder with the adapter's config, and its weights if `weights`.

    A `pathlib.Path`, or a str that begins with "/", "./" or "../", is a local folder;
    `org/name[@revision]` is on the hub. Raise `InvalidAdapterIdError`, `ConfigError` for another
    source, and what `HubFiles` raises.
    """
    local = isinstance(adapter_id, str) and adapter_id.startswith(("/", "./", "../"))
    ref = parse_ref(AdapterRef(Path(adapter_id) if local else adapter_id))
    match ref.place:
        case HubRepository(text=repo):
            return HubFiles(repo, ref.revision, token).folder(weights=weights)
        case LocalFolder(path, trusted=True):
            return path
    raise ConfigError(
        "these calls read local folders and the hub; an AdapterLoader loads adapters from elsewhere"
    )


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of one adapter on the hub; a `token` of None is this machine's own, if any.

    Raise `UsageError` for an impossible token, `AdapterFormatError` for files over the limits, else
    `AdapterNotFoundError`, `AccessDeniedError` or `FetchError`, as the hub and its cache answer.
    """

    repo: str
    revision: str | None
    token: str | None = field(repr=False)

    def __post_init__(self) -> None:
        hub.require_token(self.token)

    def folder(self, *, weights: bool) -> str:
        """Return the cache's folder with the config, and the weights if asked for."""
        if weights and self.cached(WEIGHTS) is None:
            room, header = LIMITS.max_adapter_bytes, LIMITS.max_header_bytes
            if self.cached(INDEX) is not None or self._fetch(WEIGHTS, room) is None:
                folder = os.path.dirname(self._require(INDEX, header, WEIGHTS))
                for name in parse_index(read_small(folder, INDEX, header), LIMITS).file_names:
                    room = max(0, room - os.path.getsize(self._require(name, room, name)))
        return os.path.dirname(self._require(CONFIG, LIMITS.max_config_bytes, CONFIG))

    def cached(self, name: str) -> str | None:
        """Return where the hub cache has a file, if it has it. Make no network request."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)

        try:
            path = try_to_load_from_cache(self.repo, name, revision=self.revision)
        except OSError as error:
            raise to_adapter_error(error, "the hub cache") from error
        except ValueError as error:  # an id that the hub cannot have was refused before
            raise FetchError(
                "the hub cache is damaged: its file for this revision is no text; remove the"
                " repository from it, and load the adapter again"
            ) from error
        return path if isinstance(path, str) else None

    def _require(self, name: str, max_bytes: int, wanted: str) -> str:
        path = self.cached(name) or self._fetch(name, max_bytes)
        if path is None:
            raise AdapterNotFoundError(
                f"{self.repo!r} on the hub has no {wanted} at {self.revision or _MAIN!r}; check the"
                f" id (a folder is a pathlib.Path, or './{self.repo}')"
            )
        return path

    def _fetch(self, name: str, max_bytes: int) -> str | None:
        """Fetch a file into the cache; return None if the hub has no such file."""
        import httpx2  # noqa: PLC0415 (slow)
        from huggingface_hub import errors, hf_hub_download  # noqa: PLC0415
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # noqa: PLC0415

        cached = [path for each in (CONFIG, WEIGHTS, INDEX) if (path := self.cached(each))]
        # The snapshot folder is named by its commit: the branch may have moved.
        revision = os.path.basename(os.path.dirname(cached[0])) if cached else self.revision
        token = self.token or hub.machine_token()
        query = hub.FileQuery(self.repo, name, revision or _MAIN, token)
        download: Any = partial(
            hf_hub_download,
            *(self.repo, name),
            revision=revision,
            token=query.token or False,
            etag_timeout=_TIMEOUT,
            tqdm_class=partial(tqdm, disable=True),
        )
        try:
            nbytes = download(dry_run=True).file_size or 0
            if nbytes <= max_bytes:
                return str(download())
        except errors.RemoteEntryNotFoundError:
            return None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RuntimeError, OSError) as error:
            raise _problem(error, query) from None
        raise AdapterFormatError(f"{name} has {nbytes:,} bytes, over the {max_bytes:,} allowed")


def _problem(error: Exception, query: hub.FileQuery) -> AdapterError:
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    url = query.url(None)
    if isinstance(error, LocalEntryNotFoundError):  # the hub could not be reached
        return hub.problem_of(
            error.__cause__ if isinstance(error.__cause__, Exception) else error, query, url
        )
    if isinstance(error, httpx2.HTTPError) or not isinstance(error, OSError):
        return hub.problem_of(error, query, url)
    if error.errno is None:
        return FetchError(f"{url} sent fewer or more bytes than announced")
    return FetchError(
        f"{query.name} cannot be stored in the hub cache ({code_of(error)}); check its folder"
        " (HF_HUB_CACHE) and its disk",
        retryable=False,
    )


def read_small(folder: str, name: str, max_bytes: int) -> bytes:
    """Return all bytes of a small file.

    Raise `AdapterNotFoundError`, `AdapterFormatError` if it is not a regular file of 1 to
    `max_bytes` bytes, `AccessDeniedError` or `FetchError` if it cannot be read.
    """
    try:
        with locate(os.path.join(folder, name)) as file:
            require_file(name, file, max_bytes)
            size = file.status.st_size
            with open(file.open(), "rb") as content:
                text = content.read(size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError(f"there is no {name} in this folder") from error
    except OSError as error:
        raise to_adapter_error(error, name) from error
    if len(text) != size:
        raise changed_error(name)
    return text


def plain_module(name: str) -> str:
    """Return the module of a plain LoRA tensor, by the tensor's name.

    Raise `UnsupportedAdapterError` for a tensor of another feature, `AdapterFormatError` for a
    malformed name.
    """
    found = parse_tensor_name(name)
    if found.embedding or found.part not in {TensorRole.A, TensorRole.B}:
        feature = {TensorRole.BIAS: "lora_bias", TensorRole.MAGNITUDE: "DoRA"}.get(
            found.part, EMBEDDING
        )
        raise inexpressible(f"tensor {shorten(name, 200)!r}", feature)
    return found.module


EMBEDDING = "LoRA on an embedding"


def inexpressible(what: str, feature: str) -> UnsupportedAdapterError:
    """Make the error for a feature that LoRAX's form (A, B and a scale) cannot express."""
    return UnsupportedAdapterError(
        f"{what} belongs to {feature}, for which LoRAX's form has no place; use AdapterLoader, or"
        " train without it"
    )


class WeightsFile:
    """An adapter's open weights, in one file or in several; tensors are read when needed.

    Pass it to `LoraConfig.map_weights_for_model` in place of a dictionary of tensors. In a module
    map, (file, key) stands for a tensor. Close it, or use it as a context manager.
    """

    def __init__(self, prefix: bytes, reader: Reader) -> None:
        self._reader = reader
        try:
            header = parse_header(prefix, reader.nbytes, LIMITS)
            if not header.tensors:
                raise AdapterFormatError("the file holds no tensors; save the adapter again")
            for span in header.tensors:
                _check(span)
        except BaseException:
            reader.close()
            raise
        self._spans = {span.name: span for span in header.tensors}

    @classmethod
    def open(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Open the weights of an adapter, from the same places as `LoraConfig.load`. Blocks.

        Raise as it does: `AdapterFormatError` and `UnsupportedAdapterError` for a malformed file,
        and for tensors that are not those of plain LoRA.
        """
        with naming_adapter(adapter_id):
            folder = adapter_folder(adapter_id, api_token, weights=True)
            key = find_adapter(LocalFolder(folder, trusted=True), (), LIMITS)
            weights = open_weights(key, LIMITS)
            return cls(weights.prefix, weights.reader)

    @classmethod
    async def open_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Call `open` in a thread."""
        return await in_thread(lambda _: cls.open(adapter_id, api_token), cls.close)

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """Open one file of weights by its own path, whatever its name. Blocks; as `open`."""
        name = os.path.basename(path)
        with naming_adapter(path):
            try:
                with locate(os.fspath(path)) as file:
                    require_file(name, file, LIMITS.max_adapter_bytes)
                    identity = file.identity
            except (FileNotFoundError, NotADirectoryError) as error:
                raise AdapterNotFoundError(f"there is no file {name!r} at this path") from error
            except OSError as error:
                raise to_adapter_error(error, name) from error
            reader = FileReader(partial(open_same, os.fspath(path), identity), identity, name)
            try:
                prefix = read_prefix(reader, LIMITS)
            except BaseException:
                reader.close()
                raise
            return cls(prefix, reader)

    @classmethod
    async def at_async(cls, path: str | Path) -> Self:
        """Call `at` in a thread."""
        return await in_thread(lambda _: cls.at(path), cls.close)

    def __contains__(self, key: object) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading."""
        return self._span(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's stored dtype, without reading."""
        return TORCH_DTYPES[self._span(key).dtype]

    def read_into(self, key: str, target: torch.Tensor) -> None:
        """Fill `target`, contiguous host memory of the tensor's shape and dtype. Blocks.

        Raise `IntegrityError` if the file changed since it was opened, `FetchError` if it cannot be
        read or was closed, `UsageError` for another target.
        """
        span = self._span(key)
        fits = (tuple(target.shape), target.dtype) == (span.shape, TORCH_DTYPES[span.dtype])
        if not (fits and target.is_contiguous() and target.device.type == "cpu"):
            raise UsageError(f"{shorten(key, 200)!r} does not fit into this tensor")
        flat = target.view(-1).view(torch.uint8)
        self._reader.read_into([StagingBuffer.of(flat).memory], span.start)

    def read(self, key: str) -> torch.Tensor:
        """Return the tensor in memory of its own. Blocks; raise as `read_into`."""
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into(key, tensor)
        return tensor

    def close(self) -> None:
        """Close the files. Quick and idempotent."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _span(self, key: str) -> TensorSpan:
        try:
            return self._spans[key]
        except KeyError:
            raise UsageError(f"the file has no tensor {shorten(key, 200)!r}") from None


def _check(span: TensorSpan) -> None:
    plain_module(span.name)
    if len(span.shape) != 2 or 0 in span.shape:
        raise AdapterFormatError(
            f"tensor {shorten(span.name, 200)!r} has shape {list(span.shape)}, not two positive"
            " dimensions; save the adapter again"
        )
    if span.dtype not in WEIGHT_DTYPES:
        raise UnsupportedAdapterError(
            f"tensor {shorten(span.name, 200)!r} is {span.dtype}; save the adapter as"
            f" {', '.join(WEIGHT_DTYPES)}"
        )
