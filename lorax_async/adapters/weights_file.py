"""An adapter's files for LoRAX's calls: in a local folder, or in the standard hub cache. Blocks.

The embedding program itself chooses these ids, so paths are trusted and followed anywhere. Files in
the hub cache are used without a request; huggingface_hub fetches the others into it, as for LoRAX.
All files of an adapter are of one commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from safetensors import safe_open

from lorax_async.concurrency import in_thread
from lorax_async.config import Limits
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer, is_finite
from lorax_async.errors import (
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
    code_of,
    locate,
    open_same,
    read_prefix,
    require_file,
    to_adapter_error,
)
from lorax_async.formats.peft_names import (
    INDEX_FILE,
    WEIGHT_DTYPES,
    matrix_error,
    parse_tensor_name,
    split_weights_error,
)
from lorax_async.formats.safetensors import TensorSpan, parse_header
from lorax_async.formats.tensor_kinds import FEATURES, TensorRole
from lorax_async.ids import HubRepository, LocalFolder, parse_ref
from lorax_async.planning.transfer_plan import BaseCopy
from lorax_async.remote.base import require_token
from lorax_async.remote.hub import FileQuery, machine_token, problem_of
from lorax_async.sources.local import CONFIG, WEIGHTS, find_trusted_adapter, open_weights
from lorax_async.types import AdapterRef

LIMITS = Limits()
_TIMEOUT = 10.0  # seconds, to connect and for each read


def require_finite(folder: Path) -> None:
    """Raise `AdapterFormatError` if a weight is NaN or infinite. Reads the whole file; blocks.

    The file's header has been checked.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            if not is_finite(weights.get_tensor(name)):
                raise AdapterFormatError(
                    f"tensor {shorten(name, 200)!r} has NaN or infinite values; train the adapter"
                    " again, or save it from a checkpoint without them"
                )


def require_base_copies(
    folder: Path, copies: Sequence[BaseCopy], base: BaseCopies, limits: Limits = LIMITS
) -> None:
    """Raise as `BaseCopies.require_equal` unless the file's copies are the base's. Blocks."""
    if not copies:
        return
    weights = open_weights(find_trusted_adapter(folder, limits), limits)
    try:
        for copy in copies:
            base.require_equal(copy, weights.reader)
    finally:
        weights.close()


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
    `org/name[@revision]` is on the hub. A `token` of None is this machine's own, if any.
    """
    local = isinstance(adapter_id, str) and adapter_id.startswith(("/", "./", "../"))
    ref = parse_ref(AdapterRef(Path(adapter_id) if local else adapter_id))
    match ref.location:
        case LocalFolder(path, trusted=True):
            return path
        case HubRepository(text=repo):
            return _hub_folder(repo, ref.revision, token, weights=weights)
    raise ConfigError(
        "these calls read local folders and the hub; an AdapterLoader loads adapters from elsewhere"
    )


def _hub_folder(repo: str, revision: str | None, token: str | None, *, weights: bool) -> str:
    require_token(token)
    wanted_revision = revision or "main"

    def find(name: str, max_bytes: int) -> str | None:
        cached = cached_file(repo, name, revision)
        return cached or _fetch(repo, name, revision, token, max_bytes)

    def get(name: str, max_bytes: int) -> str:
        path = find(name, max_bytes)
        if path is not None:
            return path
        if name == WEIGHTS and find(INDEX_FILE, LIMITS.max_header_bytes) is not None:
            raise split_weights_error(f"{repo!r} at {wanted_revision!r} on the hub")
        raise AdapterNotFoundError(
            f"{repo!r} on the hub has no {name} at {wanted_revision!r}; check"
            f" the id (a folder is a pathlib.Path, or './{repo}')"
        )

    # A snapshot folder is named by its commit. Fetch from the commit that the cache has a file of,
    # for the branch may have moved, and all further files from the config's.
    cached = (cached_file(repo, name, revision) for name in (CONFIG, WEIGHTS))
    if path := next(filter(None, cached), None):
        revision = os.path.basename(os.path.dirname(path))
    folder = os.path.dirname(get(CONFIG, LIMITS.max_config_bytes))
    revision = os.path.basename(folder)
    if weights:
        get(WEIGHTS, LIMITS.max_adapter_bytes)
    return folder


def cached_file(repo: str, name: str, revision: str | None = None) -> str | None:
    """Return where the hub cache has a file, if it has it. Make no network request."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)

    try:
        path = try_to_load_from_cache(repo, name, revision=revision)
    except OSError as error:
        raise to_adapter_error(error, "the hub cache") from error
    except ValueError as error:  # an id that the hub cannot have was refused before
        raise FetchError(
            "the hub cache is damaged: its file for this revision is not text; remove the"
            " repository from it, and load the adapter again"
        ) from error
    return path if isinstance(path, str) else None


