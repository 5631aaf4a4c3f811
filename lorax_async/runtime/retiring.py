"""Versions that their id no longer means: each leaves as soon as nobody holds or wants it."""

from __future__ import annotations

from collections.abc import Callable

from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command
from lorax_async.core.life import HostState, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.transitions import SlotState

Gone = Callable[[AdapterKey], None]
"""Told once the adapter has left device and host memory."""


class Retiring:
    """Unloads them, one by one, when they come to be idle; `obey` carries out what that takes."""

    def __init__(self, lifecycle: Lifecycle, obey: Callable[[list[Command]], None]) -> None:
        self._lifecycle = lifecycle
        self._obey = obey
        self._keys: dict[AdapterKey, Gone] = {}
        self._looking = False

    def begin(self, key: AdapterKey, gone: Gone) -> None:
        """Let it go, now or when its last lease, pin and waiter have gone."""
        self._keys[key] = gone
        self.look()

    def keep(self, key: AdapterKey) -> None:
        """It is wanted again."""
        self._keys.pop(key, None)

    def look(self) -> None:
        """To be called whenever something has changed."""
        if not self._keys or self._looking:
            return
        self._looking = True
        try:
            for key in tuple(self._keys):
                self._settle(key)
        finally:
            self._looking = False

    def _settle(self, key: AdapterKey) -> None:
        life = self._lifecycle.lives.get(key)
        if life is not None and (life.leases or life.pins or life.waiters):
            return
        if life is not None and _takes_memory(life) and not life.unloads:
            self._obey(self._lifecycle.unload(key))
        if life is None or life.is_idle:
            gone = self._keys.pop(key, None)  # what was told of the unload may have kept it
            if gone is not None:
                gone(key)


def _takes_memory(life: Life) -> bool:
    return (
        life.slot is not SlotState.NONE
        or life.host is not HostState.NONE
        or life.image is not None
        or life.demoted
    )
