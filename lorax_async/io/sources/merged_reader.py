"""A file that is computed as it is read: a merge of the adapters that its parts' readers read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock, get_ident

import torch

from lorax_async.adapter import MergedKey
from lorax_async.core.merge_plan import MergedTensor, MergePlan, Piece, part_words
from lorax_async.errors import IntegrityError, LoraxError
from lorax_async.io.merging import Draws, combine, concatenate
from lorax_async.io.ports import AdapterFile
from lorax_async.io.sources.opened_once import OpenedOnce
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
        self.key = key
        self._shared = OpenedOnce(
            "the merge was closed before it was read",
            None if opened is None else _Work(key, opened),
            None if opener is None else lambda: _Work(key, opener()),
        )

    @property
    def opened(self) -> Opened | None:
        """What it reads, if that was opened."""
        work = self._shared.opened
        return None if work is None else work.opened

    @property
    def nbytes(self) -> int:
        with self._shared.held() as work:
            return work.opened.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._shared.held() as work:
            _fill(work, buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        """The tensor that the rows are of is computed once."""
        content = buffer.cast("B")
        size = content.nbytes // rows
        with self._shared.held() as work:
            for n in range(rows):
                _fill(work, [content[n * size : (n + 1) * size]], offset + n * pitch)

    def close(self) -> None:
        self._shared.close()


class _Work:
    """What is opened, and what of it is under way in the threads that read."""

    def __init__(self, key: MergedKey, opened: Opened) -> None:
        self.opened = opened
        self._key = key
        self._lock = Lock()
        self._draws: Draws | None = None
        self._cut: dict[int, tuple[int, torch.Tensor]] = {}

    def close(self) -> None:
        self._cut.clear()
        self._draws = None
        self.opened.close()

    def contents(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The bytes of [start, stop), as flat uint8 tensors."""
        plan, draws = self.opened.plan, self._drawn()
        if start < stop and start < len(plan.prefix):
            yield torch.frombuffer(bytearray(plan.prefix[start:stop]), dtype=torch.uint8)
        generator: torch.Generator | None = None
        for n in plan.touched(start, stop) if start < stop else ():
            tensor = plan.tensors[n]
            first, last = max(start, tensor.start), min(stop, tensor.stop)
            made = self._take_cut(n, last == tensor.stop)
            if made is None:
                if generator is None and draws is not None:
                    generator = draws.before(n)
                made = _merged(self._key, self.opened, tensor, generator)
                if last < tensor.stop:
                    self._cut[get_ident()] = n, made
            else:
                generator = None
            yield made[first - tensor.start : last - tensor.start]

    def _drawn(self) -> Draws | None:
        """Made once, by whoever reads first."""
        with self._lock:
            if self._draws is None and self.opened.plan.starts:
                self._draws = _draws(self._key, self.opened.plan)
            return self._draws

    def _take_cut(self, n: int, last: bool) -> torch.Tensor | None:
        """The tensor that this thread read last, and not to its end; kept until then.

        Or until the thread needs another: of one that is cut for a shard, the end is not read.
        """
        thread = get_ident()
        cut, made = self._cut.get(thread, (n, None))
        if last or cut != n:
            self._cut.pop(thread, None)
        return made if cut == n else None


def _fill(work: _Work, buffers: Sequence[memoryview], offset: int) -> None:
    stop = offset + sum(buffer.nbytes for buffer in buffers)
    if stop > work.opened.plan.nbytes:
        raise IntegrityError(f"the merge ends before byte {stop:,}")
    targets = _Targets(buffers)
    for content in work.contents(offset, stop):
        targets.fill(content)


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