def _fetch(
    repo: str, name: str, revision: str | None, token: str | None, max_bytes: int
) -> str | None:
    """Fetch a file into the hub cache; return None if the hub has no such file."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub import errors, hf_hub_download  # noqa: PLC0415
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # noqa: PLC0415

    token = token or machine_token()
    download: Any = partial(
        hf_hub_download, repo, name, revision=revision, token=token or False, etag_timeout=_TIMEOUT
    )
    try:
        nbytes = download(dry_run=True).file_size or 0
        if nbytes <= max_bytes:
            return str(download(tqdm_class=partial(tqdm, disable=True)))
    except errors.RemoteEntryNotFoundError:
        return None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RuntimeError, OSError) as error:
        query = FileQuery(repo, name, revision or "main", token)
        url, reason = query.url(None), cast(Exception, error)
        if isinstance(error, errors.LocalEntryNotFoundError):  # the hub could not be reached
            reason = cast(Exception, error.__cause__ or error)
        elif isinstance(error, OSError) and not isinstance(error, httpx2.HTTPError):
            if error.errno is None:
                raise FetchError(f"{url} sent fewer or more bytes than announced") from None
            raise FetchError(
                f"{name} cannot be stored in the hub cache ({code_of(error)}); check its folder"
                " (HF_HUB_CACHE) and its disk",
                retryable=False,
            ) from None
        raise problem_of(reason, query, url).located(stage="resolve") from None
    raise AdapterFormatError(f"{name} has {nbytes:,} bytes, over the {max_bytes:,} allowed")


def _reader_of(path: str, max_bytes: int) -> FileReader:
    """Return a reader of a regular file of 1 to `max_bytes` bytes, which its first read opens."""
    name = os.path.basename(path)
    try:
        with locate(path) as file:
            require_file(name, file, max_bytes)
            identity = file.identity
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError(f"there is no {name} in this folder") from error
    except OSError as error:
        raise to_adapter_error(error, name) from error
    return FileReader(partial(open_same, path, identity), identity, name)


def read_small(path: str, max_bytes: int) -> bytes:
    reader = _reader_of(path, max_bytes)
    try:
        content = bytearray(reader.nbytes)
        reader.read_into([memoryview(content)], 0)
    finally:
        reader.close()
    return bytes(content)


EMBEDDING = "LoRA on an embedding"


def inexpressible(what: str, feature: str) -> UnsupportedAdapterError:
    """Make the error for a feature that LoRAX's form (A, B and a scale) cannot express."""
    return UnsupportedAdapterError(
        f"{what} belongs to {feature}, for which LoRAX's form has no place; use AdapterLoader, or"
        " train without it"
    )


def plain_module(tensor: str) -> str:
    """Return the module of a plain LoRA tensor, by its name; raise for any other tensor."""
    found = parse_tensor_name(tensor)
    if found.embedding or found.part not in {TensorRole.A, TensorRole.B}:
        feature = EMBEDDING if found.embedding else FEATURES[found.part]
        raise inexpressible(f"tensor {shorten(tensor, 200)!r}", feature)
    return found.module


