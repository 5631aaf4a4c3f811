"""Tensors of a caller, copied as they are now into a safetensors file in host memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

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


class Snapshot:
    """Copies tensors in steps of some milliseconds, in any thread, one step at a time.

    It is made while the tensors have the values to copy; what has been put on this thread's current
    streams by then is waited for. Call `measure`, then `step` until it returns False; then `key`,
    `prefix` and `content` (uint8 `[nbytes]`) are the file's.

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
        self.config = config
        self.prefix = b""
        self._limits = limits
        self._versions = _versions(self._tensors)
        self._events = _recorded_events(self._tensors)
        self._described: list[Described] = []
        self._places: list[tuple[int, int]] = []
        self._content: torch.Tensor | None = None
        self._digest = hashlib.sha256()
        self._steps = self._copy()

    @property
    def key(self) -> TensorsKey:
        return TensorsKey.of(self._digest.hexdigest())

    @property
    def content(self) -> torch.Tensor:
        assert self._content is not None
        return self._content

    def measure(self) -> int:
        """Check everything but the bytes; return the file's size. Blocks.

        Raises `UnsupportedAdapterError`, also for more bytes than the limits accept.
        """
        described = [_described(name, tensor) for name, tensor in self._tensors.items()]
        # As safetensors has them: the wider dtypes first, so that each is aligned to its own size.
        self._described = sorted(
            described, key=lambda each: (-TORCH_DTYPES[each.dtype].itemsize, each.name)
        )
        self.prefix, self._places = write_header(self._described)
        nbytes = self._places[-1][1] if self._places else len(self.prefix)
        check_size(nbytes, "in its tensors", self._limits)
        return nbytes

    def step(self) -> bool:
        """Copy some more; return whether there is more to copy. Blocks.

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
            self._content = None  # an error that is kept must not keep the bytes
            raise

    def _copy(self) -> Iterator[bool]:
        self._content = content = host_memory(
            self._places[-1][1] if self._places else len(self.prefix), self.prefix
        )
        # The length, for a byte must not pass from one to the other.
        self._digest.update(len(self.config).to_bytes(8, "little") + self.config + self.prefix)
        for event in self._events:
            event.synchronize()
        nbytes = count = 0
        for described, (start, stop) in zip(self._described, self._places, strict=True):
            source = _source(described.name, self._tensors[described.name])
            target = content[start:stop].view(source.dtype).view(source.shape)
            several = max(1, STEP_BYTES * len(source) // max(1, source.nbytes))
            cuts = list(range(several, len(source), several))
            pieces = zip(target.tensor_split(cuts), source.tensor_split(cuts), strict=True)
            for piece, rows in pieces if source.numel() else ():
                _copy_piece(described.name, piece, rows)
                self._digest.update(Buffer.of(piece.view(torch.uint8)).memory)
                nbytes, count = nbytes + piece.nbytes, count + 1
                if nbytes >= STEP_BYTES or count >= STEP_TENSORS:
                    nbytes = count = 0
                    yield True
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        after = _versions(self._tensors)
        for name, before, now in zip(self._tensors, self._versions, after, strict=True):
            if before != now:
                raise IntegrityError(
                    f"tensor {shorten(name, 200)!r} was written to while it was copied; train on"
                    " when the call is through, or give it a clone"
                )


def host_memory(nbytes: int, prefix: bytes) -> torch.Tensor:
    """Return uint8 `[nbytes]` of host memory that begins with `prefix`, or `CapacityError`."""
    try:
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        problem = f"there is no host memory for a copy of {nbytes:,} bytes"
        raise CapacityError(problem, stage="fetch") from error
    content[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    return content


def _versions(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Return how often each was written to, as far as torch counts it."""
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


def _recorded_events(tensors: Mapping[str, torch.Tensor]) -> list[DeviceEvent]:
    """Return events that are done when the tensors' devices have done what was asked so far."""
    if all(tensor.is_cpu for tensor in tensors.values()):
        return []
    events: list[DeviceEvent] = []
    for device in {tensor.device for tensor in tensors.values()}:
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
    """Return rows to read, with memory behind them; reading without any ends the process."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    if tensor.numel() and tensor.untyped_storage().nbytes() < last:
        problem = f"tensor {shorten(name, 200)!r} has no memory behind it; gather it first"
        raise FetchError(problem, retryable=False)
    rows = tensor.detach()
    return rows if rows.dim() else rows.view(1)


def _copy_piece(name: str, piece: torch.Tensor, rows: torch.Tensor) -> None:
    try:
        piece.copy_(rows)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's tensor raises
        problem = f"tensor {shorten(name, 200)!r} could not be copied: {error}"
        # Without its frames, which hold the bytes.
        raise FetchError(problem, retryable=False) from error.with_traceback(None)
