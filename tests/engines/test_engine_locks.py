"""Threads that compute one batch, or end it, come one after the other where they must."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest
from observed_lock import ObservedLock

from lorax_async.engines import batch as batch_module
from lorax_async.engines import layer_gate
from lorax_async.engines.batch import ModelBatch, PlanCache
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import FetchError, UsageError
from lorax_async.events import SlotId
from lorax_async.telemetry import Tracer


class Meeting:
    """A first thread halts at one of its steps, until a second one is through, or waits for a lock."""

    def __init__(self, at: int) -> None:
        self.halted = False
        self._came, self._go_on, self._left = Event(), Event(), at
        self._first: int | None = None

    def lock(self) -> ObservedLock:
        return ObservedLock(self._go_on)

    def step(self) -> None:
        if get_ident() == self._first and not self.halted:
            self._left -= 1
            if self._left < 0:
                self.halted = True
                self._came.set()
                self._go_on.wait(20)

    def of(self, first: Callable[[], object], second: Callable[[], object]) -> list[Future[object]]:
        def begin() -> object:
            self._first = get_ident()
            try:
                return first()
            finally:
                self._first = None  # the second one may run in this thread
                self._came.set()

        with ThreadPoolExecutor(2) as threads:
            one = threads.submit(begin)
            assert self._came.wait(20)
            other = threads.submit(second)
            other.add_done_callback(lambda _: self._go_on.set())
        return [one, other]


Meet = Callable[[int], Meeting]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Meet:
    def make(at: int) -> Meeting:
        meeting = Meeting(at)
        for module in (batch_module, layer_gate):
            monkeypatch.setattr(module, "Lock", meeting.lock)
        return meeting

    return make


def at_each_step(meet: Meet, scenario: Callable[[Meeting], None]) -> None:
    for at in count():
        meeting = meet(at)
        scenario(meeting)
        if not meeting.halted:
            assert at > 3
            return


def test_two_threads_make_one_plan_and_one_that_is_being_made_is_forgotten(meet: Meet) -> None:
    for forgets in (False, True):
        meeting, made = meet(0), list[object]()
        plans = PlanCache[object]()

        def make(meeting: Meeting = meeting, made: list[object] = made) -> object:
            made.append(object())
            plan = made[-1]
            meeting.step()
            return plan

        get = partial(plans.get, "a", make)
        one, other = meeting.of(get, plans.forget if forgets else get)
        assert len(made) == 1
        assert (plans.get("a", object) is one.result()) != forgets
        assert forgets or one.result() is other.result()


class Handle:
    """As much of a handle as a gate and a batch ask for. Its slot is looked at for a while."""

    resident = is_verified = True
    extras = None

    def __init__(self, slot: int, look: Callable[[], None], seen: list[str]) -> None:
        self._slot, self._look, self._seen = SlotId(slot, 1), look, seen

    @property
    def slot(self) -> SlotId:
        self._look()
        return self._slot

    @contextmanager
    def use(self) -> Iterator[None]:
        yield
        self._seen.append("free")


def test_two_threads_that_leave_somebody_out_leave_both_out(meet: Meet) -> None:
    for at in range(3):
        meeting = meet(at)
        rows: list[Any] = [Handle(slot, meeting.step, []) for slot in range(2)]
        loop: Any = None
        gate, error = LayerGate(rows, loop, 1.0), FetchError("as told")
        for done in meeting.of(*[partial(gate.leave_out, row, error) for row in rows]):
            assert done.result() is None
        assert gate.slots_out == {0, 1}


def begun(meeting: Meeting) -> tuple[ModelBatch, list[str]]:
    """A batch of which every look at a field is a step; and what became of its adapter."""

    class Halting(ModelBatch):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            meeting.step()
            return found

    place: Any = SimpleNamespace(loop=None, device=None, tables=None, factors=None)
    place.tracer, seen = Tracer(), list[str]()
    rows: list[Any] = [Handle(0, meeting.step, seen)]
    batch = Halting(rows, place)
    batch.begin()
    return batch, seen


@pytest.mark.parametrize("layer_first", [True, False])
def test_a_layer_that_begins_while_the_block_ends_keeps_its_adapters_or_is_refused(
    meet: Meet, layer_first: bool
) -> None:
    def scenario(meeting: Meeting) -> None:
        batch, seen = begun(meeting)

        def layer() -> None:
            with batch.computing():
                seen.append("computed")

        calls = [layer, batch.end] if layer_first else [batch.end, layer]
        done = meeting.of(*calls)
        computed, ended = done if layer_first else done[::-1]
        assert ended.exception() is None
        refused = computed.exception()
        assert refused is None or isinstance(refused, UsageError)
        assert seen == (["free"] if refused else ["computed", "free"])

    at_each_step(meet, scenario)


def test_two_layers_that_end_at_once_are_both_over(meet: Meet) -> None:
    def scenario(meeting: Meeting) -> None:
        batch, seen = begun(meeting)
        layers = [batch.computing() for _ in range(2)]
        for layer in layers:
            layer.__enter__()
        batch.end()
        meeting.of(*[partial(layer.__exit__, None, None, None) for layer in layers])
        assert seen == ["free"]

    at_each_step(meet, scenario)
