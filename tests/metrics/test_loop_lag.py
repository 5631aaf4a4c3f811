"""How late a loop is, told by a loop and a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lorax_async.metrics.loop_lag import BOUNDS, LoopLag


class ByHand:
    """A loop whose timers run when the test says so, and the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        timer = (self.now + delay, callback)
        self.timers.append(timer)
        return cast(Any, type("Handle", (), {"cancel": lambda _: self.timers.remove(timer)})())

    def run(self, late: float) -> None:
        ((due, callback),) = self.timers
        self.timers.clear()
        self.now = due + late
        callback()


def test_each_look_is_counted_in_its_bucket() -> None:
    loop = ByHand()
    lag = LoopLag(cast(Any, loop), 0.25, lambda: False, lambda: loop.now)
    for late in (0.0, -0.001, 0.0015, 0.0625, 3.0):
        loop.run(late)
    counts, total = lag.lags()
    assert dict(zip((*BOUNDS, None), counts, strict=True)) == {
        0.001: 2,
        0.0025: 3,
        0.005: 3,
        0.01: 3,
        0.025: 3,
        0.05: 3,
        0.1: 4,
        0.25: 4,
        0.5: 4,
        1.0: 4,
        None: 5,
    }
    assert abs(total - 3.064) < 1e-9


def test_a_bucket_has_its_upper_end() -> None:
    loop = ByHand()
    loop.now = 0.0
    lag = LoopLag(cast(Any, loop), 0.0, lambda: False, lambda: loop.now)
    loop.run(0.25)
    assert lag.lags().counts == (0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1)


def test_it_ends() -> None:
    loop, ended = ByHand(), [False]
    lag = LoopLag(cast(Any, loop), 0.25, lambda: ended[0], lambda: loop.now)
    loop.run(0.0)
    assert lag.running
    ended[0] = True
    loop.run(0.0)
    assert (lag.running, loop.timers) == (False, [])
    lag.close()

    other = LoopLag(cast(Any, loop), 0.25, lambda: False, lambda: loop.now)
    other.close()
    other.close()
    assert (other.running, loop.timers) == (False, [])
    assert lag.lags().counts[-1] == 2
