"""Many adapters compete for slots in any order: bytes, slots, leases and budgets, judged from outside."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from secrets import randbits
from typing import Any, ClassVar, TypeVar

import contention_observer as observer
import pytest
import tiny
from contention_observer import IDS, LARGEST, LAYOUT, QUICK, Made, ObservedDevice, complaints, made
from event_loops import LOOPS
from hypothesis import Phase, example, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from leaks import mapped_files, our_threads

from lorax_async import AdapterHandle, AdapterKey, LoaderConfig, Prefetch, SlotId, errors
from lorax_async.devices import transfer
from lorax_async.devices.simulated import SimulatedDevice, SimulatedStream
from lorax_async.errors import FetchError, IntegrityError, TransferError
from lorax_async.lifecycle.adapter_state import AdapterState
from lorax_async.lifecycle.rules import LifecycleRules
from lorax_async.loader import AdapterLoader
from lorax_async.runtime import host_tier
from lorax_async.runtime.host_tier import HostTier, MappedFile
from lorax_async.runtime.placement import TierName
from lorax_async.testing import FakeSource
from lorax_async.testing import Step as SourceStep

DEVICE_BYTES = LARGEST * 16 // 9
"""Room for the largest and one of rank 16, not for two of the largest."""
HOST_BYTES = observer.LARGEST_FILE * 4 // 3
SCENE_SETTINGS = ("pinned_bytes", "staging_bytes", "starvation_age", "min_residency", "eviction")
"""They have the same names in the loader's config."""
TOLD = "told to fail"  # In the errors that are ordered


@dataclass(frozen=True, slots=True)
class Scene:
    """Settings that one example plays in; `rude` closes while everything is under way."""

    loop: str = "asyncio"
    rude: bool = False
    slots: int = 2
    images: bool = False
    staging_bytes: int = 4096
    starvation_age: float = 5.0
    min_residency: float = 0.0
    eviction: Any = "lru"

    @property
    def pinned_bytes(self) -> int:
        return LARGEST * 10 // 9 if self.images else 0

    @property
    def config(self) -> LoaderConfig:
        sizes: dict[str, Any] = {"device_bytes": DEVICE_BYTES, "host_bytes": HOST_BYTES}
        sizes |= {name: getattr(self, name) for name in SCENE_SETTINGS}
        return LoaderConfig(**sizes, max_slots=self.slots, io_threads=2, timeout=60)


class Stock(FakeSource):
    """Adapters in versions."""

    def __init__(self) -> None:
        super().__init__(holdable=True)
        self.versions: dict[AdapterKey, Made] = {}
        self.latest = dict.fromkeys(IDS, -1)
        for id in IDS:
            self.replace(id)

    def replace(self, id: str) -> None:
        self.latest[id] += 1
        files = made(id, self.latest[id])
        self.versions[self.put(id, files.config, files.content)] = files


class CountedMap(MappedFile):
    """A map whose bytes are counted until it is closed."""

    sizes: ClassVar[dict[int, int]] = {}

    def __init__(self, fd: int, nbytes: int, name: str) -> None:
        super().__init__(fd, nbytes, name)
        self.sizes[id(self)] = nbytes

    def close(self) -> None:
        super().close()
        self.sizes.pop(id(self), None)


@pytest.fixture(autouse=True)
def count_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    CountedMap.sizes.clear()
    monkeypatch.setattr(host_tier, "MappedFile", CountedMap)


@dataclass(slots=True, eq=False)
class Holder:
    """Somebody with a lease; `gone` is set when it is given back."""

    handle: AdapterHandle
    gone: asyncio.Event = field(default_factory=asyncio.Event)


T = TypeVar("T")


def _any(things: Sequence[T], which: int) -> Sequence[T]:
    """One of those that there are, whose number depends on the threads; or none."""
    return [things[which % len(things)]] if things else []


