"""A world around the real lifecycle in which everything that can happen is one of `actions`.

The world plays driver, device and callers: it holds what is in flight and judges every command. It
is small enough to be explored exhaustively, which `explore` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_async.adapter import AdapterKey
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.residency import Residency
from lorax_async.core.waiters import Tier

AGE = 10.0
Action = tuple[object, ...]


class Violation(AssertionError):
    """The lifecycle did something that must never happen."""


@dataclass(frozen=True)
class Setting:
    """What may happen in a world; each wish is (tier, foreground)."""

    wishes: tuple[tuple[Tier, bool], ...]
    sizes: tuple[tuple[int, ...], ...] = ((64, 64), (64, 64))
    slots: int = 1
    device_bytes: int = 128
    copies: int = 2
    streaming: bool = True
    kernels: bool = True
    lookups: bool = False
    ageing: bool = False
    leases: int = 1
    closing: bool = True
    max_idle: int = 10


@dataclass
class World:
    setting: Setting
    lifecycle: Lifecycle
    now: float = 0.0
    fetches: dict[int, tuple[bool, frozenset[int], bool]] = field(default_factory=dict)
    """By adapter: header told, groups told, cancelled."""
    populating: set[int] = field(default_factory=set)
    copies: set[tuple[int, int]] = field(default_factory=set)
    on_device: dict[int, frozenset[int]] = field(default_factory=dict)
    readable: dict[int, frozenset[int]] = field(default_factory=dict)
    holder: dict[int, int] = field(default_factory=dict)
    """Slot index → adapter, from TakeSlot to ClearColumn."""
    idle_leases: list[int] = field(default_factory=list)
    busy_leases: list[int] = field(default_factory=list)
    orphan_uses: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    waiting: dict[int, tuple[int, Tier, bool]] = field(default_factory=dict)
    """Waiter id → adapter, tier, foreground."""
    next_waiter: int = 0
    closed: bool = False


def keys(setting: Setting) -> list[AdapterKey]:
    return [AdapterKey(name, ()) for name in "abc"[: len(setting.sizes)]]


def new_world(setting: Setting) -> World:
    residency = Residency(
        device_bytes=setting.device_bytes,
        alignment=64,
        max_slots=setting.slots,
        copies=setting.copies,
    )
    return World(setting, Lifecycle(residency, starvation_age=AGE, max_idle=setting.max_idle))
