"""A world around the real lifecycle in which everything that can happen is one of `actions`.

The world plays driver, device and callers: it holds what is in flight and judges every command. It
is small enough to be explored exhaustively, which `explore` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Copy
from lorax_async.core.life import Grant, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.policies import GDSF, LFU, LRU, Policy, PolicyName
from lorax_async.core.residency import HostBudget, ImageBudget, Residency
from lorax_async.core.settling import Budgets, Pace
from lorax_async.core.waiters import Tier

AGE = 10.0
MIN_RESIDENCY = 5.0
ALIGNMENT = 64
Action = tuple[object, ...]


class Violation(AssertionError):
    """The lifecycle did something that must never happen."""


@dataclass(frozen=True)
class Setting:
    """What may happen in a world; each wish is (tier, foreground).

    `holdable` are the adapters that host memory can hold, and not only read ahead. `leases`, `pins` and `unloads` are how many there may be at once of one adapter.
    """

    wishes: tuple[tuple[Tier, bool], ...]
    sizes: tuple[tuple[int, ...], ...] = ((64, 64), (64, 64))
    slots: int = 1
    device_bytes: int = 128
    host_bytes: int = 0
    image_bytes: int = 0
    holdable: tuple[int, ...] = ()
    copies: int = 2
    policy: PolicyName = "lru"
    streaming: bool = True
    kernels: bool = True
    failures: bool = True
    withdrawals: bool = True
    lookups: bool = False
    ageing: bool = False
    min_residency: float = 0.0
    leases: int = 1
    clones: bool = False
    pins: int = 0
    unloads: int = 0
    closing: bool = True
    max_idle: int = 10
    forgets: bool = False

    @property
    def step(self) -> float:
        """Seconds that pass at once: wishes starve after one, or after two residencies."""
        return MIN_RESIDENCY + 1 if self.min_residency else AGE + 1


@dataclass
class World:
    setting: Setting
    lifecycle: Lifecycle
    now: float = 0.0
    fetches: dict[int, tuple[bool, frozenset[int], bool]] = field(default_factory=dict)
    """By adapter: header told, groups told, cancelled."""
    populating: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    """Adapters whose pages are in host memory, from Populated to Released."""
    read_ahead: set[int] = field(default_factory=set)
    """Adapters that were populated where nothing can be held."""
    releasing: set[int] = field(default_factory=set)
    copies: dict[tuple[int, int], Copy] = field(default_factory=dict)
    on_device: dict[int, frozenset[int]] = field(default_factory=dict)
    readable: dict[int, frozenset[int]] = field(default_factory=dict)
    content: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset in the page-locked memory → adapter and group whose bytes lie there in whole."""
    holder: dict[int, Grant] = field(default_factory=dict)
    """Adapter → grant, from TakeSlot to ClearColumn."""
    dirty: dict[int, Grant] = field(default_factory=dict)
    """Adapter → grant that broke, until it was zeroed."""
    wiping: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    """Adapters that were told to be leaving."""
    resident_at: dict[int, float] = field(default_factory=dict)
    idle_leases: list[int] = field(default_factory=list)
    busy_leases: list[int] = field(default_factory=list)
    orphan_uses: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    pins: dict[int, int] = field(default_factory=dict)
    unloads: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, tuple[int, Tier, bool]] = field(default_factory=dict)
    """Waiter id → adapter, tier, foreground."""
    since: dict[int, float] = field(default_factory=dict)
    """Of those who wait."""
    next_waiter: int = 0
    closed: bool = False

    @property
    def in_use(self) -> list[int]:
        """Adapters, once for each lease and each kernel that outlived its lease."""
        return self.idle_leases + self.busy_leases + self.orphan_uses

    def is_complete(self, a: int) -> bool:
        return self.on_device.get(a) == frozenset(range(len(self.setting.sizes[a])))

    def life(self, a: int) -> Life:
        return self.lifecycle.lives[keys(self.setting)[a]]


POLICIES: dict[PolicyName, Callable[[], Policy]] = {
    "lru": LRU,
    "lfu": lambda: LFU(half_life=3),
    "gdsf": lambda: GDSF(most_uses=2),
}
"""As they are, but that they forget soon: what they remember must be finite, and small."""

_KEYS = tuple(AdapterKey(name, ()) for name in "abc")


def keys(setting: Setting) -> tuple[AdapterKey, ...]:
    return _KEYS[: len(setting.sizes)]


def new_world(setting: Setting) -> World:
    new_policy = POLICIES[setting.policy]
    device = Residency(
        device_bytes=setting.device_bytes,
        alignment=ALIGNMENT,
        max_slots=setting.slots,
        copies=setting.copies,
        policy=new_policy(),
    )
    host = HostBudget(setting.host_bytes, new_policy())
    images = ImageBudget(setting.image_bytes, ALIGNMENT, new_policy())
    return World(setting, Lifecycle(Budgets(device, host, images), pace(setting)))


def pace(setting: Setting) -> Pace:
    return Pace(starvation_age=AGE, min_residency=setting.min_residency, max_idle=setting.max_idle)


def forget_content(world: World, a: int) -> None:
    """What lies in page-locked memory of this adapter must not be used again."""
    for offset in [offset for offset, (owner, _) in world.content.items() if owner == a]:
        del world.content[offset]
