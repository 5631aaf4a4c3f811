"""Rules of pins and unload broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

from core.lifecycle_broken import Mutant, never, no_commands, nothing
from lorax_async.adapter import AdapterKey
from lorax_async.core import holders
from lorax_async.core.commands import Command, TellUnloaded
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import HostState, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.residency import Residency
from lorax_async.core.settling import Settling
from lorax_async.core.transitions import SlotState


def _pins_may_go(life: Life) -> bool:
    return life.slot is SlotState.RESIDENT and not life.departing


def _blind_to_pins(self: Residency, _: object, sizes: tuple[int, ...]) -> bool:
    return _fits_beside(self, (), sizes)


def _drains_pinned(self: Decisions, life: Life, state: SlotState) -> None:
    self.tell_leaving(life)
    life.slot = state


def _forget_anything(self: Settling, key: AdapterKey) -> list[Command]:
    if key in self.lives:
        self._forget(key)
    return self.decisions.take_commands()


def _pin_anything(self: Lifecycle, key: AdapterKey) -> bool:
    self.lives[key].pins += 1
    return True


def _pin_after_close(self: Lifecycle, key: AdapterKey) -> bool:
    life = self.lives[key]
    if life.departing or life.slot is not SlotState.RESIDENT:
        return False
    life.pins += 1
    return True


def _unload_keeps_pins(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self._settling.life(key)
    life.unloads += 1
    self._decisions.tell_leaving(life)
    return [*self._settling.settle(life)]


def _unload_untold(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self._settling.life(key)
    life.unloads += 1
    life.pins = 0
    return [*self._settling.settle(life)]


def _close_keeps_pins(self: Lifecycle, error: Exception) -> list[object]:
    pins = {key: life.pins for key, life in self.lives.items()}
    answer = _close(self, error)  # type: ignore[arg-type]
    for key, life in self.lives.items():
        life.pins = pins[key]
    return [*answer]


def _unloaded_unless(*kept: str) -> Callable[[Decisions, Life], bool]:
    """Tells that it is unloaded without a look at some of what it may hold."""

    def unloaded(self: Decisions, life: Life) -> bool:
        held = {
            "slot": life.slot is not SlotState.NONE,
            "host": life.host is not HostState.NONE,
            "image": life.image is not None,
        }
        if not life.unloads or any(held[name] for name in held if name not in kept):
            return False
        life.unloads = 0
        self.command(TellUnloaded(life.key))
        return True

    return unloaded


def _unload_never_over(self: Decisions, life: Life) -> bool:
    """The caller is told, and yet nobody may claim it again."""
    over = _unloaded(self, life)
    if over:
        life.unloads = 1
        life.told = True
    return False


def _unload_not_lifted(self: Lifecycle, key: AdapterKey) -> list[object]:
    return [*self._settling.settle(self.lives[key])] if key in self.lives else []


def _unsettled_lift(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self.lives.get(key)
    if life is not None and life.unloads:
        life.unloads -= 1
        if not life.departing:
            self._decisions.tell_stays(life)
    return [*self._decisions.take_commands()]


def _stays_if_resident(self: Decisions, life: Life) -> None:
    if life.slot is SlotState.RESIDENT:
        _tell_stays(self, life)


_evicted = Decisions._evicted
_fits_beside = Residency.fits_beside
_close = Lifecycle.close
_unloaded = Decisions._unloaded
_tell_stays = Decisions.tell_stays

PINS_AND_UNLOAD: dict[str, Mutant] = {
    "the pinned are picked": ("pins of one of three", holders, "may_go", _pins_may_go),
    "the pinned-out wait": ("pins", Residency, "fits_beside", _blind_to_pins),
    "pins survive a drain": ("pins and streams", Decisions, "drain", _drains_pinned),
    "what leaves is pinned": ("pins and ageing", Lifecycle, "pin", _pin_anything),
    "pinned after close": ("pins", Lifecycle, "pin", _pin_after_close),
    "pins survive close": ("pins", Lifecycle, "close", _close_keeps_pins),
    "unpin decides nothing": ("pins", Lifecycle, "unpin", no_commands),
    "pins survive unload": ("pins and unload", Lifecycle, "unload", _unload_keeps_pins),
    "unload is told to nobody": ("unload beside loads", Lifecycle, "unload", _unload_untold),
    "leased while it is unloaded": (
        *("unload beside loads", Life, "departing"),
        property(lambda life: life.leaving),
    ),
    "unloaded under a lease": (
        *("unload beside loads", Decisions, "_unloaded"),
        _unloaded_unless("slot"),
    ),
    "unloaded before its pages": (
        *("host memory and unload", Decisions, "_unloaded"),
        _unloaded_unless("host"),
    ),
    "unloaded before its image": (
        *("images, unload and failures", Decisions, "_host_unwanted"),
        never,
    ),
    "forgets whatever it is": ("forgotten on demand", Settling, "forget", _forget_anything),
    "unload has no end": ("unload beside loads", Decisions, "_unloaded", never),
    "unload strands those who wait": (
        *("unload beside loads", Decisions, "_unloaded"),
        _unload_never_over,
    ),
    "unload cannot be given up": (
        *("unload beside loads", Lifecycle, "withdraw_unload"),
        _unload_not_lifted,
    ),
    "giving up unload decides nothing": (
        *("unload beside streams", Lifecycle, "withdraw_unload"),
        _unsettled_lift,
    ),
    "who stays is not told": ("unload beside loads", Decisions, "tell_stays", nothing),
    "who fills and stays is not told": (
        *("unload beside streams", Decisions, "tell_stays"),
        _stays_if_resident,
    ),
}