class WeightsFile:
    """An adapter's open weights; tensors are read when needed.

    Pass it to `LoraConfig.map_weights_for_model` in place of a dictionary of tensors. In a module
    map, (file, key) stands for a tensor. Close it, or use it as a context manager.
    """

    def __init__(
        self, reader: Reader, prefix: bytes | None = None, limits: Limits = LIMITS
    ) -> None:
        self._reader = reader
        try:
            prefix = prefix or read_prefix(reader, limits)
            tensors = parse_header(prefix, reader.nbytes, limits).tensors
            if not tensors:
                raise AdapterFormatError("the file holds no tensors; save the adapter again")
            self._spans = {span.name: _require_plain(span) for span in tensors}
        except BaseException:
            reader.close()
            raise

    @classmethod
    def open(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Open the weights of an adapter, from the same places as `LoraConfig.load`. Blocks.

        Raise as it does: `AdapterFormatError` and `UnsupportedAdapterError` for a malformed file,
        and for tensors that are not those of plain LoRA.
        """
        with naming_adapter(adapter_id):
            folder = adapter_folder(adapter_id, api_token, weights=True)
            key = find_trusted_adapter(folder, LIMITS)
            weights = open_weights(key, LIMITS)
            return cls(weights.reader, weights.prefix)

    @classmethod
    async def open_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Call `open` in a thread."""
        return await in_thread(lambda _: cls.open(adapter_id, api_token), cls.close)

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """Open one file of weights by its own path, whatever its name. Blocks; as `open`."""
        with naming_adapter(path):
            return cls(_reader_of(os.fspath(path), LIMITS.max_adapter_bytes))

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
        fits = tuple(target.shape) == self.shape(key) and target.dtype == self.dtype(key)
        if not (fits and target.is_contiguous() and target.device.type == "cpu"):
            raise UsageError(f"{shorten(key, 200)!r} does not fit into this tensor")
        flat = target.view(-1).view(torch.uint8)
        self._reader.read_into([StagingBuffer.of(flat).memory], self._span(key).start)

    def read(self, key: str) -> torch.Tensor:
        """Return the tensor in memory of its own. Blocks; raise as `read_into`."""
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into(key, tensor)
        return tensor

    def _span(self, key: str) -> TensorSpan:
        try:
            return self._spans[key]
        except KeyError:
            raise UsageError(f"the file has no tensor {shorten(key, 200)!r}") from None

    def close(self) -> None:
        """Close the file. Quick and idempotent."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _require_plain(span: TensorSpan) -> TensorSpan:
    plain_module(span.name)
    if len(span.shape) == 2 and 0 not in span.shape and span.dtype in WEIGHT_DTYPES:
        return span
    name = shorten(span.name, 200)
    if span.dtype in WEIGHT_DTYPES:
        raise matrix_error(span.name, span.shape)
    raise UnsupportedAdapterError(
        f"tensor {name!r} is {span.dtype}; save the adapter as {', '.join(WEIGHT_DTYPES)}"
    )


ModuleMap = Mapping[str, Mapping[str, tuple[torch.Tensor | WeightsFile | str | Path, str]]]
"""Module name → "lora_A" and "lora_B" → (tensor, open file or a file's path; name in the file)."""


class FileTensor(NamedTuple):
    """A tensor in an open file, not yet read."""

    file: WeightsFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.key)

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.key)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


Factor = torch.Tensor | FileTensor


def read(factor: Factor) -> torch.Tensor:
    """Return A or B in memory; of a file, blocks, and raises as `WeightsFile.read`."""
    return factor.file.read(factor.key) if isinstance(factor, FileTensor) else factor.detach()


@contextmanager
def open_factors(module_map: ModuleMap) -> Iterator[Mapping[str, Mapping[str, Factor]]]:
    """Open every file that is named by its path, once each. Blocks, as `WeightsFile.at`."""
    files: dict[str | Path, WeightsFile] = {}
    with ExitStack() as stack:

        def factor(content: torch.Tensor | WeightsFile | str | Path, key: str) -> Factor:
            if isinstance(content, str | Path):
                if content not in files:
                    files[content] = stack.enter_context(WeightsFile.at(content))
                content = files[content]
            return FileTensor(content, key) if isinstance(content, WeightsFile) else content

        yield {
            name: {part: factor(*entry) for part, entry in factors.items()}
            for name, factors in module_map.items()
        }
