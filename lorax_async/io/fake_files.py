"""What a `FakeSource` keeps and gives out: versions of adapters, readers, holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

from lorax_async.adapter import AdapterKey
from lorax_async.errors import FetchError


@dataclass(slots=True)
class Version:
    """One version of an adapter; `here` are the [start, stop) that have arrived, merged."""

    id: str
    key: AdapterKey
    config: bytes
    weights: bytes
    here: list[tuple[int, int]] = field(default_factory=list)

    def add(self, spans: Sequence[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.here, *spans]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.here = merged

    def has(self, start: int, stop: int) -> bool:
        return start == stop or any(first <= start and stop <= last for first, last in self.here)


class _Open:
    """Counted as open, by `closed`, until it is closed the first time."""

    def __init__(self, closed: Callable[[], None]) -> None:
        self._closed = closed
        self._lock = Lock()
        self._open = True

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._closed()


class FakeReader(_Open):
    """The `Reader` of a `FakeSource`: `read` gives the bytes of [start, stop), or raises."""

    def __init__(
        self,
        version: Version,
        read: Callable[[Version, int, int], memoryview],
        closed: Callable[[], None],
    ) -> None:
        super().__init__(closed)
        self.version = version
        self._read = read

    @property
    def nbytes(self) -> int:
        return len(self.version.weights)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        if not self._open:
            raise FetchError("the reader was closed before it was read")
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        content = self._read(self.version, offset, stop)
        for buffer in buffers:
            buffer.cast("B")[:] = content[: buffer.nbytes]
            content = content[buffer.nbytes :]

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        content = buffer.cast("B")
        size = content.nbytes // rows
        for n in range(rows):
            self.read_into([content[n * size : (n + 1) * size]], offset + n * pitch)


class FakeHold(_Open):
    """The `Hold` of a `FakeSource`."""

    def __init__(self, nbytes: int, locked: bool, closed: Callable[[], None]) -> None:
        super().__init__(closed)
        self.nbytes = nbytes
        self.locked = locked