class World:
    """Everything of one example. Methods are called on its loop; those in `STEPS` by a plan."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.source = Stock()
        self.device = ObservedDevice(
            nbytes=DEVICE_BYTES,
            slots=scene.slots,
            budgets=[size for size in (scene.staging_bytes, scene.pinned_bytes) if size],
            expected=lambda key: self.source.versions[key].weights,
            leased=self._is_leased,
        )
        self.blame = self.device.blame
        self.streams: list[SimulatedStream | None] = [None, self.device.stream("more")]
        self.loader = AdapterLoader(LAYOUT, scene.config, source=self.source, device=self.device)
        self.holders: list[Holder] = []
        self.wants: list[asyncio.Task[None]] = []
        self.prefetches: list[Prefetch] = []
        self.kernels: list[observer.Kernel] = []
        self.pinned = self.hurried = self.closing = False
        """Whether anybody ever pinned, had a short timeout, closed."""

    def _is_leased(self, slot: SlotId) -> bool:
        return not self.closing and any(each.handle.slot == slot for each in self.holders)

    def want(self, pending_load: Coroutine[Any, Any, None]) -> None:
        self.wants.append(asyncio.create_task(self._wanting(pending_load)))

    async def _wanting(self, pending_load: Coroutine[Any, Any, None]) -> None:
        """What comes of it is what was provoked."""
        try:
            await pending_load
        except errors.LoraxError as error:
            self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")

    def is_provoked(self, error: Exception) -> bool:
        """Whether this play may have led to it. `CancelledError` is no `Exception`."""
        match error:
            case errors.LoaderClosedError():
                return self.closing
            case errors.CapacityError():
                return self.pinned
            case errors.IntegrityError():
                return max(self.source.latest.values()) > 0
            case errors.TransferError() | errors.FetchError():
                return TOLD in str(error)
            case errors.AdapterTimeoutError() | errors.AdapterInUseError():
                return self.hurried
        return False

    def hold(self, handle: AdapterHandle) -> Holder:
        self.holders.append(Holder(handle))
        return self.holders[-1]

    def nothing(self) -> None:
        pass

    def load(self, id: str, priority: int, timeout: float | None) -> None:
        async def load() -> None:
            self.hold(await self.loader.load(id, priority=priority, timeout=timeout))

        self.hurried = self.hurried or timeout is not None
        self.want(load())

    def stream(self, id: str, priority: int) -> None:
        self.want(self._stream(id, priority))

    async def _stream(self, id: str, priority: int) -> None:
        async with self.loader.stream(id, priority=priority) as handle:
            holder = self.hold(handle)
            try:
                for layer in handle.layers:
                    await handle.layer_ready(layer)
                await holder.gone.wait()
            except errors.HandleClosedError:
                self.blame(holder.gone.is_set() or self.closing, "a handle was closed by nobody")
            finally:
                if holder in self.holders:
                    self.holders.remove(holder)

    def try_acquire(self, id: str) -> None:
        handle = self.loader.try_acquire(id)
        if handle is not None:
            self.blame(handle.resident, "an adapter was leased before it was there")
            self.hold(handle)

    def prefetch(self, ids: list[str], tier: TierName, priority: int) -> None:
        self.prefetches.append(self.loader.prefetch(ids, tier=tier, priority=priority))

    def cancel_prefetch(self, which: int) -> None:
        for hint in _any(self.prefetches, which):
            hint.cancel()

    def pin(self, id: str) -> None:
        self.pinned = True
        self.want(self.loader.pin(id))

    def unpin(self, id: str) -> None:
        self.loader.unpin(id)

    def unload(self, id: str, timeout: float | None) -> None:
        self.hurried = self.hurried or timeout is not None
        self.want(self.loader.unload(id, timeout=timeout))

    def clone(self, which: int) -> None:
        for holder in _any(self.holders, which):
            with suppress(IntegrityError, TransferError, FetchError):  # a stay that failed
                self.hold(holder.handle.clone())

    def release(self, which: int) -> None:
        for holder in _any(self.holders, which):
            self.holders.remove(holder)
            holder.gone.set()
            holder.handle.release()

    def release_all(self) -> None:
        while self.holders:
            self.release(0)

    def cancel(self, which: int) -> None:
        for task in _any([task for task in self.wants if not task.done()], which):
            task.cancel()

    def start_kernel(self, which: int, stream: int, layer: int, at_once: bool) -> None:
        """It reads the layers up to this one, if all their copies were asked for."""
        # At once: the latest, which may not be there yet.
        for holder in _any(self.holders, -1 if at_once else which):
            handle, queue = holder.handle, self.streams[stream]
            try:
                with handle.use(queue):
                    if handle.queue_behind(layer, queue):
                        kernel = self.device.kernel(handle.slot, layer)
                        self.kernels.append(kernel)
                        (queue or self.device.compute).run(kernel)
                        if at_once:
                            kernel.go.set()
            except errors.LoraxError as error:  # the load failed meanwhile
                self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")

    def finish_kernel(self, which: int) -> None:
        for kernel in _any(self.kernels, which):
            self.kernels.remove(kernel)
            kernel.go.set()

    def hold_source(self, id: str) -> None:
        self.source.hold(id)

    def allow_source(self, id: str, groups: list[int]) -> None:
        self.source.allow(id, *groups)

    def fail_source(self, id: str, step: SourceStep, layer: int) -> None:
        at = 4096 * layer if step == "read" else layer if step == "fetch_groups" else 0
        self.source.fail(step, FetchError(f"the source was {TOLD}"), id=id, at=at)

    def replace(self, id: str) -> None:
        self.source.replace(id)

    def shut_the_gate(self) -> None:
        self.device.gate.clear()

    def open_the_gate(self) -> None:
        self.device.gate.set()

    def fail_a_copy(self, later: int) -> None:
        self.device.failing.add(self.device.copies + later)

    def delay_copies(self, seconds: float) -> None:
        self.device.delay = seconds

    async def let_time_pass(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)

    def check(self) -> None:
        """Between two turns of the loop."""
        for stay in tuple(self.device.stays.values()):
            if stay.resident and not stay.over:
                self.device.check_weights(stay)
        for holder in self.holders:
            self._check_handle(holder.handle)
        self._check_budgets()

    def _check_handle(self, handle: AdapterHandle) -> None:
        """Who holds it can read the layers that are ready, also of one that is leaving."""
        try:
            modules = handle.modules
        except errors.HandleClosedError:
            return
        except errors.LoraxError as error:  # the load failed meanwhile
            self.blame(self.is_provoked(error), f"{type(error).__name__}: {error}")
            return
        weights = self.source.versions[handle.key].weights
        for number, module in enumerate(LAYOUT.modules):
            if handle.is_ready(module.layer):
                found, (a, b, scale) = modules[module.name], weights[number]
                same = found.a.equal(a[: found.rank]) and found.b.equal(b[:, : found.rank])
                self.blame(same and found.scale == scale, f"a handle of {handle.id} is wrong")

    def _check_budgets(self) -> None:
        held = sum(CountedMap.sizes.values())
        self.blame(held <= HOST_BYTES, f"{held} bytes of files are held")
        where = self.loader.placement().adapters.values()
        on_device = [each for each in where if each.slot is not None]
        self.blame(len(on_device) <= self.scene.slots, "more adapters than slots")
        self.blame(sum(each.device_bytes for each in where) <= DEVICE_BYTES, "device_bytes")
        self.blame(sum(each.host_bytes for each in where) <= HOST_BYTES, "host_bytes")
        pinned = sum(each.pinned_bytes for each in where)
        self.blame(pinned <= self.scene.pinned_bytes, "pinned_bytes")
        told = {each.slot for each in on_device}
        self.blame(told == {stay.slot for stay in self.device.stays.values()}, "residency differs")


_layers = st.integers(0, tiny.LAYERS - 1)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "id": st.sampled_from(IDS),
    "ids": st.lists(st.sampled_from(IDS), min_size=1, max_size=3),
    "which": st.integers(0, 7),
    "priority": st.integers(0, 2),
    "timeout": st.sampled_from([None, None, None, 0.003]),
    "tier": st.sampled_from(["disk", "host", "device"]),
    "stream": st.integers(0, 1),
    "layer": _layers,
    "groups": st.lists(_layers, max_size=1),
    "at_once": st.booleans(),
    "step": st.sampled_from(["resolve", "open", "fetch_groups", "verify", "read"]),
    "later": st.integers(0, 5),
    "seconds": st.sampled_from([0.0, 0.001]),
    "milliseconds": st.integers(1, 8),
}
"""Of every step that has one of this name."""
STEPS = (
    *("nothing", "load", "stream", "try_acquire", "prefetch", "cancel_prefetch", "pin", "unpin"),
    *("unload", "clone", "release", "cancel", "start_kernel", "finish_kernel", "hold_source"),
    *("allow_source", "fail_source", "replace", "shut_the_gate", "open_the_gate", "fail_a_copy"),
    *("delay_copies", "let_time_pass"),
)
OFTEN = (
    *("load", "load", "stream", "stream", "release"),
    *("start_kernel", "start_kernel", "finish_kernel", "let_time_pass", "delay_copies"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One of `STEPS`, with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    async def take(self, world: World) -> None:
        waiting = getattr(world, self.name)(**self.arguments)
        if waiting is not None:
            await waiting


def _step(name: str) -> st.SearchStrategy[Step]:
    arguments = [*signature(getattr(World, name)).parameters][1:]
    return st.builds(
        Step, st.just(name), st.fixed_dictionaries({each: ARGUMENTS[each] for each in arguments})
    )


_STEPS = {name: _step(name) for name in STEPS}
_OFTEN = [_step(name) for name in OFTEN]  # a strategy that stands there twice counts once


def _of_kinds(kinds: list[str]) -> st.SearchStrategy[list[Step]]:
    several = st.one_of(_STEPS["nothing"], *(_STEPS[name] for name in kinds), *_OFTEN)
    return st.lists(several, min_size=25, max_size=70)


plans = st.lists(st.sampled_from(sorted(STEPS)), min_size=3, max_size=12).flatmap(_of_kinds)
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


def play(scene: Scene, plan: Sequence[Step], seconds: float = 10.0) -> None:
    """Raises `AssertionError` if anything was not right. What takes `seconds` hangs."""
    with asyncio.Runner(loop_factory=LOOPS[scene.loop]) as runner:
        runner.run(_play(scene, plan, seconds))


async def _play(scene: Scene, plan: Sequence[Step], seconds: float) -> None:
    world = World(scene)
    with complaints(world.blame):
        await world.loader.__aenter__()
        world.loader.subscribe(world.device.heard)
        try:
            for step in plan:
                await step.take(world)
                for _ in range(2):
                    await asyncio.sleep(0)
                world.check()
                world.device.require_no_faults()
            await _finish(world, seconds)
            world.device.require_no_faults()
        except BaseException:
            await _abandon(world)
            raise


async def _finish(world: World, seconds: float) -> None:
    """Close; in a rude scene while leases are held, kernels run and loads are under way."""

    async def bounded(work: Awaitable[None], fault: str) -> None:
        task = asyncio.ensure_future(work)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            task.cancel()
            raise AssertionError(f"{fault}: {world.loader.placement().usage}")
        task.result()

    _let_everything_go(world)
    if world.scene.rude:
        world.closing = True
        closing = asyncio.create_task(world.loader.close(timeout=0.005))
        await asyncio.sleep(0.02)
        _end_kernels(world)
        await bounded(closing, "it does not close")
    else:
        await bounded(_everybody_is_answered(world), "somebody still waits")
        await bounded(_everything_loads(world), "it does not load any more")
        await bounded(world.loader.close(), "it does not close")
    await bounded(_ended(world), "a wish outlives its loader")
    _nothing_is_left(world)


async def _abandon(world: World) -> None:
    """After a fault: end as much as ends by itself."""
    _let_everything_go(world)
    _end_kernels(world)
    for task in world.wants:
        task.cancel()
    for hint in world.prefetches:
        hint.cancel()
    world.closing = True
    await asyncio.wait([asyncio.create_task(world.loader.close(timeout=0))], timeout=2)


def _let_everything_go(world: World) -> None:
    for id in IDS:
        world.source.allow(id)
    world.device.failing.clear()
    world.device.delay = 0.0
    world.device.gate.set()


def _end_kernels(world: World) -> None:
    for kernel in world.kernels:
        kernel.go.set()


async def _everybody_is_answered(world: World) -> None:
    """Whoever gets a lease gives it back, so that the next one's turn comes."""
    _end_kernels(world)
    while not all(task.done() for task in world.wants):
        world.release_all()
        world.check()
        await asyncio.sleep(0.001)
    world.release_all()
    await asyncio.gather(*world.prefetches, return_exceptions=True)


