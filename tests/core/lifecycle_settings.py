"""The worlds that are explored: each has what it takes to reach one corner of the rules."""

from __future__ import annotations

from dataclasses import replace

from core.lifecycle_world import MIN_RESIDENCY, Setting
from lorax_async.core.waiters import Tier

DEVICE = (Tier.DEVICE, True)
STREAM = (Tier.STREAM, True)
HOST = (Tier.HOST, True)
DISK = (Tier.DISK, True)
PREFETCH = (Tier.DEVICE, False)
PREFETCH_HOST = (Tier.HOST, False)
PREFETCH_DISK = (Tier.DISK, False)
UNEVEN = ((64, 64), (64,))
SMALL = ((64,), (64,))
ONE = ((64, 64),)
BOTH = (0, 1)
THREE = ((64,), (64,), (64,))


def _quiet(world: Setting) -> Setting:
    """Files come whole, and neither kernels nor close are looked at."""
    return replace(world, streaming=False, kernels=False, closing=False)


def _apart(worlds: dict[str, Setting]) -> dict[str, Setting]:
    """Each twice: where callers give up and nothing fails, and the other way round."""
    callers = {f"{name}, no failure": replace(it, failures=False) for name, it in worlds.items()}
    faults = {f"{name}, all wait": replace(it, withdrawals=False) for name, it in worlds.items()}
    return callers | faults


WHOLE = {
    "prefetch beside foreground": _quiet(Setting((DEVICE, PREFETCH), sizes=SMALL)),
    "two adapters, streaming leases": Setting((STREAM,), sizes=UNEVEN, kernels=False),
    "two adapters, one slot": Setting((DEVICE,), sizes=UNEVEN),
    "an image between two slots": Setting(
        (DEVICE,), sizes=SMALL, slots=2, image_bytes=64, streaming=False, kernels=False
    ),
}
"""Explored in whole by `make soak`."""

