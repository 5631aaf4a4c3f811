"""What sources have told, for as long as it may be taken as true."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorax_async.adapter import AdapterRef, RemoteKey
from lorax_async.io.remote.ports import Located

MAX_REFS = 65_536
MAX_KEYS = 16_384
"""As many as the lifecycle remembers idle adapters."""

MAX_ANSWERS = 64
"""First bytes that came with a version, and were not used yet; some 256 KiB each."""


ANSWER_SECONDS = 1.0
"""First bytes that came earlier are asked for again: a source may have changed its file under the
same validator, and they would be joined with the rest of another one."""

LOCATED_SECONDS = 600.0
"""For so long files are looked for where the source said: signed places expire."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked last for a key, and what its source told of it; None where it is to be asked."""

    ref: AdapterRef
    located: Located | None
    since: float


class Known:
    """The answers of sources, by what was asked and by key.

    `seconds` they count for; `clock` in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._keys: OrderedDict[AdapterRef, tuple[RemoteKey, float]] = OrderedDict()
        self._origins: OrderedDict[RemoteKey, Origin] = OrderedDict()
        self._answered: OrderedDict[RemoteKey, None] = OrderedDict()

    def recent(self, ref: AdapterRef) -> RemoteKey | None:
        """What it was a moment ago."""
        key, since = self._keys.get(ref, (None, 0.0))
        if key is None or self._clock() - since >= self._seconds:
            return None
        self._asked(ref, key)
        return key

    def remember(self, ref: AdapterRef, key: RemoteKey, located: Located | None) -> None:
        """`ref` is `key` now: its source says so, or the cache, where nobody had to be asked."""
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
        """Who asked last is in whose name it is fetched; False if nothing is known of the key.

        With another's token it might be refused, and held against another's digest.
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
        """First bytes that came with it were used, or are too many: it is located anew."""
        if key in self._answered:
            del self._answered[key]
            self._origins[key] = replace(self._origins[key], located=None)
