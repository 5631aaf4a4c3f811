"""The chunk map of a partial download: one bit for each chunk that is here as a whole.

Bits are only ever set, each after its bytes were written: a set bit is true in any state of the
map's file, torn or not, as long as the kernel that took the bytes runs. A crash of the machine may
lose bytes and keep bits, so a map names the boot that it is good for, until both were synced.
"""

from __future__ import annotations

import struct

from lorax_async.core.spans import Span, SpanSet

CHUNK_BYTES = 256 << 10
"""What a kill costs each connection; the map of 4 GiB is 2 KiB."""

MAX_CHUNK_BYTES = 1 << 30
SYNCED = bytes(16)
"""In place of a boot: the bytes are on the disk."""

_MAGIC = b"LRXCHNK2"
_HEADER = struct.Struct("<8s16sQQ")


class ChunkMap:
    """The bits of a file of `nbytes`."""

    __slots__ = ("_bits", "chunk_bytes", "nbytes")

    def __init__(self, nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.nbytes = nbytes
        self.chunk_bytes = chunk_bytes
        self._bits = bytearray(-(-self.chunks // 8))

    @property
    def chunks(self) -> int:
        return -(-self.nbytes // self.chunk_bytes)

    def mark(self, written: Span, here: Span) -> tuple[bytes, int] | None:
        """Set the bits of the chunks that `written`, a part of `here`, has completed.

        Return what to write to the map's file, and its offset there; None if no bit changed.
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
        """Return the bytes of the chunks that are here."""
        size = self.chunk_bytes
        return SpanSet(
            (chunk * size, min(self.nbytes, (chunk + 1) * size))
            for chunk in range(self.chunks)
            if self._bits[chunk // 8] >> chunk % 8 & 1
        )

    def encoded(self, boot: bytes) -> bytes:
        """Return the map's file: good for this boot, or for ever (`SYNCED`)."""
        return _HEADER.pack(_MAGIC, boot, self.nbytes, self.chunk_bytes) + self._bits

    @classmethod
    def decoded(cls, content: bytes, nbytes: int, boot: bytes) -> ChunkMap | None:
        """Decode the map of a file of `nbytes`; None if it is none, or not good for this boot."""
        if len(content) < _HEADER.size:
            return None
        magic, good_for, size, chunk_bytes = _HEADER.unpack_from(content)
        if magic != _MAGIC or size != nbytes or not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            return None
        found = cls(nbytes, chunk_bytes)
        bits = content[_HEADER.size :]
        beyond = found.chunks % 8 and bits and bits[-1] >> found.chunks % 8
        if good_for not in {SYNCED, boot} or len(bits) != len(found._bits) or beyond:
            return None
        found._bits[:] = bits
        return found


def encoded_size(nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the size of the map's file."""
    return _HEADER.size + -(-nbytes // (8 * chunk_bytes))
