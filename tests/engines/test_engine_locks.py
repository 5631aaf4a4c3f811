"""Threads that compute one batch, or end it, come one after the other where they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest

from lorax_async.engines import batch as batch_module
from lorax_async.engines import last_plans, layer_gate
from lorax_async.engines.batch import Batch
from lorax_async.engines.last_plans import LastPlans
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import FetchError, UsageError
from lorax_async.events import SlotId
from telling import TellingLock


class Meeting:
    """A first thread halts at `halt`, until a second one is through, or waits for a lock of ours."""

    def __init__(self) -> None:
        self.go_on = Event()
        self._came = Event()
        self._first: int | None = None

    def lock(self) -> TellingLock:
        return TellingLock(self.go_on)

    def halt(self) -> None:
        if get_ident() == self._first and not self._came.is_set():
            self._came.set()
            self.go_on.wait(20)

    def of(self, first: Callable[[], object], second: Callable[[], object]) -> list[Future[object]]:
        def begin() -> object:
            self._first = get_ident()
            return first()

        with ThreadPoolExecutor(2) as threads:
            one = threads.submit(begin)
            assert self._came.wait(20)
            other = threads.submit(second)
            other.add_done_callback(lambda _: self.go_on.set())
        return [one, other]


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """Of threads in locks of the engines."""
    meeting = Meeting()
    for module in (batch_module, last_plans, layer_gate):
        monkeypatch.setattr(module, "Lock", meeting.lock)
    return meeting


# -- plans -----------------------------------------------------------------------------------------


def test_two_threads_make_one_plan(meeting: Meeting) -> None:
    plans, made = LastPlans[object](), list[object]()

    def make() -> object:
        made.append(object())
        plan = made[-1]
        meeting.halt()
        return plan

    get = partial(plans.get, "a", make)
    one, other = meeting.of(get, get)
    assert one.result() is other.result()
    assert len(made) == 1


def test_a_plan_that_was_being_made_is_forgotten(meeting: Meeting) -> None:
    plans = LastPlans[object]()

    def make() -> object:
        meeting.halt()
        return object()

    one, _ = meeting.of(partial(plans.get, "a", make), plans.forget)
    assert plans.get("a", object) is not one.result()


# -- the gate --------------------------------------------------------------------------------------


def test_two_threads_that_leave_somebody_out_leave_both_out(meeting: Meeting) -> None:
    class Handle:
        """A slot's, which the first thread looks at for a while."""

        resident = is_verified = True

        def __init__(self, slot: int) -> None:
            self._slot = SlotId(slot, 1)

        @property
        def slot(self) -> SlotId:
            if self._slot.index == 1:
                meeting.halt()
            return self._slot

    first, second = handles = [Handle(0), Handle(1)]
    rows: Any = handles
    loop: Any = None
    gate, error = LayerGate(rows, loop, 1.0), FetchError("as told")
    leave_out: Any = gate.leave_out
    for done in meeting.of(partial(leave_out, first, error), partial(leave_out, second, error)):
        assert done.result() is None
    assert gate.slots_out == {0, 1}


# -- a batch ---------------------------------------------------------------------------------------


class Halting(Batch):
    """Whoever has looked at one of its fields is slow to go on."""

    slow_at = ""
    halt: Callable[[], None] = staticmethod(lambda: None)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name == super().__getattribute__("slow_at"):
            super().__getattribute__("halt")()
        return found


@pytest.fixture
def held(meeting: Meeting) -> Iterator[tuple[Halting, list[str]]]:
    """A batch that has begun, and what became of its adapters."""
    place: Any = SimpleNamespace(loop=None, device=None, tables=None, factors=None)
    batch, seen = Halting(None, place), list[str]()
    batch.halt = meeting.halt
    batch._uses.callback(seen.append, "free")
    yield batch, seen
    assert seen[-1:] == ["free"]


@contextmanager
def slow(batch: Halting, at: str) -> Iterator[None]:
    batch.slow_at = at
    yield
    batch.slow_at = ""


def test_a_layer_that_begins_while_the_block_ends_keeps_its_adapters(
    meeting: Meeting, held: tuple[Halting, list[str]]
) -> None:
    batch, seen = held

    def layer() -> None:
        with batch.computing():
            seen.append("computed")

    with slow(batch, "_ended"):
        computed, ended = meeting.of(layer, batch.end)
    assert computed.exception() is ended.exception() is None
    assert seen == ["computed", "free"]


def test_no_layer_begins_while_adapters_are_let_go(
    meeting: Meeting, held: tuple[Halting, list[str]]
) -> None:
    batch, seen = held

    def layer() -> None:
        with batch.computing():
            seen.append("computed")

    with slow(batch, "_uses"):
        ended, computed = meeting.of(batch.end, layer)
    assert ended.exception() is None
    assert isinstance(computed.exception(), UsageError)
    assert seen == ["free"]


def test_two_layers_that_end_at_once_are_both_over(
    meeting: Meeting, held: tuple[Halting, list[str]]
) -> None:
    """And the block with them."""
    batch, seen = held
    layers = [batch.computing() for _ in range(2)]
    for layer in layers:
        layer.__enter__()
    batch.end()
    with slow(batch, "_running"):
        meeting.of(*[partial(layer.__exit__, None, None, None) for layer in layers])
    assert seen == ["free"]
