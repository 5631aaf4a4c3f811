"""Requests, loads and passes in virtual time, on the simulated device, judged from outside."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Any, Literal

import pytest
import tiny
from contention_observer import IDS, LARGEST, LAYOUT, QUICK, Made, ObservedDevice, complaints, made
from event_loops import LOOPS
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import our_threads
from scheduler_world import VirtualClock
from scheduler_world import warm as loaded

from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, errors
from lorax_async.concurrency import FetchControl
from lorax_async.errors import AdapterTimeoutError, FetchError, LoraxError
from lorax_async.lifecycle.adapter_state import SlotState
from lorax_async.scheduler import admission
from lorax_async.scheduler.adapter_queues import AdapterQueues
from lorax_async.scheduler.estimates import LoadEstimate
from lorax_async.scheduler.requests import AdapterQueue, Request, Ticket
from lorax_async.scheduler.scheduler import AdapterScheduler, Batch, BatchRow
from lorax_async.testing import FakeSource, FakeVersion
from lorax_async.types import AdapterId, AdapterKey

TOLD = "the link was told to fail"


@dataclass(frozen=True, slots=True)
class Conduct:
    """How an adapter's bytes arrive: the first group after `delay`, the others every `interval`.

    From group `at` on they come no more ("stalls"), or their coming fails.
    """

    delay: float
    interval: float
    fate: Literal["comes", "stalls", "fails"] = "comes"
    at: int = 0


class TimedSource(FakeSource):
    """The adapters of the contention tests, each with its conduct."""

    def __init__(self, clock: VirtualClock, conducts: Mapping[str, Conduct]) -> None:
        super().__init__(holdable=True)
        self.versions: dict[AdapterKey, Made] = {}
        self._clock = clock
        self._conducts = conducts
        self._begun: dict[str, float] = {}
        for id in IDS:
            files = made(id, 0)
            self.versions[self.put(id, files.config, files.content)] = files

    async def _wait_for_group(
        self, version: FakeVersion, group: int, control: FetchControl
    ) -> None:
        conduct = self._conducts[version.id]
        if group == 0:
            self._begun[version.id] = self._clock.time()
        due = self._begun[version.id] + conduct.delay + group * conduct.interval
        if conduct.fate != "comes" and group >= conduct.at:
            if conduct.fate == "fails":
                raise FetchError(TOLD)
            due = inf
        came = asyncio.Event()

        def look() -> None:
            if control.cancelled or self._clock.time() >= due:
                came.set()

        alarm = None if due == inf else self._clock.call_at(due, look)
        with control.watch(look):
            try:
                await came.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")


LEVEL = 0.02  # `starvation_age`: of the scheduler in virtual seconds, of the loader in real ones

TIMEOUT = 60.0
BOUND = 30.0
"""No request waits longer if its adapter comes: all passes and loads of a plan take less."""

MISSING = "x"  # an id that the source does not have


@dataclass(frozen=True, slots=True)
class Scene:
    """The settings of one example, and how its adapters arrive."""

    loop: str
    slots: int
    max_tokens: int
    max_sequences: int
    max_begun: int | None
    loads: int | None
    conducts: Mapping[str, Conduct]
    engines: int = 1  # Batches that are under way at a time
    seconds: float = 0.01  # Of a pass, however many rows it has

    def fate(self, id: str | None) -> str:
        if id is None:
            return "comes"
        return "fails" if id == MISSING else self.conducts[id].fate


@dataclass(slots=True, eq=False)
class Wanted:
    """One request: its content, its time, and whether the test cancelled it."""

    ticket: Ticket
    at: float
    cancelled: bool = False
    ended: float | None = None
    tokens: list[int] = field(default_factory=list)
    """Positions that were computed since its last restart."""


class World:
    """Everything of one example; collects, as `device.faults`, what was not right."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.clock = VirtualClock()
        self.source = TimedSource(self.clock, scene.conducts)
        nbytes = LARGEST * scene.slots
        self.device = ObservedDevice(
            nbytes=nbytes,
            slots=scene.slots,
            budgets=[1 << 16],
            expected=lambda key: self.source.versions[key].weights,
            leased=lambda _: False,
        )
        self.blame = self.device.blame
        sizes: dict[str, Any] = {"host_bytes": 1 << 20, "staging_bytes": 1 << 16, "io_threads": 2}
        sizes |= {"device_bytes": nbytes, "max_slots": scene.slots}
        config = LoaderConfig(**sizes, timeout=TIMEOUT, starvation_age=LEVEL)
        self.loader = AdapterLoader(LAYOUT, config, source=self.source, device=self.device)
        self.wanted: list[Wanted] = []
        self.news = asyncio.Event()

    async def open(self) -> None:
        await self.loader.__aenter__()
        self.loader.subscribe(self.device.heard)
        self.loader.subscribe(lambda _: self.tell())
        begun, loads = self.scene.max_begun, self.scene.loads
        self.scheduler = AdapterScheduler(
            self.loader, max_begun=begun, loads=loads, clock=self.clock
        )

    def submit(self, request: Request) -> None:
        self.wanted.append(Wanted(self.scheduler.submit(request), self.clock.now))
        self.tell()

    def cancel(self, which: int) -> None:
        going = [each for each in self.wanted if not each.ticket.done]
        if going:
            wanted = going[which % len(going)]
            wanted.cancelled = True
            self.blame(wanted.ticket.cancel(), "it could not be cancelled")
            self.tell()

    def note_ends(self) -> None:
        for each in self.wanted:
            if each.ticket.done and each.ended is None:
                each.ended = self.clock.now

    def judge(self, each: Wanted) -> None:
        """Whether what came of it is what had to."""
        ticket, request = each.ticket, each.ticket.request
        assert request.adapter_id is None or isinstance(request.adapter_id, str)
        fate, error = self.scene.fate(request.adapter_id), ticket.error
        self.blame(ticket.done, f"it never ended: {ticket}")
        if each.cancelled:
            self.blame(ticket.cancelled, "it was cancelled, and is not")
        elif error is None:
            self.blame(fate == "comes", f"it is finished without its adapter: {ticket}")
            self.blame(ticket.generated == request.max_new_tokens, "it is too short")
            wanted = list(range(request.prompt_tokens + request.max_new_tokens - 1))
            self.blame(each.tokens == wanted, f"not each position once: {each.tokens}")
            late = each.ended is None or each.ended - each.at > BOUND
            self.blame(not late, f"it waited too long, until {each.ended}: {ticket}")
        else:
            self.blame(error.id == request.adapter_id, "an error of another adapter")
            told = isinstance(error, FetchError) and TOLD in str(error)
            provoked = fate == "fails" and (told or error.id == MISSING)
            if isinstance(error, AdapterTimeoutError):
                provoked = request.deadline is not None or fate == "stalls"
            self.blame(provoked, f"{ticket}: {error!r}")

    def tell(self) -> None:
        """Something has changed that a pass may wait for."""
        self.news.set()
        self.news = asyncio.Event()

    async def until_news(self, seconds: float) -> None:
        """Or until so much virtual time has passed."""
        alarm = self.clock.call_at(self.clock.now + seconds, self.tell)
        try:
            await self.news.wait()
        finally:
            alarm.cancel()

    def is_ready(self, id: AdapterId | None) -> bool:
        """Whether the scheduler has a slot for the adapter, all of which is there and stays."""
        where = None if id is None else self.loader.placement().find(id)
        return id is None or (where is not None and where.state == "resident" and where.leases > 0)

    async def settle(self) -> None:
        """Until everything has happened that does not wait for time to pass."""
        # Nothing public says that a thread still reads bytes for a copy: the one look inside.
        states = self.loader._assembly.driver.lifecycle.states  # noqa: SLF001
        quiet = 0
        while quiet < 3:
            for _ in range(6):
                await asyncio.sleep(0)
            busy = any(
                life.copying or (life.slot is SlotState.DRAINING and not life.leases + life.uses)
                for life in states.values()
            )
            quiet = 0 if busy else quiet + 1
            if busy:
                await asyncio.sleep(0.0002)