async def _everything_loads(world: World) -> None:
    for id in IDS:
        world.loader.unpin(id)
    for id in IDS:
        for _ in range(20):  # what is ordered to fail does so once
            world.load(id, 0, None)
            await world.wants[-1]
            if world.holders:
                break
        world.blame(world.holders and world.holders[0].handle.resident, f"{id} does not load")
        world.check()
        world.release_all()


async def _ended(world: World) -> None:
    for holder in world.holders:
        world.blame(holder.handle.released, "a handle outlives its loader")
        holder.gone.set()
    answers = await asyncio.gather(*world.wants, return_exceptions=True)
    for hint in world.prefetches:
        await hint.task
        answers += list(hint.errors.values())
    for answer in answers:
        good = not isinstance(answer, Exception) or world.is_provoked(answer)
        world.blame(good, f"a wish ended with {type(answer).__name__}: {answer}")


def _nothing_is_left(world: World) -> None:
    counts = world.source.counts
    world.blame(not counts.open_readers and not mapped_files(), f"left open: {counts}")
    world.blame(not world.device.stays, "a slot was never cleared")
    named = any(world.device.column(slot) for slot in range(world.scene.slots))
    world.blame(not named, "a column still names somebody")
    tasks = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    world.blame(not tasks, f"tasks are left: {tasks}")
    world.blame(not our_threads(), f"threads are left: {our_threads()}")


Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")

