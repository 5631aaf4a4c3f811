"""Interleavings of many adapters that compete for slots, judged from outside.

No slot is freed under a copy, a kernel or a lease; whoever wants an adapter gets it or a typed
error that was provoked; no budget is exceeded; nothing hangs; no row names an earlier tenant; and
the bytes are those of the file.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, Phase, example, given, seed, settings

from contention import ending
from contention.faults import FAULTS
from contention.play import play
from contention.steps import Step, plans, scenes
from contention.world import Scene

pytestmark = pytest.mark.usefixtures("nothing_left")

QUICK = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


PLAIN = Scene(
    loop="asyncio",
    rude=False,
    slots=2,
    images=False,
    staging_bytes=4096,
    starvation_age=5.0,
    min_residency=0.0,
    eviction="lru",
)
STAYS_WHILE_IT_FILLS = [
    Step("shut_the_gate", {}),
    Step("stream", {"id": "a", "priority": 0}),
    Step("let_time_pass", {"milliseconds": 5}),
    Step("unload", {"id": "a", "timeout": 0.003}),
    Step("let_time_pass", {"milliseconds": 8}),
]
"""Once told to be resident before its layers were there."""


@QUICK
@example(PLAIN, STAYS_WHILE_IT_FILLS)
@given(scenes, plans)
def test_whatever_happens_in_whatever_order(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


@pytest.mark.soak
@settings(QUICK, max_examples=3000, derandomize=False)
@given(scenes, plans)
def test_much_more_of_it(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


# A play that ends half-way may leave handles, which say so when they are forgotten.
@pytest.mark.filterwarnings("ignore:an adapter handle .* was never released:ResourceWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = FAULTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    monkeypatch.setattr(ending, "SECONDS", 1.0)
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)
    noticed: list[AssertionError] = []

    @seed(4)  # by which each is met within some dozens of plays
    @settings(QUICK, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
    @given(scenes, plans)
    def examples(scene: Scene, plan: list[Step]) -> None:
        if noticed:  # Hypothesis would play it again, for threads that take other turns
            raise noticed[0]
        try:
            play(scene, plan)
        except AssertionError as fault:
            noticed.append(fault)
            raise

    with pytest.raises(AssertionError):
        examples()
