"""What the errors of an accelerator mean."""

from __future__ import annotations

import torch

from lorax_async.errors import TransferError


class Failures:
    """Whether a device was lost: CUDA's errors stick, and nothing runs after the first.

    From any thread; the first reason stays.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reason: str | None = None

    def heed(self) -> None:
        """Raise if the device was lost."""
        if self._reason is not None:
            raise self._loss(self._reason)

    def note(self, error: RuntimeError) -> TransferError:
        """A new error for one copy; all but a passing one means that the device was lost."""
        reason = first_line(error)
        if is_out_of_memory(error) or is_forbidden_by_capture(error):
            return TransferError(f"{self._name} refused a copy ({reason}); try again")
        self._reason = self._reason or reason
        return self._loss(self._reason)

    def note_use(self, error: RuntimeError) -> None:
        """The use has ended, for nothing runs any more; copies tell of the loss."""
        self.note(error)

    def _loss(self, reason: str) -> TransferError:
        return TransferError(
            f"{self._name}: the device was lost ({reason}), nothing runs on it any more;"
            " restart the process",
            retryable=False,
        )


def is_forbidden_by_capture(error: RuntimeError) -> bool:
    """CUDA refused a call because some thread captures a graph in mode "global".

    Nothing is wrong with what was asked for, nor with the device.
    """
    return "operation not permitted when stream is capturing" in str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """The allocators of torch have a class for it, the driver has only the text."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def first_line(error: BaseException) -> str:
    """CUDA's errors go on with advice on how to debug kernels."""
    return next(iter(str(error).splitlines()), type(error).__name__)
