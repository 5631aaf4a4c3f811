"""Several files of weights, read as the one that they stand for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from lorax_async.core.runs import Span
from lorax_async.core.split_file import SplitPlan
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.ports import Reader


@dataclass(frozen=True, slots=True, eq=False)
class SplitFiles:
    """A plan, and its files' readers in their order, which belong to whoever holds this."""

    plan: SplitPlan
    readers: tuple[Reader, ...]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


class SplitReader:
    """A `Reader` over the readers of several files, which it owns. It reads the header, too.

    Parameters
    ----------
    files
        What it reads, if that is open; else `opener` gives it at the first read. It may block.
    """

    def __init__(
        self, files: SplitFiles | None, opener: Callable[[], SplitFiles] | None = None
    ) -> None:
        self.files = files
        """What it reads, if that was opened."""
        self._opener = opener
        self._lock = Lock()
        self._opening = Lock()
        self._users = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        with self._held() as files:
            return files.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        with self._held() as files:
            pieces = _pieces(files.plan, Span(offset, stop))
            if len(pieces) == 1 and pieces[0][0]:
                number, span = pieces[0]
                files.readers[number - 1].read_into(buffers, span.start)
            else:
                _fill(files, pieces, _Targets(buffers))

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        span = Span(offset, offset + size, rows, pitch if rows > 1 else 0)
        with self._held() as files:
            _fill(files, _pieces(files.plan, span), _Targets([buffer]))

    def close(self) -> None:
        """Close the files now, or after the last read that is under way."""
        with self._lock:
            unused = not self._closed and not self._users
            self._closed = True
        if unused:
            self._end()

    @contextmanager
    def _held(self) -> Iterator[SplitFiles]:
        """Keep the files open; the first read opens them. Raise `FetchError` once it is closed."""
        self._enter()
        try:
            with self._opening:
                if self.files is None:
                    assert self._opener is not None
                    self.files = self._opener()
            yield self.files
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._end()

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise FetchError("the weights were closed before they were read")
            self._users += 1

    def _end(self) -> None:
        if self.files is not None:
            self.files.close()


def _pieces(plan: SplitPlan, span: Span) -> list[tuple[int, Span]]:
    if span.end > plan.nbytes:
        raise IntegrityError(f"the weights, of {plan.nbytes:,} bytes, end before byte {span.end:,}")
    return list(plan.pieces(span))


def _fill(files: SplitFiles, pieces: Iterable[tuple[int, Span]], targets: _Targets) -> None:
    for number, span in pieces:
        buffers = targets.take(span.nbytes)
        if not number:
            prefix = files.plan.prefix
            _copy(b"".join(prefix[start:stop] for start, stop in span.ranges()), buffers)
        elif span.rows == 1:
            files.readers[number - 1].read_into(buffers, span.start)
        else:
            (buffer,) = buffers  # of `read_rows`, which fills one
            files.readers[number - 1].read_rows(buffer, span.start, span.rows, span.pitch)


def _copy(content: bytes, buffers: Iterable[memoryview]) -> None:
    start = 0
    for buffer in buffers:
        buffer[:] = content[start : start + len(buffer)]
        start += len(buffer)


class _Targets:
    """Where bytes go that are read, one buffer after the other."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left = deque(buffer.cast("B") for buffer in buffers if buffer.nbytes)

    def take(self, nbytes: int) -> list[memoryview]:
        """The next so many bytes of them."""
        taken: list[memoryview] = []
        while nbytes:
            buffer = self._left.popleft()
            taken.append(buffer[:nbytes])
            if len(buffer) > nbytes:
                self._left.appendleft(buffer[nbytes:])
            nbytes -= len(taken[-1])
        return taken
