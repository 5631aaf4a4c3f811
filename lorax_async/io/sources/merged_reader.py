"""A file that is computed as it is read: a merge of the adapters that its parts' readers read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Lock, get_ident

import torch

from lorax_async.adapter import MergedKey
from lorax_async.core.merge_plan import MergedTensor, MergePlan, Piece, part_words
from lorax_async.errors import FetchError, IntegrityError, LoraxError
from lorax_async.io.merging import Draws, combine, concatenate
from lorax_async.io.ports import AdapterFile
from lorax_async.io.staging import TORCH_DTYPES, Buffer


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A merge's plan, and its parts, which belong to whoever holds this."""

    plan: MergePlan
    files: tuple[AdapterFile, ...]

    def close(self) -> None:
        for file in self.files:
            file.reader.close()


class MergedReader:
    """The `Reader` of a merge. No more than what is asked for is computed, in the thread that asks.

    So there is never more of it in memory than one tensor per thread, with those it is made of.

    Parameters
    ----------
    key
        Names the parts, in errors.
    opened
        What it reads, if that is open; else `opener` gives it at the first read. It may block.
    """

    def __init__(
        self, key: MergedKey, opened: Opened | None, opener: Callable[[], Opened] | None = None
    ) -> None:
        self.opened = opened
        self.key = key
        self._opener = opener
        self._draws: Draws | None = None
        self._cut: dict[int, tuple[int, torch.Tensor]] = {}
        self._lock = Lock()
        self._opening = Lock()
        self._reading = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        with self._held() as opened:
            return opened.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._held() as opened:
            self._fill(opened, buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        """The tensor that the rows are of is computed once."""
        content = buffer.cast("B")
        size = content.nbytes // rows
        with self._held() as opened:
            for n in range(rows):
                self._fill(opened, [content[n * size : (n + 1) * size]], offset + n * pitch)

    def close(self) -> None:
        with self._lock:
            unused = not self._closed and not self._reading
            self._closed = True
        if unused:
            self._end()

    def _fill(self, opened: Opened, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        if stop > opened.plan.nbytes:
            raise IntegrityError(f"the merge ends before byte {stop:,}")
        targets = _Targets(buffers)
        for content in self._contents(opened, offset, stop):
            targets.fill(content)

    def _contents(self, opened: Opened, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The bytes of [start, stop), as flat uint8 tensors."""
        plan = opened.plan
        if start < stop and start < len(plan.prefix):
            yield torch.frombuffer(bytearray(plan.prefix[start:stop]), dtype=torch.uint8)
        generator: torch.Generator | None = None
        for n in plan.touched(start, stop) if start < stop else ():
            tensor = plan.tensors[n]
            first, last = max(start, tensor.start), min(stop, tensor.stop)
            made = self._take_cut(n, last == tensor.stop)
            if made is None:
                if generator is None and self._draws is not None:
                    generator = self._draws.before(n)
                made = _merged(self.key, opened, tensor, generator)
                if last < tensor.stop:
                    self._cut[get_ident()] = n, made
            else:
                generator = None
            yield made[first - tensor.start : last - tensor.start]

    def _take_cut(self, n: int, last: bool) -> torch.Tensor | None:
        """The tensor that this thread read last, and not to its end; kept until then.

        Or until the thread needs another: of one that is cut for a shard, the end is not read.
        """
        thread = get_ident()
        cut, made = self._cut.get(thread, (n, None))
        if last or cut != n:
            self._cut.pop(thread, None)
        return made if cut == n else None

    @contextmanager
    def _held(self) -> Iterator[Opened]:
        """What it reads, open until the last read is through."""
        self._enter()
        try:
            yield self._open()
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise FetchError("the merge was closed before it was read")
            self._reading += 1

    def _leave(self) -> None:
        with self._lock:
            self._reading -= 1
            last = self._closed and not self._reading
        if last:
            self._end()

    def _open(self) -> Opened:
        """Once, by whoever reads first."""
        with self._opening:
            if self.opened is None:
                assert self._opener is not None
                self.opened = self._opener()
            if self._draws is None and self.opened.plan.starts:
                self._draws = _draws(self.key, self.opened.plan)
            return self.opened

    def _end(self) -> None:
        self._cut.clear()
        self._draws = None
        if self.opened is not None:
            self.opened.close()


class _Targets:
    """Where bytes go that are read, one buffer after the other."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        filled = (buffer.cast("B") for buffer in buffers if buffer.nbytes)
        self._left = deque(torch.frombuffer(buffer, dtype=torch.uint8) for buffer in filled)

    def fill(self, content: torch.Tensor) -> None:
        while len(content):
            target = self._left.popleft()
            count = min(len(target), len(content))
            target[:count].copy_(content[:count])  # as a memoryview it would hold the GIL
            content = content[count:]
            if count < len(target):
                self._left.appendleft(target[count:])


def _draws(key: MergedKey, plan: MergePlan) -> Draws:
    counts = [sum(prod(p.span.shape) for p in tensor.pieces) for tensor in plan.tensors]
    return Draws(key.merge.seed, plan.starts, counts)


def _merged(
    key: MergedKey, opened: Opened, tensor: MergedTensor, generator: torch.Generator | None
) -> torch.Tensor:
    """The tensor's bytes, uint8 `[nbytes]`."""
    merge, pieces = key.merge, tensor.pieces
    tensors = [_read(key, opened, piece) for piece in pieces]
    factors = [(piece.weight, piece.scale) for piece in pieces]
    made = torch.zeros(tensor.shape, dtype=TORCH_DTYPES[opened.plan.dtype])
    if merge.strategy == "linear":
        concatenate(made, tensor.factor, tensors, factors)
    else:
        combined = combine(merge, tensor.factor, tensors, factors, generator)
        rows, columns = combined.shape
        made[:rows, :columns].copy_(combined)
    return made.view(torch.uint8).view(-1)


def _read(key: MergedKey, opened: Opened, piece: Piece) -> torch.Tensor:
    span = piece.span
    content = torch.empty(span.stop - span.start, dtype=torch.uint8)
    try:
        opened.files[piece.part].reader.read_into([Buffer.of(content).memory], span.start)
    except LoraxError as error:
        raise error.prefixed(part_words(key, piece.part)) from error.__cause__
    return content.view(TORCH_DTYPES[span.dtype]).view(span.shape)
