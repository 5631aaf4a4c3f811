"""The weights of one adapter, opened once and read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from lorax_async.adapter import FileIdentity
from lorax_async.adapters.loading.places import LIMITS, folder_with_weights, named
from lorax_async.adapters.loading.threads import in_thread
from lorax_async.adapters.loading.unapplied import require_plain_name
from lorax_async.config import Limits
from lorax_async.core.header import Header, TensorSpan, parse_header
from lorax_async.core.peft_names import WEIGHT_DTYPES
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.io.ports import Reader
from lorax_async.io.sources.checked_open import (
    FileReader,
    located,
    open_same,
    require_file,
    translated,
)
from lorax_async.io.sources.local_folder import find_adapter
from lorax_async.io.sources.local_ids import Place
from lorax_async.io.sources.local_weights import open_weights, read_prefix
from lorax_async.io.staging import TORCH_DTYPES, Buffer


class WeightsFile:
    """An adapter's weights whose header was checked; its tensors are read when needed.

    They are `adapter_model.safetensors`, or the files that an index beside them names.

    It stands for the dictionary of tensors in `LoraConfig.map_weights_for_model`, and in a module
    map for each tensor: (file, key). Close it, or leave it as a context manager, when the last
    layer type was loaded.
    """

    def __init__(self, reader: Reader, header: Header) -> None:
        self._reader = reader
        self._spans = {span.name: span for span in header.tensors}

    @classmethod
    def open(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """Open the weights of an adapter, from the same places as `LoraConfig.load`. Blocks.

        What the standard hub cache lacks of the adapter is fetched into it, and nothing else.

        Raises
        ------
        AdapterNotFoundError
            There is no such adapter, or none that the token may see.
        AdapterFormatError, UnsupportedAdapterError
            The file is malformed, or holds tensors that are not those of plain LoRA.
        AccessDeniedError, FetchError
            It cannot be fetched or read.
        """
        with named(adapter_id):
            folder = folder_with_weights(adapter_id, api_token)
            key = find_adapter(Place((folder,), trusted=True), (), LIMITS)
            weights = open_weights(key, LIMITS)
            return cls._of(weights.prefix, weights.reader)

    @classmethod
    async def open_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """As `open`, in a thread."""
        return await in_thread(lambda _: cls.open(adapter_id, api_token), cls.close)

    @classmethod
    def at(cls, path: str | Path) -> Self:
        """Open one file of weights by its own path, whatever it is called. Blocks.

        Raises `AdapterNotFoundError` if there is none; else as `open`.
        """
        with named(path):
            return cls._of(*_opened(os.fspath(path)))

    @classmethod
    async def at_async(cls, path: str | Path) -> Self:
        """As `at`, in a thread."""
        return await in_thread(lambda _: cls.at(path), cls.close)

    @classmethod
    def _of(cls, prefix: bytes, reader: Reader) -> Self:
        try:
            return cls(reader, _checked_header(prefix, reader.nbytes, LIMITS))
        except BaseException:
            reader.close()
            raise

    def __contains__(self, key: object) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor of this name. Touches no file."""
        return self._span(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """In which the tensor is stored. Touches no file."""
        return TORCH_DTYPES[self._span(key).dtype]

    def read_into(self, key: str, target: torch.Tensor) -> None:
        """Fill `target`, a contiguous tensor of host memory with the tensor's shape and dtype.

        Blocks. Raises `IntegrityError` if the file changed since it was opened, `FetchError` if it
        cannot be read or was closed, `UsageError` for another target.
        """
        span = self._span(key)
        fits = (tuple(target.shape), target.dtype) == (span.shape, TORCH_DTYPES[span.dtype])
        if not (fits and target.is_contiguous() and target.device.type == "cpu"):
            raise UsageError(f"{shorten(key, 200)!r} does not fit into this tensor")
        flat = target.view(-1).view(torch.uint8)
        self._reader.read_into([Buffer.of(flat).memory], span.start)

    def read(self, key: str) -> torch.Tensor:
        """The tensor, in memory of its own. Blocks; raises as `read_into` does."""
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into(key, tensor)
        return tensor

    def close(self) -> None:
        """Quick and idempotent."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _span(self, key: str) -> TensorSpan:
        try:
            return self._spans[key]
        except KeyError:
            raise UsageError(f"the file has no tensor {shorten(key, 200)!r}") from None


def _opened(path: str) -> tuple[bytes, FileReader]:
    """The file's beginning with its header, and its reader."""
    identity = _identity(path)
    reader = FileReader(partial(open_same, path, identity), identity, os.path.basename(path))
    try:
        return read_prefix(reader, LIMITS), reader
    except BaseException:
        reader.close()
        raise


def _identity(path: str) -> FileIdentity:
    name = os.path.basename(path)
    try:
        with located(path) as file:
            require_file(name, file, LIMITS.max_adapter_bytes)
            return file.identity
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError(f"there is no file {name!r} at this path") from error
    except OSError as error:
        raise translated(error, name) from error


def _checked_header(prefix: bytes, nbytes: int, limits: Limits) -> Header:
    """What a loader checks before it knows the base: the format, and every name and dtype."""
    header = parse_header(prefix, nbytes, limits)
    if not header.tensors:
        raise AdapterFormatError("the file holds no tensors; save the adapter again")
    for span in header.tensors:
        _check_span(span)
    return header


def _check_span(span: TensorSpan) -> None:
    require_plain_name(span.name)
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
