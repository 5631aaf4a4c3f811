"""The weights of one adapter, opened once and read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from lorax_async.adapters.places import LIMITS, folder_of, named
from lorax_async.adapters.threads import in_thread
from lorax_async.adapters.unapplied import require_plain_name
from lorax_async.config import Limits
from lorax_async.core.header import Header, HeaderLimits, TensorSpan, header_size, parse_header
from lorax_async.core.peft_names import WEIGHT_DTYPES
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError, UsageError, shorten
from lorax_async.io.sources.checked_open import FileReader, open_same
from lorax_async.io.sources.local_folder import WEIGHTS, find_adapter
from lorax_async.io.sources.local_ids import Place
from lorax_async.io.staging import TORCH_DTYPES, Buffer

_PREFIX_BYTES = 128 << 10


class WeightsFile:
    """An `adapter_model.safetensors` whose header was checked; its tensors are read when needed.

    It stands for the dictionary of tensors in `LoraConfig.map_weights_for_model`, and in a module
    map for each tensor: (file, key). Close it, or leave it as a context manager, when the last
    layer type was loaded.
    """

    def __init__(self, reader: FileReader, header: Header) -> None:
        self._reader = reader
        self._spans = {span.name: span for span in header.tensors}

    @classmethod
    def open(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:  # noqa: ARG003
        """Open the weights of an adapter, from the same places as `LoraConfig.load`. Blocks.

        Raises
        ------
        AdapterNotFoundError
            There is no such adapter, or it is not in the hub cache.
        AdapterFormatError, UnsupportedAdapterError
            The file is malformed, or holds tensors that are not those of plain LoRA.
        AccessDeniedError, FetchError
            It cannot be read.
        """
        with named(adapter_id):
            folder = folder_of(adapter_id, WEIGHTS)
            key = find_adapter(Place((folder,), trusted=True), (), LIMITS)
            weights = key.files[1]
            opener = partial(open_same, os.path.join(key.location, WEIGHTS), weights)
            reader = FileReader(opener, weights, WEIGHTS)
            try:
                return cls(reader, _checked_header(reader, LIMITS))
            except BaseException:
                reader.close()
                raise

    @classmethod
    async def open_async(cls, adapter_id: str | Path, api_token: str | None = None) -> Self:
        """As `open`, in a thread."""
        return await in_thread(lambda _: cls.open(adapter_id, api_token), cls.close)

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
            raise UsageError(f"{WEIGHTS} has no tensor {shorten(key, 200)!r}") from None


def _checked_header(reader: FileReader, limits: Limits) -> Header:
    """What a loader checks before it knows the base: the format, and every name and dtype."""
    accepted = HeaderLimits(
        max_header_bytes=limits.max_header_bytes,
        max_tensors=limits.max_tensors,
        max_name_bytes=limits.max_name_bytes,
        max_dimensions=limits.max_dimensions,
        max_depth=limits.max_json_depth,
    )
    prefix = _read_prefix(reader, 0, min(_PREFIX_BYTES, reader.nbytes))
    needed = header_size(memoryview(prefix), reader.nbytes, accepted)
    if needed > len(prefix):
        prefix += _read_prefix(reader, len(prefix), needed)
    header = parse_header(memoryview(prefix)[:needed], reader.nbytes, accepted)
    if not header.tensors:
        raise AdapterFormatError("the file holds no tensors; save the adapter again")
    for span in header.tensors:
        _check_span(span)
    return header


def _read_prefix(reader: FileReader, start: int, stop: int) -> bytearray:
    piece = bytearray(stop - start)
    reader.read_into([memoryview(piece)], start)
    return piece


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
