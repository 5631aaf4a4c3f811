"""The reader of weights that lie in several files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lorax_async.concurrency import SharedResource, close_all
from lorax_async.errors import IntegrityError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.split_weights import SplitPlan


class SplitFiles(NamedTuple):
    """A plan, and the readers of its files in order, which this owns."""

    plan: SplitPlan
    readers: tuple[Reader, ...]


class SplitReader:
    """The `Reader` of weights in several files, joined with one header. It owns the files.

    Without `files`, the first read calls `opener`, which may block.
    """

    def __init__(
        self, files: SplitFiles | None, opener: Callable[[], SplitFiles] | None = None
    ) -> None:
        self._files = SharedResource(
            "the adapter's weights file",
            lambda files: close_all(files.readers),
            open=opener,
            opened=files,
        )

    @property
    def files(self) -> SplitFiles | None:
        """None until the files are opened, and once they are closed."""
        return self._files.opened

    @property
    def nbytes(self) -> int:
        with self._files.use() as files:
            return files.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._fill(buffers, ByteSpan(offset, offset + sum(buffer.nbytes for buffer in buffers)))

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        self._fill([buffer], ByteSpan(offset, offset + size, rows, pitch if rows > 1 else 0))

    def _fill(self, buffers: Sequence[memoryview], span: ByteSpan) -> None:
        left = deque(buffer.cast("B") for buffer in buffers if buffer.nbytes)
        with self._files.use() as (plan, readers):
            if span.end > plan.nbytes:
                raise IntegrityError(
                    f"the weights, of {plan.nbytes:,} bytes, end before byte {span.end:,}"
                )
            for number, piece in plan.pieces(span):
                targets = _take(left, piece.nbytes)
                if not number:
                    content = b"".join(plan.prefix[start:stop] for start, stop in piece.ranges())
                    for target in targets:
                        target[:] = content[: len(target)]
                        content = content[len(target) :]
                elif piece.rows == 1:
                    readers[number - 1].read_into(targets, piece.start)
                else:
                    (target,) = targets  # of `read_rows`, which fills one
                    readers[number - 1].read_rows(target, piece.start, piece.rows, piece.pitch)

    def close(self) -> None:
        """Close the files now, or after the last read in progress."""
        self._files.close()


def _take(left: deque[memoryview], nbytes: int) -> list[memoryview]:
    """Take the buffers of the next `nbytes` bytes."""
    taken: list[memoryview] = []
    while nbytes:
        buffer = left.popleft()
        taken.append(buffer[:nbytes])
        if len(buffer) > nbytes:
            left.appendleft(buffer[nbytes:])
        nbytes -= len(taken[-1])
    return taken
