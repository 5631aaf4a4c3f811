"""Ids that the embedding program gave a meaning of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lorax_async.adapter import AdapterKey, AdapterRef


class Names:
    """Which key such an id means. They come before every source.

    A name that was given without a token is the same for every token; with one, for that one only.
    What a caller knows of the bytes, and whether old ones will do, makes no other name.
    """

    def __init__(self) -> None:
        self._keys: dict[AdapterRef, AdapterKey] = {}
        self._uses: Counter[AdapterKey] = Counter()

    def get(self, ref: object) -> AdapterKey | None:
        """None for what has no name here, as everything but an `AdapterRef`."""
        entry = self._entry(ref) if self._keys else None
        return None if entry is None else self._keys[entry]

    def give(self, ref: AdapterRef, key: AdapterKey) -> None:
        """From here on `ref` means `key`."""
        ref = ref.name
        self._end(ref)
        self._keys[ref] = key
        self._uses[key] += 1

    def take_back(self, ref: object, key: AdapterKey) -> None:
        """Let `ref` mean `key` no longer, if it does; for the key itself, let no name mean it."""
        entry = self._entry(ref)
        if entry is not None and self._keys[entry] == key:
            self._end(entry)
        elif ref == key:
            for name in [name for name, meant in self._keys.items() if meant == key]:
                self._end(name)

    def mean(self, key: AdapterKey) -> bool:
        """Whether some name means it."""
        return key in self._uses

    def covers(self, ref: AdapterRef, other: object) -> bool:
        """Whether `other` means, or would mean, what is given to `ref`."""
        if not isinstance(other, AdapterRef):
            return False
        ref, other = ref.name, other.name
        return other == ref or (other not in self._keys and replace(other, token=None) == ref)

    def _entry(self, ref: object) -> AdapterRef | None:
        if not isinstance(ref, AdapterRef):
            return None
        ref = ref.name
        if ref in self._keys or ref.token is None:
            return ref if ref in self._keys else None
        bare = replace(ref, token=None)
        return bare if bare in self._keys else None

    def _end(self, ref: AdapterRef) -> None:
        key = self._keys.pop(ref, None)
        if key is not None:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
