"""A download's bytes, each at its place in a file."""

from __future__ import annotations

import os


class FileSink:
    """Writes to a descriptor that somebody else opened, and closes when the download is done."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, offset: int, data: memoryview) -> None:
        """All of it, or an `OSError`. From any thread; the GIL is not held meanwhile."""
        while data:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count
