"""Every step that users, sources and devices can take, and plans of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

import tiny
from contention.adapters import IDS
from contention.world import TOLD, Holder, Scene, World
from lorax_async import FetchError, IntegrityError, TransferError
from lorax_async.testing import Step as SourceStep

Tier = Literal["disk", "host", "device"]


class Users:
    """What those who call the loader do; on its loop."""

    def __init__(self, world: World) -> None:
        self.world = world

    def load(self, id: str, priority: int, timeout: float | None) -> None:
        self.world.want(self.world.load(id, priority, timeout))

    def stream(self, id: str, priority: int) -> None:
        self.world.want(self.world.stream(id, priority))

    def try_acquire(self, id: str) -> None:
        handle = self.world.loader.try_acquire(id)
        if handle is not None:
            self.world.blame(handle.resident, "an adapter was leased before it was there")
            self.world.hold(handle)

    def prefetch(self, wanted: list[str], tier: Tier, priority: int) -> None:
        hint = self.world.loader.prefetch(wanted, tier=tier, priority=priority)
        self.world.prefetches.append(hint)

    def cancel_prefetch(self, which: int) -> None:
        if self.world.prefetches:
            self.world.prefetches[which % len(self.world.prefetches)].cancel()

    def pin(self, id: str) -> None:
        self.world.pinned = True
        self.world.want(self.world.loader.pin(id))

    def unpin(self, id: str) -> None:
        self.world.loader.unpin(id)

    def unload(self, id: str, timeout: float | None) -> None:
        self.world.hurried = self.world.hurried or timeout is not None
        self.world.want(self.world.loader.unload(id, timeout=timeout))

    def clone(self, which: int) -> None:
        holder = self._holder(which)
        if holder is not None:
            with suppress(IntegrityError, TransferError, FetchError):  # a stay that failed
                self.world.hold(holder.handle.clone())

    def release(self, which: int) -> None:
        holder = self._holder(which)
        if holder is not None:
            self.world.release(holder)

    def cancel(self, which: int) -> None:
        waiting = [task for task in self.world.wants if not task.done()]
        if waiting:
            waiting[which % len(waiting)].cancel()

    def start_kernel(self, which: int, stream: int, layer: int, at_once: bool) -> None:
        holder = self._holder(-1 if at_once else which)  # the latest may not be there yet
        if holder is not None:
            kernel = self.world.start_kernel(holder.handle, self.world.streams[stream], layer)
            if at_once and kernel is not None:
                kernel.go.set()

    def finish_kernel(self, which: int) -> None:
        kernels = self.world.kernels
        if kernels:
            kernels.pop(which % len(kernels)).go.set()

    def _holder(self, which: int) -> Holder | None:
        holders = self.world.holders
        return holders[which % len(holders)] if holders else None


class Steps(Users):
    """And what source and device are told to do."""

    def nothing(self) -> None: ...

    def hold_source(self, id: str) -> None:
        self.world.source.hold(id)

    def allow_source(self, id: str, group: int | None) -> None:
        self.world.source.allow(id, *([] if group is None else [group]))

    def fail_source(self, id: str, step: SourceStep, group: int) -> None:
        at = 4096 * group if step == "read" else group if step == "bring" else 0
        self.world.source.fail(step, FetchError(f"the source was {TOLD}"), id=id, at=at)

    def replace(self, id: str) -> None:
        self.world.source.replace(id)

    def shut_the_gate(self) -> None:
        self.world.device.simulated.gate.clear()

    def open_the_gate(self) -> None:
        self.world.device.simulated.gate.set()

    def fail_a_copy(self, later: int) -> None:
        device = self.world.device.simulated
        device.failing.add(device.copies + later)

    def delay_copies(self, seconds: float) -> None:
        self.world.device.simulated.delay = seconds

    async def let_time_pass(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)


@dataclass(frozen=True, slots=True)
class Step:
    """One method of `Steps`, with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    async def take(self, steps: Steps) -> None:
        waiting = getattr(steps, self.name)(**self.arguments)
        if waiting is not None:
            await waiting

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


Strategies = Mapping[str, st.SearchStrategy[Any]]

_id: Strategies = {"id": st.sampled_from(IDS)}
_which: Strategies = {"which": st.integers(0, 7)}
"""One of those that there are, whose number depends on the threads."""
_priority: Strategies = {"priority": st.integers(0, 2)}
_layers = st.integers(0, tiny.LAYERS - 1)
_in_time = st.sampled_from([None, None, None, 0.003])

ARGUMENTS: Mapping[str, Strategies] = {
    "nothing": {},
    "load": {**_id, **_priority, "timeout": _in_time},
    "stream": {**_id, **_priority},
    "try_acquire": _id,
    "prefetch": {
        "wanted": st.lists(st.sampled_from(IDS), min_size=1, max_size=3),
        "tier": st.sampled_from(["disk", "host", "device"]),
        **_priority,
    },
    "cancel_prefetch": _which,
    "pin": _id,
    "unpin": _id,
    "unload": {**_id, "timeout": _in_time},
    "clone": _which,
    "release": _which,
    "cancel": _which,
    "start_kernel": {
        **_which,
        "stream": st.integers(0, 1),
        "layer": _layers,
        "at_once": st.booleans(),
    },
    "finish_kernel": _which,
    "hold_source": _id,
    "allow_source": {**_id, "group": st.none() | _layers},
    "fail_source": {
        **_id,
        "step": st.sampled_from(["resolve", "open", "bring", "verify", "read", "populate"]),
        "group": _layers,
    },
    "replace": _id,
    "shut_the_gate": {},
    "open_the_gate": {},
    "fail_a_copy": {"later": st.integers(0, 5)},
    "delay_copies": {"seconds": st.sampled_from([0.0, 0.001])},
    "let_time_pass": {"milliseconds": st.integers(1, 8)},
}
OFTEN = (
    *("load", "load", "stream", "stream", "release"),
    *("start_kernel", "start_kernel", "finish_kernel", "let_time_pass", "delay_copies"),
)


def _step(name: str) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(name), st.fixed_dictionaries(dict(ARGUMENTS[name])))


_STEPS = {name: _step(name) for name in ARGUMENTS}
_OFTEN = [_step(name) for name in OFTEN]  # a strategy that stands there twice counts once


def _of_kinds(kinds: list[str]) -> st.SearchStrategy[list[Step]]:
    several = st.one_of(_STEPS["nothing"], *(_STEPS[name] for name in kinds), *_OFTEN)
    return st.lists(several, min_size=25, max_size=70)


plans = st.lists(st.sampled_from(sorted(ARGUMENTS)), min_size=3, max_size=12).flatmap(_of_kinds)
"""Each of some kinds of steps only, beside the common ones: what is everywhere hides the rest."""

scenes = st.builds(
    Scene,
    loop=st.sampled_from(["asyncio", "uvloop"]),
    rude=st.booleans(),
    slots=st.sampled_from([2, 3]),
    images=st.booleans(),
    staging_bytes=st.sampled_from([4096, 16384]),
    starvation_age=st.sampled_from([5.0, 0.01]),
    min_residency=st.sampled_from([0.0, 0.005]),
    eviction=st.sampled_from(["lru", "lfu", "gdsf"]),
)
