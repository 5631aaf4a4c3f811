"""Streams and events of an accelerator, where torch's generic ones do not suffice on CUDA."""

from __future__ import annotations

from typing import Protocol

import torch

from lorax_async.errors import ConfigError, UsageError


class DeviceEvent(Protocol):
    """What `torch.Event` and `torch.cuda.Event` have in common.

    Whoever waits on an event that was never recorded does not wait at all, on no backend.
    """

    def record(self, stream: torch.Stream) -> None:
        """Stand behind all that is on the stream by now."""

    def wait(self, stream: torch.Stream) -> None:
        """Let the stream go on, from here, once the event is done. Blocks no thread."""

    def synchronize(self) -> None:
        """Block this thread, without the interpreter's lock, until the event is done."""


def resolve_device(text: str) -> torch.device:
    """The accelerator that `text` names; without a number, this thread's current one.

    Asked here and not when memory is claimed: that happens in another thread, whose current device
    is 0 whatever this one's is. Where there is no such accelerator, `require_device` says so later.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {text!r}; it is 'cuda' or 'cuda:N'") from error
    if str(device) != device.type:  # it has a number
        return device
    index = torch.accelerator.current_device_index() if _is_here(device) else 0
    return torch.device(device.type, index)


def require_device(device: torch.device) -> None:
    """`ConfigError` unless this machine, and this build of torch, have it."""
    if not _is_here(device):
        raise ConfigError(
            f"{device} is not available here; install a torch that has {device.type},"
            " on a machine that has one"
        )
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise ConfigError(f"there is no {device}; this machine has {count}, counted from 0")


def _is_here(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def new_stream(device: torch.device) -> torch.Stream:
    """A stream that is ordered with no other, the default one included.

    Of CUDA's, torch has a pool of 32, and then gives them again: who shares ours by chance may wait
    for copies, and we for its kernels, but nothing runs out of order.
    """
    if device.type == "cuda":
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.Stream(device)


def new_event(device: torch.device) -> DeviceEvent:
    """An event whose `synchronize` sleeps.

    `torch.Event` takes `blocking` and ignores it: on CUDA a thread in its `synchronize` would spin,
    and burn a core for as long as a copy takes.
    """
    if device.type == "cuda":
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    return torch.Event(device, blocking=True)


def stream_on(device: torch.device, stream: object | None) -> torch.Stream:
    """`stream`, or this thread's current one, as the device's events take it.

    Raises `UsageError` for what is no stream of the device, and for one that is being captured into
    a graph: events of before the capture have no place in it, and events in it are never done.
    """
    if stream is None:
        stream = torch.accelerator.current_stream(device)
    if not isinstance(stream, torch.Stream) or stream.device != device:
        raise UsageError(f"{stream!r} is not a torch stream of {device}")
    if device.type == "cuda" and not isinstance(stream, torch.cuda.Stream):
        # A CUDA event reads fields that the generic class does not have.
        stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
    if _is_capturing(stream):
        raise UsageError(
            "the stream is being captured; wait for copies, and note uses, around the replay"
        )
    return stream


def _is_capturing(stream: torch.Stream) -> bool:
    asked = getattr(stream, "is_capturing", None)  # of younger torch than we ask for
    if asked is not None:
        return bool(asked())
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
