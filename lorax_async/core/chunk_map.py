"""What a partial download remembers of itself: a bit for each chunk that is here as a whole.

Bits are only ever set, and each after its bytes were written: whatever moment the file of the map
is seen at, torn or not, a set bit is true.
"""

from __future__ import annotations

import struct

from lorax_async.core.spans import Span, SpanSet

CHUNK_BYTES = 256 << 10
"""What a kill costs each connection, besides what it is reading; 4 GiB are then 2 KiB of bits."""

_MAGIC = b"LRXCHNK1"
_HEADER = struct.Struct("<8sQQ")
MAX_CHUNK_BYTES = 1 << 30


class ChunkMap:
    """The bits of a file of `nbytes`, with their place in the map's own file."""

    __slots__ = ("_bits", "chunk_bytes", "nbytes")

    def __init__(self, nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.nbytes = nbytes
        self.chunk_bytes = chunk_bytes
        self._bits = bytearray(-(-self.chunks // 8))

    @property
    def chunks(self) -> int:
        return -(-self.nbytes // self.chunk_bytes)

    def mark(self, written: Span, here: Span) -> tuple[bytes, int] | None:
        """Set the bits of chunks that `written` has made whole, `here` being the span it is in.

        Returns what is to be written of the map's file and where; None if no bit changed.
        """
        start, stop = here
        first = max(-(-start // self.chunk_bytes), written[0] // self.chunk_bytes)
        # The last chunk may be a short one.
        whole = self.chunks if stop >= self.nbytes else stop // self.chunk_bytes
        end = min(whole, -(-written[1] // self.chunk_bytes))
        if first >= end:
            return None
        for chunk in range(first, end):
            self._bits[chunk // 8] |= 1 << chunk % 8
        low, high = first // 8, (end - 1) // 8 + 1
        return bytes(self._bits[low:high]), _HEADER.size + low

    def spans(self) -> SpanSet:
        """The bytes of the chunks that are here."""
        size = self.chunk_bytes
        return SpanSet(
            (chunk * size, min(self.nbytes, (chunk + 1) * size))
            for chunk in range(self.chunks)
            if self._bits[chunk // 8] >> chunk % 8 & 1
        )

    def encoded(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.nbytes, self.chunk_bytes) + self._bits

    @classmethod
    def decoded(cls, content: bytes, nbytes: int) -> ChunkMap | None:
        """The map of a file of `nbytes` that `content` holds; None if it holds none."""
        if len(content) < _HEADER.size:
            return None
        magic, size, chunk_bytes = _HEADER.unpack_from(content)
        if magic != _MAGIC or size != nbytes or not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            return None
        found = cls(nbytes, chunk_bytes)
        bits = content[_HEADER.size :]
        if len(bits) != len(found._bits) or _beyond(bits, found.chunks):
            return None
        found._bits[:] = bits
        return found


def encoded_size(nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Bytes that the map of a file of `nbytes` takes."""
    return _HEADER.size + -(-nbytes // (8 * chunk_bytes))


def _beyond(bits: bytes, chunks: int) -> bool:
    """Is a bit set that no chunk has?"""
    return bool(chunks % 8 and bits[-1] >> chunks % 8)
