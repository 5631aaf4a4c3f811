"""Requests, loads and passes in virtual time, on the simulated device, judged from outside.

Nobody waits for ever; no row is computed before its adapter may join, no layer before its weights;
nobody's batches are longer or fewer for adapters that do not come; and nothing is left.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from scheduling.plans import plans, scenes
from scheduling.play import Step, play
from scheduling.world import Scene

pytestmark = pytest.mark.usefixtures("nothing_left")

QUICK = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(scenes, plans)
def test_whatever_comes_in_whatever_order(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


@pytest.mark.soak
@settings(QUICK, max_examples=2000, derandomize=False)
@given(scenes, plans)
def test_much_more_of_it(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)