SETTINGS = {
    **_apart(WHOLE),
    "little is remembered": Setting((DEVICE,), sizes=UNEVEN, streaming=False, max_idle=0),
    "populated and forgotten": Setting((HOST, DISK), sizes=SMALL, streaming=False, max_idle=0),
    "forgotten on demand": Setting(
        (DEVICE, HOST), sizes=ONE, host_bytes=128, holdable=(0,), unloads=1, forgets=True
    ),
    "one copy at a time": Setting((DEVICE,), sizes=UNEVEN, copies=1, streaming=False),
    "two slots, bytes for one": Setting((DEVICE,), sizes=UNEVEN, slots=2, streaming=False),
    "host and disk tiers": Setting((HOST, DISK, DEVICE), sizes=ONE, kernels=False),
    "lookups and ageing": Setting(
        (DEVICE,), sizes=UNEVEN, streaming=False, lookups=True, ageing=True, leases=2
    ),
    "too large": Setting(
        (DEVICE, HOST), sizes=UNEVEN, device_bytes=64, streaming=False, withdrawals=False
    ),
    "whole and streaming wishes": Setting(
        (DEVICE, STREAM),
        sizes=UNEVEN,
        withdrawals=False,
        streaming=False,
        kernels=False,
        closing=False,
    ),
    "pins": Setting((DEVICE,), sizes=SMALL, streaming=False, kernels=False, pins=2),
    "pins and streams": Setting((STREAM,), sizes=SMALL, kernels=False, closing=False, pins=1),
    "pins and ageing": Setting(
        (DEVICE,),
        sizes=SMALL,
        streaming=False,
        kernels=False,
        failures=False,
        pins=1,
        ageing=True,
        leases=2,
    ),
    "pins beside a second slot": Setting(
        (DEVICE,), sizes=UNEVEN, slots=2, streaming=False, kernels=False, pins=1, failures=False
    ),
    "pins of one of three": _quiet(
        Setting((DEVICE,), sizes=THREE, slots=2, pins=1, failures=False, withdrawals=False)
    ),
    "pins and unload": Setting(
        (DEVICE,), sizes=SMALL, streaming=False, kernels=False, pins=1, unloads=1, failures=False
    ),
    "unload beside streams": Setting(
        (DEVICE, STREAM), sizes=ONE, unloads=2, clones=True, kernels=False, max_idle=0
    ),
    "unload beside loads": Setting((DEVICE,), sizes=SMALL, streaming=False, unloads=1),
    "host memory for one of two": _quiet(
        Setting(
            (PREFETCH_HOST, DEVICE), sizes=SMALL, host_bytes=64, holdable=BOTH, withdrawals=False
        )
    ),
    "host memory and unload": Setting(
        (HOST, DEVICE), sizes=ONE, host_bytes=128, holdable=BOTH, streaming=False, unloads=1
    ),
    "some can be held": _quiet(
        Setting(
            (HOST,),
            sizes=THREE,
            host_bytes=64,
            holdable=BOTH,
            unloads=1,
            failures=False,
            withdrawals=False,
        )
    ),
    "no host memory": _quiet(
        Setting((PREFETCH_HOST, DEVICE), sizes=SMALL, host_bytes=0, holdable=BOTH)
    ),
    "prefetch targets": Setting(
        (DEVICE, PREFETCH, PREFETCH_HOST, PREFETCH_DISK),
        sizes=((64,),),
        host_bytes=64,
        holdable=BOTH,
        kernels=False,
        unloads=1,
    ),
    "images for one of two": Setting(
        (DEVICE,), sizes=SMALL, image_bytes=64, streaming=False, kernels=False, max_idle=1
    ),
    "images of two": Setting(
        (DEVICE,), sizes=UNEVEN, image_bytes=192, streaming=False, kernels=False, failures=False
    ),
    "images, unload and failures": Setting(
        (DEVICE, PREFETCH_HOST),
        sizes=ONE,
        image_bytes=128,
        unloads=1,
        streaming=False,
        kernels=False,
    ),
    "minimum residency and starving": Setting(
        (DEVICE,),
        sizes=SMALL,
        min_residency=MIN_RESIDENCY,
        streaming=False,
        kernels=False,
        leases=2,
    ),
    "least often used": _quiet(
        Setting((DEVICE,), sizes=SMALL, policy="lfu", failures=False, withdrawals=False)
    ),
    "cheapest to have back": _quiet(
        Setting(
            (DEVICE,),
            sizes=UNEVEN,
            policy="gdsf",
            image_bytes=128,
            host_bytes=128,
            holdable=BOTH,
            failures=False,
        )
    ),
    "minimum residency": _quiet(
        Setting(
            (DEVICE, PREFETCH),
            sizes=SMALL,
            min_residency=MIN_RESIDENCY,
            failures=False,
            withdrawals=False,
        )
    ),
}
LARGER = {
    **WHOLE,
    "streaming and whole": Setting((DEVICE, STREAM), sizes=SMALL),
    "streaming and kernels": Setting((STREAM,), sizes=UNEVEN),
    "prefetch": Setting((DEVICE, PREFETCH), sizes=UNEVEN, kernels=False, closing=False),
    "three adapters": _quiet(Setting((DEVICE,), sizes=THREE, ageing=True)),
    "pins and unload of three": _quiet(
        Setting(
            (DEVICE,),
            sizes=THREE,
            slots=2,
            pins=1,
            unloads=1,
            failures=False,
            withdrawals=False,
        )
    ),
    "unload beside streams and kernels": Setting(
        (DEVICE, STREAM), sizes=ONE, unloads=2, clones=True, max_idle=0
    ),
    "every tier of two": _quiet(
        Setting(
            (DEVICE, PREFETCH_HOST),
            sizes=SMALL,
            host_bytes=64,
            image_bytes=64,
            holdable=BOTH,
            unloads=1,
            failures=False,
            withdrawals=False,
        )
    ),
    "minimum residency and prefetch": _quiet(
        Setting((DEVICE, PREFETCH), sizes=SMALL, min_residency=MIN_RESIDENCY, pins=1)
    ),
    "least often used, and host memory": _quiet(
        Setting(
            (DEVICE, PREFETCH_HOST),
            sizes=SMALL,
            policy="lfu",
            host_bytes=64,
            holdable=BOTH,
            failures=False,
            withdrawals=False,
        )
    ),
}
