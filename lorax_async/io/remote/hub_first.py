"""The cache of adapters from the hub, where both our own and the standard one are used."""

from __future__ import annotations

from lorax_async.core.cache_names import CacheKey
from lorax_async.io.cache.ports import Cache, CacheDownload, CacheEntry
from lorax_async.io.disk_cache import Turn
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import HubCache
from lorax_async.io.remote.questions import asked_in

_MAIN = "main"


class HubFirst:
    """The `Cache` that takes what the standard hub cache has, and else what our own has.

    A download goes to the one or the other: to the standard one if that takes it. So no file is
    stored twice. Whoever made `hub` and `disk` closes them.
    """

    def __init__(self, hub: HubCache, disk: Cache) -> None:
        self._hub = hub
        self._disk = disk

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        entry = self._hub.open(key, check=check)
        return self._disk.open(key, check=check) if entry is None else entry

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> CacheEntry | CacheDownload | int:
        entry = self.open(key)
        if entry is not None:
            return entry
        cache: Cache = self._hub if self._hub.takes(scope) else self._disk
        return cache.try_begin(key, scope, alone=alone)

    def begin(self, key: CacheKey, scope: str, demand: Demand) -> CacheEntry | CacheDownload:
        turn = Turn(demand)
        while isinstance(begun := self.try_begin(key, scope, alone=turn.alone), int):
            turn.wait(begun)
        return begun

    def note_version(self, question: str, source: str, version: str) -> None:
        self._disk.note_version(question, source, version)
        asked = asked_in(question)
        if asked is not None and self._hub.takes(asked.scope):
            self._hub.note_revision(source, asked.revision or _MAIN, version)

    def last_version(self, question: str) -> tuple[str, str] | None:
        """What this loader was told last, or else what other tools have noted."""
        found = self._disk.last_version(question)
        asked = asked_in(question)
        if found is not None or asked is None or asked.source not in {"", "hub"}:
            return found
        commit = self._hub.commit_of(asked.text, asked.revision or _MAIN)
        return None if commit is None else (asked.text, commit)

    def condemn(self, key: CacheKey) -> None:
        self._hub.condemn(key)
        self._disk.condemn(key)

    def remove(self, key: CacheKey) -> bool:
        """False also where the standard one has it: that is everybody's."""
        removed = self._disk.remove(key)
        return self._hub.remove(key) and removed

    def used(self) -> int:
        """Of the budget."""
        return self._disk.used()

    def close(self) -> None:
        """Both are their makers'."""
