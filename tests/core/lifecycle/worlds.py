"""The small worlds that are explored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from core.lifecycle.world import MIN_RESIDENCY, Setting
from lorax_async.core.waiters import Tier

DEVICE, STREAM = (Tier.DEVICE, True), (Tier.STREAM, True)
HOST, DISK = (Tier.HOST, True), (Tier.DISK, True)
PREFETCH, PREFETCH_HOST, PREFETCH_DISK = (
    (Tier.DEVICE, False),
    (Tier.HOST, False),
    (Tier.DISK, False),
)
UNEVEN = ((64, 64), (64,))
SMALL = ((64,), (64,))
ONE = ((64, 64),)
THREE = ((64,), (64,), (64,))
BOTH = (0, 1)
QUIET = "streaming kernels closing"
"""Files come whole, and neither kernels nor close are looked at."""
ALONE = f"failures withdrawals {QUIET}"
HOSTED: dict[str, Any] = {"host_bytes": 64, "holdable": BOTH}
RESIDENT: dict[str, Any] = {"min_residency": MIN_RESIDENCY}


def _world(
    *wishes: tuple[Tier, bool], sizes: tuple[tuple[int, ...], ...], without: str = "", **more: Any
) -> Setting:
    flags: dict[str, Any] = dict.fromkeys(without.split(), False)
    return Setting(wishes, sizes, **flags, **more)


WHOLE = {
    "prefetch beside foreground": _world(DEVICE, PREFETCH, sizes=SMALL, without=QUIET),
    "two adapters, streaming leases": _world(STREAM, sizes=UNEVEN, without="kernels"),
    "two adapters, one slot": _world(DEVICE, sizes=UNEVEN),
    "an image between two slots": _world(
        DEVICE, sizes=SMALL, slots=2, image_bytes=64, without="streaming kernels"
    ),
}
"""Explored in whole by `make soak`."""

# Each twice: where callers give up and nothing fails, and the other way round.
_CALLERS = {f"{name}, no failure": replace(it, failures=False) for name, it in WHOLE.items()}
_FAULTS = {f"{name}, all wait": replace(it, withdrawals=False) for name, it in WHOLE.items()}

SETTINGS = {
    **_CALLERS,
    **_FAULTS,
    "little is remembered": _world(DEVICE, sizes=UNEVEN, max_idle=0, without="streaming"),
    "populated and forgotten": _world(HOST, DISK, sizes=SMALL, max_idle=0, without="streaming"),
    "forgotten on demand": _world(
        DEVICE, HOST, sizes=ONE, host_bytes=128, holdable=(0,), unloads=1, forgets=True
    ),
    "one copy at a time": _world(DEVICE, sizes=UNEVEN, copies=1, without="streaming"),
    "two slots, bytes for one": _world(DEVICE, sizes=UNEVEN, slots=2, without="streaming"),
    "host and disk tiers": _world(HOST, DISK, DEVICE, sizes=ONE, without="kernels"),
    "lookups and ageing": _world(
        DEVICE, sizes=UNEVEN, lookups=True, ageing=True, leases=2, without="streaming"
    ),
    "too large": _world(
        DEVICE, HOST, sizes=UNEVEN, device_bytes=64, without="streaming withdrawals"
    ),
    "whole and streaming wishes": _world(
        DEVICE, STREAM, sizes=UNEVEN, without=f"withdrawals {QUIET}"
    ),
    "pins": _world(DEVICE, sizes=SMALL, pins=2, without="streaming kernels"),
    "pins and streams": _world(STREAM, sizes=SMALL, pins=1, without="kernels closing"),
    "pins and ageing": _world(
        DEVICE, sizes=SMALL, pins=1, ageing=True, leases=2, without="streaming kernels failures"
    ),
    "pins beside a second slot": _world(
        DEVICE, sizes=UNEVEN, slots=2, pins=1, without="streaming kernels failures"
    ),
    "pins of one of three": _world(DEVICE, sizes=THREE, slots=2, pins=1, without=ALONE),
    "pins and unload": _world(
        DEVICE, sizes=SMALL, pins=1, unloads=1, without="streaming kernels failures"
    ),
    "unload beside streams": _world(
        DEVICE, STREAM, sizes=ONE, unloads=2, clones=True, max_idle=0, without="kernels"
    ),
    "unload beside loads": _world(DEVICE, sizes=SMALL, unloads=1, without="streaming"),
    "host memory for one of two": _world(
        PREFETCH_HOST, DEVICE, sizes=SMALL, without=f"withdrawals {QUIET}", **HOSTED
    ),
    "host memory and unload": _world(
        HOST, DEVICE, sizes=ONE, host_bytes=128, holdable=BOTH, unloads=1, without="streaming"
    ),
    "some can be held": _world(HOST, sizes=THREE, unloads=1, without=ALONE, **HOSTED),
    "no host memory": _world(PREFETCH_HOST, DEVICE, sizes=SMALL, holdable=BOTH, without=QUIET),
    "prefetch targets": _world(
        DEVICE,
        PREFETCH,
        PREFETCH_HOST,
        PREFETCH_DISK,
        sizes=((64,),),
        unloads=1,
        without="kernels",
        **HOSTED,
    ),
    "images for one of two": _world(
        DEVICE, sizes=SMALL, image_bytes=64, max_idle=1, without="streaming kernels"
    ),
    "images of two": _world(
        DEVICE, sizes=UNEVEN, image_bytes=192, without="streaming kernels failures"
    ),
    "images, unload and failures": _world(
        DEVICE, PREFETCH_HOST, sizes=ONE, image_bytes=128, unloads=1, without="streaming kernels"
    ),
    "minimum residency and starving": _world(
        DEVICE, sizes=SMALL, leases=2, without="streaming kernels", **RESIDENT
    ),
    "least often used": _world(DEVICE, sizes=SMALL, policy="lfu", without=ALONE),
    "cheapest to have back": _world(
        DEVICE,
        sizes=UNEVEN,
        policy="gdsf",
        image_bytes=128,
        host_bytes=128,
        holdable=BOTH,
        without=f"failures {QUIET}",
    ),
    "minimum residency": _world(DEVICE, PREFETCH, sizes=SMALL, without=ALONE, **RESIDENT),
}

LARGER = {
    **WHOLE,
    "streaming and whole": _world(DEVICE, STREAM, sizes=SMALL),
    "streaming and kernels": _world(STREAM, sizes=UNEVEN),
    "prefetch": _world(DEVICE, PREFETCH, sizes=UNEVEN, without="kernels closing"),
    "three adapters": _world(DEVICE, sizes=THREE, ageing=True, without=QUIET),
    "pins and unload of three": _world(
        DEVICE, sizes=THREE, slots=2, pins=1, unloads=1, without=ALONE
    ),
    "unload beside streams and kernels": _world(
        DEVICE, STREAM, sizes=ONE, unloads=2, clones=True, max_idle=0
    ),
    "every tier of two": _world(
        DEVICE, PREFETCH_HOST, sizes=SMALL, image_bytes=64, unloads=1, without=ALONE, **HOSTED
    ),
    "minimum residency and prefetch": _world(
        DEVICE, PREFETCH, sizes=SMALL, pins=1, without=QUIET, **RESIDENT
    ),
    "least often used, and host memory": _world(
        DEVICE, PREFETCH_HOST, sizes=SMALL, policy="lfu", without=ALONE, **HOSTED
    ),
}
