"""The operating system's errors in a disk cache, as ours. No text holds a path."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lorax_async.errors import CapacityError, FetchError, LoraxError
from lorax_async.io.sources.checked_open import code_of

_FULL = {
    errno.ENOSPC: "its disk is full; free some of it, or lower the cache's budget",
    errno.EDQUOT: "this user's disk quota is used up; raise it, or lower the cache's budget",
    errno.EFBIG: "this process may not write so large a file; raise its RLIMIT_FSIZE (ulimit -f)",
}

_HINTS = {
    errno.ENOENT: "somebody removed what was in use; its folder is made again, so load it again",
    errno.EROFS: "its file system can only be read; name another cache_dir to fetch anything new",
}


class CrowdedError(CapacityError):
    """There will be room when those who use it now have ended."""


def of_the_system(error: OSError, doing: str) -> LoraxError:
    """What is raised for it."""
    if error.errno in _FULL:
        return CapacityError(
            f"the disk cache cannot {doing} ({code_of(error)}): {_FULL[error.errno]}",
            stage="fetch",
        )
    said = f"the disk cache cannot {doing} ({code_of(error)})"
    return FetchError(f"{said}: {_HINTS[error.errno]}" if error.errno in _HINTS else said)


@contextmanager
def translated_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise of_the_system(error, doing) from error
