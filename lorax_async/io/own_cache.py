"""The disk cache of one loader, made when somebody first needs it."""

from __future__ import annotations

from threading import Lock

from lorax_async.config import LoaderConfig
from lorax_async.core.policies import policy
from lorax_async.errors import LoaderClosedError
from lorax_async.io.disk_cache import DiskCache


class OwnCache:
    """Over `config.cache_folder`. Who never needs it has no folder. From any thread; blocks."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._lock = Lock()
        self._made: DiskCache | None = None
        self._last_used: int | None = None
        self._closed = False

    def get(self) -> DiskCache:
        """Always the same. Raises `LoaderClosedError` after `close`, and what `DiskCache` does."""
        with self._lock:
            if self._closed:
                raise LoaderClosedError("the loader is closed")
            if self._made is None:
                config = self._config
                self._made = DiskCache(
                    config.cache_folder, config.cache_bytes, policy(config.eviction)
                )
            return self._made

    @property
    def last_used(self) -> int | None:
        """Bytes that were seen in its folder last, also after `close`; None if never. Quick."""
        made = self._made
        return self._last_used if made is None else made.last_used

    def close(self) -> None:
        """Entries and downloads are to be closed first. Idempotent."""
        with self._lock:
            made, self._made, self._closed = self._made, None, True
        if made is not None:
            self._last_used = made.last_used
            made.close()
