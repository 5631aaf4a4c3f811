"""Recent answers of sources: what an id resolved to, and where the files of a key are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorax_async.adapter import AdapterRef, RemoteKey
from lorax_async.io.remote.ports import Located

MAX_REFS = 65_536
MAX_KEYS = 16_384
"""The lifecycle remembers as many idle adapters."""

MAX_ANSWERS = 64
"""Unused first bytes that came with a version; about 256 KiB each."""


ANSWER_SECONDS = 1.0
"""Older first bytes are requested again: the source may have changed its file under the same
validator, and they would be joined with the rest of another version."""

LOCATED_SECONDS = 600.0
"""How long a file's location counts: signed URLs expire."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The last request for a key, and its source's answer; None if it must be asked again."""

    ref: AdapterRef
    located: Located | None
    since: float


class Known:
    """Sources' answers, by request and by key.

    They count for `seconds` of `clock`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._keys: OrderedDict[AdapterRef, tuple[RemoteKey, float]] = OrderedDict()
        self._origins: OrderedDict[RemoteKey, Origin] = OrderedDict()
        self._answered: OrderedDict[RemoteKey, None] = OrderedDict()

    def recent(self, ref: AdapterRef) -> RemoteKey | None:
        """Return the key that `ref` recently resolved to."""
        key, since = self._keys.get(ref, (None, 0.0))
        if key is None or self._clock() - since >= self._seconds:
            return None
        self._asked(ref, key)
        return key

    def remember(self, ref: AdapterRef, key: RemoteKey, located: Located | None) -> None:
        """Record that `ref` is `key` now, by the source, or by the cache if none was asked."""
        self._keys[ref] = (key, self._clock())
        self._keys.move_to_end(ref)
        if len(self._keys) > MAX_REFS:
            self._keys.popitem(last=False)
        if located is None and self._asked(ref, key):
            return
        self._origins[key] = Origin(ref, located, self._clock())
        self._origins.move_to_end(key)
        if len(self._origins) > MAX_KEYS:
            gone, _ = self._origins.popitem(last=False)
            self._answered.pop(gone, None)
        if located is not None and any(file.answer for file in located.files):
            self._answered[key] = None
            self._answered.move_to_end(key)
            if len(self._answered) > MAX_ANSWERS:
                self.used(next(iter(self._answered)))

    def _asked(self, ref: AdapterRef, key: RemoteKey) -> bool:
        """Let the key be fetched in the name of its last request; False if the key is unknown.

        Another request's token might be refused, and its digest is not this one's.
        """
        origin = self._origins.get(key)
        if origin is not None and origin.ref != ref:
            self._origins[key] = replace(origin, ref=ref)
        return origin is not None

    def origin(self, key: RemoteKey) -> Origin | None:
        origin = self._origins.get(key)
        seconds = ANSWER_SECONDS if key in self._answered else LOCATED_SECONDS
        if origin is None or self._clock() - origin.since < seconds:
            return origin
        return replace(origin, located=None)

    def used(self, key: RemoteKey) -> None:
        """Drop the first bytes that came with `key`: locate it again."""
        if key in self._answered:
            del self._answered[key]
            self._origins[key] = replace(self._origins[key], located=None)
