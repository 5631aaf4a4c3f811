"""The floors: the same bytes into the same kind of memory, with nothing around it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import local
from typing import TypeVar

import torch

from work_files import AdapterFolder

LAYER_GROUP = 2_621_440
"""Bytes of one layer of the rank-16 adapter: pieces of this size were as fast as any other."""

COLD_PIECE = 512 << 10
"""Buffered cold reads: a tenth faster than by layer groups, and as fast as smaller pieces."""

DIRECT_PIECE = 4 << 20
_BLOCK = 4096  # what O_DIRECT wants offsets, sizes and addresses aligned to, on every disk

T = TypeVar("T")
Piece = tuple[int, int]
"""Start and stop in the weights of the file, in bytes."""


class Arena:
    """Host memory whose every page was touched, in huge pages where the system has them.

    `tensor` is uint8 `[bytes]` and starts on a page.
    """

    def __init__(self, nbytes: int) -> None:
        size = -(-nbytes // _BLOCK) * _BLOCK
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.tensor.zero_()
        self.bytes = memoryview(self.memory)

    def places(
        self, folder: AdapterFolder, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Where each tensor goes: the file's order, without gaps, cast to `dtype`."""
        places, at = {}, 0
        for name, tensor in folder.tensors.items():
            wanted = dtype or tensor.dtype
            stop = at + tensor.numel() * wanted.itemsize
            places[name] = self.tensor[at:stop].view(wanted).view(tensor.shape)
            at = stop
        return places


class Threads:
    """The pool that a floor reads with: started before any timer, as long as the bench."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "floor")
        self._own = local()
        self._share(lambda _: None, [(n, n) for n in range(count)])

    def read(self, folder: AdapterFolder, arena: Arena, piece_size: int = LAYER_GROUP) -> None:
        """preadv into the arena, a layer's worth of bytes at a time by default."""
        with _opened(folder, os.O_RDONLY) as file:

            def work(piece: Piece) -> None:
                _read(file, arena.bytes[slice(*piece)], folder.data_start + piece[0])

            self._share(work, _pieces(folder.nbytes, piece_size))

    def read_many(self, folders: Sequence[AdapterFolder], arena: Arena) -> None:
        """As `read`, of several files without a stop between them, one behind the other."""
        with ExitStack() as files:
            work, at = [], 0
            for folder in folders:
                file = files.enter_context(_opened(folder, os.O_RDONLY))
                pieces = _pieces(folder.nbytes, LAYER_GROUP)
                work += [(file, folder.data_start, at, piece) for piece in pieces]
                at += folder.nbytes

            def read(one: tuple[int, int, int, Piece]) -> None:
                file, data_start, at, (start, stop) = one
                _read(file, arena.bytes[at + start : at + stop], data_start + start)

            self._share(read, work)

    def read_and_cast(self, folder: AdapterFolder, arena: Arena, dtype: torch.dtype) -> None:
        """preadv into a small buffer per thread, `copy_` from there: a cast on the way."""
        source = next(iter(folder.tensors.values())).dtype
        target = arena.tensor.view(dtype)
        with _opened(folder, os.O_RDONLY) as file:

            def work(piece: Piece) -> None:
                start, stop = piece
                buffer = self._buffer(LAYER_GROUP)
                _read(file, buffer.bytes[: stop - start], folder.data_start + start)
                first, last = start // source.itemsize, stop // source.itemsize
                target[first:last].copy_(buffer.tensor[: stop - start].view(source))

            self._share(work, _pieces(folder.nbytes, LAYER_GROUP))

    def read_direct(self, folder: AdapterFolder, arena: Arena) -> None:
        """O_DIRECT reads, past the page cache.

        The data of a file starts at no block's boundary, and direct reads go by blocks: the whole
        file lands in the arena, header first, so that no second copy is counted.
        """
        with _opened(folder, os.O_RDONLY | os.O_DIRECT) as file:

            def work(piece: Piece) -> None:
                start, stop = piece
                room = -(-(stop - start) // _BLOCK) * _BLOCK
                _read(file, arena.bytes[start : start + room], start, stop - start)

            self._share(work, _pieces(folder.file_size, DIRECT_PIECE))

    def close(self) -> None:
        self._pool.shutdown()

    def _buffer(self, nbytes: int) -> Arena:
        buffer: Arena | None = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = Arena(nbytes)
        return buffer

    def _share(self, work: Callable[[T], None], pieces: Iterable[T]) -> None:
        """Every thread takes the next piece until none is left."""
        left = iter(tuple(pieces))

        def drain() -> None:
            for piece in left:  # a tuple's iterator is safe to share under the GIL
                work(piece)

        for done in [self._pool.submit(drain) for _ in range(self.count)]:
            done.result()


def _pieces(nbytes: int, size: int) -> list[Piece]:
    return [(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]


@contextmanager
def _opened(folder: AdapterFolder, flags: int) -> Iterator[int]:
    file = os.open(folder.weights, flags)
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int, buffer: memoryview, offset: int, wanted: int | None = None) -> None:
    missing = len(buffer) if wanted is None else wanted
    while missing > 0:
        got = os.preadv(file, [buffer], offset)
        if got == 0:
            raise EOFError(f"{missing} bytes are missing at {offset}")
        buffer, offset, missing = buffer[got:], offset + got, missing - got