BUDGET = 0.1  # Of a pass, that may be waited for layers


class Engine:
    """Computes batch after batch, and judges each; `waited` are virtual seconds, for layers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.computing = 0
        self.waited = 0.0
        self._burnt: dict[AdapterHandle, None] = {}

    async def run(self) -> None:
        scene = self.world.scene
        async for batch in self.world.scheduler.batches(scene.max_tokens, scene.max_sequences):
            for wanted in self.world.wanted:
                if wanted.ticket in batch.preempted:
                    self.world.blame(not wanted.ticket.in_batch, "preempted while it is computed")
                    wanted.tokens = []
            self._judge(batch)
            self.computing += 1
            again, failed = await self._compute(batch)
            self._complete(batch, again, failed)
            self.computing -= 1

    def _judge(self, batch: Batch) -> None:
        world, scene = self.world, self.world.scene
        batch.check()
        tickets = [row.ticket for row in batch.rows]
        world.blame(batch.rows, "a batch of nothing")
        world.blame(len(set(tickets)) == len(tickets), "a request is twice in a batch")
        world.blame(batch.tokens <= scene.max_tokens, "too many tokens")
        world.blame(len(batch.rows) <= scene.max_sequences, "too many rows")
        begun = [each.ticket for each in world.wanted if each.ticket.begun and not each.ticket.done]
        world.blame(len(begun) <= (scene.max_begun or len(begun)), "too many have begun")
        for row in batch.rows:
            world.blame(not row.ticket.done, "a request that has ended is computed")
            self._judge_row(row)
        bounds = [sum(row.tokens for row in batch.rows[:n]) for n in range(len(batch.rows) + 1)]
        segments = batch.plan.segments
        for (start, stop), slot in zip(pairwise(segments.bounds), segments.slots, strict=False):
            rows = batch.rows[bounds.index(start) : bounds.index(stop)]
            world.blame({row.place.slot for row in rows} == {slot}, "a row in another's segment")
        self._judge_order(batch)

    def _judge_row(self, row: BatchRow) -> None:
        world, handle, id = self.world, row.handle, row.ticket.request.adapter_id
        if handle is None:
            world.blame(id is None, "a row without its adapter")
            return
        world.blame(handle.key.location == f"memory:{id}", "a row with another's adapter")
        world.blame(row.place == (handle.slot.index, handle.slot.generation), "another place")
        may_join = handle.resident or handle.is_ready(handle.layers[0])
        world.blame(may_join, "a row before anything of its adapter came")
        world.blame(handle.resident or handle not in self._burnt, "it waits in vain once more")

    def _judge_order(self, batch: Batch) -> None:
        """The most urgent request that can be computed is computed: no request waits forever.

        Limited places go to adapters in turn, and to the oldest request only once it is overdue.
        """
        world, limit = self.world, self.world.scene.max_begun
        begun = [t for each in world.wanted if (t := each.ticket).begun and not t.done]
        newly = sum(not row.start for row in batch.rows)
        has_places = limit is None or len(begun) - newly < limit
        holders = {ticket.request.adapter_id for ticket in begun}

        def may_begin(ticket: Ticket) -> bool:
            overdue = world.clock.now - ticket.order[0] >= LEVEL
            fair = limit is None or (overdue and ticket.request.adapter_id not in holders)
            return has_places and fair

        left_out = [
            ticket.order
            for each in world.wanted
            if not (ticket := each.ticket).done and not ticket.in_batch
            if (ticket.begun or may_begin(ticket)) and world.is_ready(ticket.request.adapter_id)
        ]
        first = min((row.ticket.order for row in batch.rows), default=None)
        if left_out and first is not None:
            world.blame(first < min(left_out), "the most urgent one was left out")

    async def _compute(self, batch: Batch) -> tuple[set[Ticket], dict[Ticket, LoraxError]]:
        again, failed = set[AdapterHandle](), dict[AdapterHandle, LoraxError]()
        handles = list(dict.fromkeys(handle for handle in batch.handles if handle is not None))
        per_layer = self.world.scene.seconds / LAYOUT.num_layers
        left = BUDGET * self.world.scene.seconds
        with ExitStack() as uses:
            for handle in handles:
                try:
                    uses.enter_context(handle.use())
                except LoraxError as error:
                    failed[handle] = error
            for layer in range(LAYOUT.num_layers):
                for handle in batch.streaming:
                    if handle in again or handle in failed:
                        continue
                    before = self.world.clock.now
                    try:
                        if not await self._gate(batch, handle, layer, left):
                            again.add(handle)
                    except LoraxError as error:
                        failed[handle] = error
                    left = max(0.0, left - (self.world.clock.now - before))
                    self.waited += self.world.clock.now - before
                self._kernels([h for h in handles if h not in again and h not in failed], layer)
                await self.world.clock.sleep(per_layer)
        rows_again = {row.ticket for row in batch.rows if row.handle in again}
        return rows_again, {
            row.ticket: failed[row.handle]
            for row in batch.rows
            if row.handle is not None and row.handle in failed
        }

    async def _gate(self, batch: Batch, handle: AdapterHandle, layer: int, budget: float) -> bool:
        """Wait for the layer; return whether it came in time. Alone, a pass may wait for longer."""
        clock, began = self.world.clock, self.world.clock.now
        others = any(row.handle is not handle for row in batch.rows)
        while not handle.is_ready(layer):
            handle.require_sound()
            alone = not others and not batch.others_wait
            left = (TIMEOUT if alone else budget) - (clock.now - began)
            if left <= 1e-9:
                if alone:
                    raise AdapterTimeoutError("it did not come", id=handle.id, stage="copy")
                return False
            # Whether others wait is looked at now and then.
            slice = max(BUDGET * self.world.scene.seconds, clock.now - began)
            await self.world.until_news(min(left, slice))
        return True

    def _kernels(self, handles: Iterable[AdapterHandle], layer: int) -> None:
        for handle in handles:
            try:
                handle.require_sound()
            except LoraxError:
                continue  # its rows fail with the batch
            self.world.blame(handle.is_ready(layer), "a kernel before its layer")
            stay = self.world.device.stays.get(handle.slot.index)
            if stay is None or stay.slot != handle.slot:
                self.world.blame(False, "a kernel on a slot that is another's")
            else:
                self.world.device.check_weights(stay, layer)

    def _complete(self, batch: Batch, again: set[Ticket], failed: dict[Ticket, LoraxError]) -> None:
        by_ticket: dict[Ticket, Wanted] = {each.ticket: each for each in self.world.wanted}
        for row in batch.rows:
            wanted = by_ticket[row.ticket]
            if row.ticket in again:
                wanted.tokens = []
                if row.handle is not None:
                    self._burnt[row.handle] = None
            elif row.ticket not in failed:
                wanted.tokens += range(row.start, row.start + row.tokens)
        self.world.scheduler.complete(batch, again=again, failed=failed)
        with suppress(errors.HandleClosedError):
            batch.check()
            self.world.blame(False, "a batch outlives its completion")
        self.world.note_ends()


MOMENTS = 50_000  # More than any play has


@dataclass(frozen=True, slots=True)
class Step:
    """After `pause` virtual seconds: a request, or the cancelling of one."""

    pause: float
    request: Request | None = None
    cancel: int = 0


def play(scene: Scene, plan: Sequence[Step], warm: str = "") -> tuple[list[float], float]:
    """When each request ended, and how long passes waited. `warm` adapters are loaded before.

    Raises if anything was not right.
    """
    with asyncio.Runner(loop_factory=LOOPS[scene.loop]) as runner:
        return runner.run(_play(scene, plan, warm))


async def _play(scene: Scene, plan: Sequence[Step], warm: str) -> tuple[list[float], float]:
    world = World(scene)
    with complaints(world.blame):
        await world.open()
        engine = Engine(world)
        engines = [asyncio.create_task(engine.run()) for _ in range(scene.engines)]
        tasks = list(engines)
        try:
            await _drive(world, asyncio.ensure_future(loaded(world.loader, *warm)))
            tasks.append(asyncio.create_task(_arrive(world, plan)))
            await _drive(world, tasks[-1])
            await _drive(world, asyncio.ensure_future(_all_done(world, engine)))
            for each in world.wanted:
                world.judge(each)
            await _end(world, engines)
            world.device.require_no_faults()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            try:
                await world.scheduler.close()
            finally:  # what is put into the code on purpose may break even that
                await world.loader.close(timeout=1)
        world.device.require_no_faults()
    assert not our_threads()
    return [each.ended or inf for each in world.wanted], engine.waited


async def _arrive(world: World, plan: Sequence[Step]) -> None:
    for step in plan:
        await world.clock.sleep(step.pause)
        if step.request is None:
            world.cancel(step.cancel)
        else:
            world.submit(step.request)


async def _all_done(world: World, engine: Engine) -> None:
    """Every request has its answer, and what was cancelled under way is computed."""
    for each in world.wanted:
        with suppress(LoraxError, asyncio.CancelledError):
            await each.ticket
    while engine.computing:
        await world.clock.sleep(world.scene.seconds)


async def _drive(world: World, work: asyncio.Future[Any]) -> None:
    """Let virtual time pass until `work` is done: from one moment to the next, each to its end."""
    idle = 0
    for _ in range(MOMENTS):
        await world.settle()
        world.note_ends()
        world.device.require_no_faults()
        if work.done():
            work.result()
            return
        due = world.clock.due
        # What the loader does in real time comes before a jump over more than it may take.
        if (due is None or due > world.clock.now + 10 * LEVEL) and idle < 2000 * LEVEL + 10:
            idle += 1
            await asyncio.sleep(0.001)
        elif due is None:
            raise AssertionError(f"nothing happens any more: {[e.ticket for e in world.wanted]}")
        else:
            idle = 0
            world.clock.step()
    raise AssertionError("it goes on and on")


async def _end(world: World, engines: list[asyncio.Task[None]]) -> None:
    """Close, and nothing is left."""
    world.blame(not world.loader.placement().usage.leases, "leases without requests")
    await world.scheduler.close()
    await asyncio.wait(engines, timeout=1)
    world.blame(all(engine.done() for engine in engines), "an engine goes on after close")
    with suppress(errors.LoaderClosedError):
        world.scheduler.submit(Request(None, 1, 1))
        world.blame(False, "a closed scheduler takes requests")
    await world.settle()
    usage = world.loader.placement().usage
    world.blame(not usage.leases, "leases are left")
    world.blame(not usage.waiting, "loads or hints are left")
    names = [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("lorax load")]
    world.blame(not names, "tasks are left")
    world.blame(world.clock.due is None, "alarms are left")


Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")

conducts = st.builds(
    Conduct,
    delay=st.sampled_from([0.0, 0.003, 0.03, 0.2]),
    interval=st.sampled_from([0.0, 0.001, 0.004, 0.03]),
    fate=st.sampled_from(["comes", "comes", "comes", "stalls", "fails"]),
    at=st.integers(0, tiny.LAYERS - 1),
)
scenes = st.builds(
    Scene,
    loop=st.sampled_from(["asyncio", "uvloop"]),
    slots=st.integers(1, 4),
    max_tokens=st.sampled_from([1, 8, 100, 500]),
    max_sequences=st.sampled_from([1, 2, 8]),
    max_begun=st.sampled_from([None, 1, 3]),
    loads=st.sampled_from([None, 1, 2]),
    engines=st.sampled_from([1, 1, 2]),
    conducts=st.fixed_dictionaries(dict.fromkeys(IDS, conducts)),
)
requests = st.builds(
    Request,
    adapter_id=st.sampled_from([None, *IDS, *IDS, MISSING]),
    prompt_tokens=st.sampled_from([1, 3, 20, 90]),
    max_new_tokens=st.integers(1, 5),
    priority=st.sampled_from([0, 0, 0, 1, 5]),
    deadline=st.sampled_from([None, None, None, 0.005, 0.05]),
)
pauses = st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.1])
submits, cancels = (
    st.builds(Step, pauses, requests),
    st.builds(Step, pauses, cancel=st.integers(0, 7)),
)
plans = st.lists(submits | submits | cancels, min_size=1, max_size=16)


SLOW, SOAK = pytest.mark.slow, pytest.mark.soak
EXAMPLES = [12, pytest.param(100, marks=SLOW), pytest.param(2000, marks=SOAK)]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_plays(examples: int) -> None:
    @settings(QUICK, max_examples=examples, derandomize=examples < 2000)
    @given(scenes, plans)
    def all_of_them(scene: Scene, plan: list[Step]) -> None:
        play(scene, plan)

    all_of_them()


WARM = Conduct(0.0, 0.0)
COLD = {
    "comes slowly": Conduct(0.05, 0.05),
    "comes in time": Conduct(0.001, 0.002),
    "never begins": Conduct(0.0, 0.0, "stalls", 0),
    "stalls in its midst": Conduct(0.001, 0.001, "stalls", 2),
    "stalls before its last layer": Conduct(0.001, 0.001, "stalls", 3),
    "fails in its midst": Conduct(0.001, 0.001, "fails", 2),
}
READY = [Step(wait, Request(id, 20, 6)) for wait in (0.0, 0.013, 0.021) for id in ("a", "b", None)]


def scene(loop: str, conduct: Conduct) -> Scene:
    """Return a scene with room for all: a late request is late because of its adapter."""
    conducts = {id: WARM if id in "ab" else conduct for id in IDS}
    return Scene(loop, 6, 4096, 64, None, None, conducts)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", COLD)
def test_ready_requests_are_as_fast_beside_cold_ones(loop: str, name: str) -> None:
    alone, _ = play(scene(loop, WARM), READY, "ab")
    cold = [Step(0.0, Request(id, 20, 6)) for id in "cdef"]
    ended, waited = play(scene(loop, COLD[name]), [READY[0], *cold, *READY[1:]], "ab")
    ready = [ended[0], *ended[5:]]
    assert len(ready) == len(READY)
    for one, other in zip(alone, ready, strict=True):
        # As many passes; these wait for layers within their budget of a tenth, and not again.
        assert other <= one + waited + 0.001
    assert waited <= 4 * 0.001 + 1e-9, "each of four adapters spends a budget once"


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_comes_in_time_does_not_wait_for_its_last_layer(loop: str) -> None:
    """A pass takes 40 ms; the one that begins at 40 finds two layers, the others come at 41 and 43."""
    slow = replace(scene(loop, COLD["comes in time"]), seconds=0.04)
    plan = [*READY[:3], Step(0.036, Request("c", 20, 1))]
    ended, waited = play(slow, plan, "ab")
    assert ended[3] == pytest.approx(0.08, abs=0.001)
    assert waited <= 0.004


Play = tuple[Scene, list[Step]]
LATE = Conduct(0.001, 0.03)


def _one(slots: int, sequences: int, *steps: Step, engines: int = 1, **conducts: Conduct) -> Play:
    all_of_them = dict.fromkeys(IDS, Conduct(0.002, 0.001)) | conducts
    return Scene("asyncio", slots, 100, sequences, None, None, all_of_them, engines), [*steps]


def _asks(pause: float, id: str | None, prompt: int, new: int) -> Step:
    return Step(pause, Request(id, prompt, new))


_NEVER, _LAST = COLD["never begins"], COLD["stalls before its last layer"]
_FAILS = Conduct(0.001, 0.0, "fails")
_FIRST, _NEXT, _THEN = _asks(0, "c", 5, 1), _asks(0.01, "a", 5, 1), _asks(0.1, "b", 5, 1)
TELLING: dict[str, Play] = {
    "a stalled one has the only slot": _one(1, 8, _FIRST, _NEXT, c=_NEVER),
    "and another comes only then": _one(1, 8, _FIRST, _NEXT, _THEN, c=_LAST),
    "too slow": _one(2, 8, _asks(0, "c", 5, 2), _asks(0.002, None, 5, 9), c=LATE),
    "joins others and stops": _one(2, 8, _asks(0, None, 5, 9), _asks(0.02, "c", 5, 2), c=_LAST),
    "fails": _one(2, 8, *(_asks(0, id, 5, 3) for id in "acb"), c=_FAILS),
    "more than fits": _one(3, 2, *(_asks(0, id, 150, 3) for id in "aaaab"), engines=2),
    "cancelled under way": _one(2, 8, _asks(0, "a", 5, 9), Step(0.03), _asks(0, "b", 5, 2)),
    "too slow for one that is cancelled": _one(
        1, 1, *(_asks(0, id, 1, 1) for id in "cac"), Step(0.01), a=Conduct(0.2, 0), c=LATE
    ),
}
FAULTS: list[tuple[object, str, object]] = [
    (LoadEstimate, "earliest_pass", lambda self, now, seconds, layers: now),
    (AdapterQueues, "stop_streaming", lambda self, adapter_queues, handles: None),
    (admission, "share", lambda wants, tokens, rows: [list(each) for each in wants]),
    (AdapterQueue, "waiting", lambda self, most, fresh: self.tickets[:most]),
    (AdapterQueues, "fail", lambda self, adapter_queue, error: None),
    (AdapterQueues, "_release_stalled", lambda self: None),
    (AdapterQueue, "add", lambda self, ticket: self.tickets.insert(0, ticket)),
    (AdapterQueues, "release_batch", lambda self, adapter_queues: None),
    (AdapterQueues, "leave", lambda self, ticket: None),
]


@pytest.mark.parametrize("name", TELLING)
def test_plays_that_tell_much(name: str) -> None:
    play(*TELLING[name])


@pytest.mark.parametrize(("owner", "name", "broken"), FAULTS)
def test_a_fault_is_noticed(owner: object, name: str, broken: object, monkeypatch: Patch) -> None:
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)
    with pytest.raises(Exception):  # noqa: B017, PT011 (what is broken may break anything)
        for scene, plan in TELLING.values():
            play(scene, plan)
