"""Tensors that somebody has in memory, copied as they are now into a safetensors file in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lorax_async.adapter import TensorsKey
from lorax_async.config import Limits
from lorax_async.core.header_writing import Described, write_header
from lorax_async.core.transfer_plan import check_size
from lorax_async.errors import (
    CapacityError,
    FetchError,
    IntegrityError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.io.devices.streams import DeviceEvent, new_event, stream_on
from lorax_async.io.staging import TORCH_DTYPES, Buffer

STEP_BYTES = 4 << 20
"""Copied and hashed in one go: some milliseconds."""

STEP_TENSORS = 256

_SPELLED = {dtype: word for word, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class TensorsFile:
    """A safetensors file in memory, uint8 `[nbytes]`, with its config; `prefix` is its header."""

    key: TensorsKey
    config: bytes
    prefix: bytes
    content: torch.Tensor


class Snapshot:
    """Copies tensors, in steps of some milliseconds, for other threads to take, one at a time.

    It is made where the tensors are known to be as they shall be; what has been put on this
    thread's current streams by then is waited for. First `measure`, then `step` until it is
    through, then `file`.

    Raises `UsageError` for what are no tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: bytes, limits: Limits) -> None:
        given: object = tensors
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise UsageError(f"tensors are a dict of torch tensors by name, not {kind}")
        self._tensors = dict(tensors)
        if len(self._tensors) > limits.max_tensors:
            raise UnsupportedAdapterError(
                f"{len(self._tensors):,} tensors are over the limit of {limits.max_tensors:,};"
                " raise Limits.max_tensors to accept them"
            )
        self._limits = limits
        self._config = config
        self._versions = _versions(self._tensors)
        self._written = _written(self._tensors)
        self._described: list[Described] = []
        self._places: list[tuple[int, int]] = []
        self._prefix = b""
        self._content: torch.Tensor | None = None
        self._digest = hashlib.sha256()
        self._steps = self._copy()

    def measure(self) -> int:
        """Check what can be told without the bytes; how many they make. Blocks.

        Raises `UnsupportedAdapterError`, also for more bytes than the limits accept.
        """
        described = [_described(name, tensor) for name, tensor in self._tensors.items()]
        # As safetensors has them: the wider dtypes first, so that each lies on a multiple of its
        # own size.
        self._described = sorted(
            described, key=lambda each: (-TORCH_DTYPES[each.dtype].itemsize, each.name)
        )
        self._prefix, self._places = write_header(self._described)
        nbytes = self._places[-1][1] if self._places else len(self._prefix)
        check_size(nbytes, "in its tensors", self._limits)
        return nbytes

    def step(self) -> bool:
        """Copy some more; whether there is more to copy. Blocks.

        Raises
        ------
        IntegrityError
            A tensor was written to since the snapshot was made.
        FetchError
            It could not be read.
        CapacityError
            The machine has no memory for the copy.
        """
        try:
            return next(self._steps, None) is not None
        except BaseException:
            self._content = None  # whoever keeps the error must not keep the bytes
            raise

    def file(self) -> TensorsFile:
        """All of it, once `step` is through."""
        assert self._content is not None
        key = TensorsKey.of(self._digest.hexdigest())
        return TensorsFile(key, self._config, self._prefix, self._content)

    def _copy(self) -> Iterator[bool]:
        content = self._begin()
        nbytes = count = 0
        for described, (start, stop) in zip(self._described, self._places, strict=True):
            source = _source(described.name, self._tensors[described.name])
            target = content[start:stop].view(source.dtype)
            for piece, rows in _pieces(source, target):
                _copy_piece(described.name, piece, rows)
                self._digest.update(Buffer.of(piece.view(torch.uint8)).memory)
                nbytes, count = nbytes + piece.nbytes, count + 1
                if nbytes >= STEP_BYTES or count >= STEP_TENSORS:
                    nbytes = count = 0
                    yield True
        self._require_unchanged()

    def _begin(self) -> torch.Tensor:
        nbytes = self._places[-1][1] if self._places else len(self._prefix)
        try:
            content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        except (RuntimeError, MemoryError) as error:
            problem = f"there is no host memory for a copy of {nbytes:,} bytes"
            raise CapacityError(problem, stage="fetch") from error
        self._content = content
        content[: len(self._prefix)] = torch.frombuffer(bytearray(self._prefix), dtype=torch.uint8)
        # The length, for a byte must not pass from one to the other.
        self._digest.update(len(self._config).to_bytes(8, "little") + self._config + self._prefix)
        for event in self._written:
            event.synchronize()
        return content

    def _require_unchanged(self) -> None:
        for name, before, now in zip(
            self._tensors, self._versions, _versions(self._tensors), strict=True
        ):
            if before != now:
                raise IntegrityError(
                    f"tensor {shorten(name, 200)!r} was written to while it was copied; train on"
                    " when the call is through, or give it a clone"
                )


def _versions(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """How often each was written to, as far as torch counts it."""
    try:
        return [tensor._version for tensor in tensors.values()]  # noqa: SLF001 - torch has no other
    except AttributeError:
        name, other = next(
            (name, each) for name, each in tensors.items() if not isinstance(each, torch.Tensor)
        )
        kind = type(other).__name__
        raise UsageError(f"tensor {str(name)!r} is no torch tensor, but {kind}") from None
    except RuntimeError:  # one was made in inference mode, where torch does not count
        return [
            0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - as above
            for tensor in tensors.values()
        ]


def _written(tensors: Mapping[str, torch.Tensor]) -> list[DeviceEvent]:
    """Events that are done when the tensors' devices have done what they were told so far."""
    if all(tensor.is_cpu for tensor in tensors.values()):
        return []
    devices = {tensor.device for tensor in tensors.values()}
    events: list[DeviceEvent] = []
    for device in devices:
        if device.type not in {"cpu", "meta"}:
            event = new_event(device)
            event.record(stream_on(device, None))
            events.append(event)
    return events


def _described(name: object, tensor: torch.Tensor) -> Described:
    if not isinstance(name, str):
        raise UsageError(f"tensors have names, not {shorten(repr(name), 200)}")
    shown = repr(shorten(name, 200))
    if tensor.layout != torch.strided or tensor.is_meta:
        raise UsageError(f"tensor {shown} has no plain bytes to copy; materialise it first")
    dtype = _SPELLED.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedAdapterError(
            f"tensor {shown} is {tensor.dtype}; give it as {', '.join(map(str, _SPELLED))}"
        )
    return Described(name, dtype, tuple(tensor.shape))


def _source(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """To read from; without the check, a tensor whose memory was freed would end the process."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    if tensor.numel() and tensor.untyped_storage().nbytes() < last:
        problem = f"tensor {shorten(name, 200)!r} has no memory behind it; gather it first"
        raise FetchError(problem, retryable=False)
    return tensor.detach()


def _pieces(
    source: torch.Tensor, target: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the target, flat, and of the source in its own shape: rows that make one step at most."""
    if not source.numel():
        return
    rows = source if source.dim() else source.view(1)
    row_elements = rows[0].numel()
    several = max(1, STEP_BYTES // (row_elements * source.itemsize))
    for first in range(0, len(rows), several):
        some = rows[first : first + several]
        start = first * row_elements
        yield target[start : start + some.numel()], some


def _copy_piece(name: str, piece: torch.Tensor, rows: torch.Tensor) -> None:
    try:
        piece.view(rows.shape).copy_(rows)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's tensor raises
        problem = f"tensor {shorten(name, 200)!r} could not be copied: {error}"
        # Without its frames, which hold the bytes.
        raise FetchError(problem, retryable=False) from error.with_traceback(None)