STAYS_WHILE_IT_FILLS = [
    Step("shut_the_gate", {}),
    Step("stream", {"id": "a", "priority": 0}),
    Step("let_time_pass", {"milliseconds": 5}),
    Step("unload", {"id": "a", "timeout": 0.003}),
    Step("let_time_pass", {"milliseconds": 8}),
]
"""Once told to be resident before its layers were there."""


SLOW, SOAK = pytest.mark.slow, pytest.mark.soak
EXAMPLES = [16, pytest.param(150, marks=SLOW), pytest.param(1200, marks=SOAK)]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_whatever_happens_in_whatever_order(examples: int) -> None:
    """With its seed some plays suffice to notice a lease, copy or kernel that is not waited for."""

    @seed(10 if examples < 1200 else randbits(32))
    @settings(QUICK, max_examples=examples)
    @example(Scene(), STAYS_WHILE_IT_FILLS)
    @given(scenes, plans)
    def all_of_them(scene: Scene, plan: list[Step]) -> None:
        play(scene, plan)

    all_of_them()


def _blind_to_copies(self: LifecycleRules, life: AdapterState) -> bool:
    kept, life.copying = life.copying, 0
    changed: bool = _quiesced(self, life)
    life.copying = kept
    return changed


_quiesced = vars(LifecycleRules)["_free_quiesced_slot"]
FAULTS: list[tuple[object, str, object]] = [
    (LifecycleRules, "_free_quiesced_slot", _blind_to_copies),
    (SimulatedDevice, "wait_for", lambda *_: None),  # a kernel does not wait for its copy
    (transfer, "zero", lambda *_: None),  # ranks are not padded
    (HostTier, "used", 0),  # held files cost nothing
]


# A play that ends half-way may leave handles, which say so when they are forgotten.
@pytest.mark.filterwarnings("ignore:an adapter handle .* was never released:ResourceWarning")
@pytest.mark.parametrize(("owner", "name", "broken"), FAULTS)
def test_a_fault_is_noticed(owner: object, name: str, broken: object, monkeypatch: Patch) -> None:
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)

    @seed(3)  # by which each is met within some plays, or later where threads take other turns
    @settings(QUICK, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False)
    @given(scenes, plans)
    def examples(scene: Scene, plan: list[Step]) -> None:
        play(scene, plan, seconds=1.0)

    with pytest.raises((AssertionError, Flaky)):  # played again, threads take other turns
        examples()
