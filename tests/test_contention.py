"""Interleavings of many adapters that compete for slots, judged from outside.

No slot is freed under a copy, a kernel or a lease; whoever wants an adapter gets it or a typed
error that was provoked; no budget is exceeded; nothing hangs; no row names an earlier tenant; and
the bytes are those of the file.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, Phase, example, given, seed, settings

from contention.play import play
from contention.steps import Step, plans, scenes
from contention.world import Scene
from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import ClearColumn
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import Life
from lorax_async.core.residency import HostBudget
from lorax_async.io import transfer
from lorax_async.io.staging import Buffer, StagingRing
from lorax_async.runtime.actions import Actions
from lorax_async.testing import SimulatedDevice

pytestmark = pytest.mark.usefixtures("nothing_left")

QUICK = settings(
    max_examples=12,
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


@pytest.mark.slow
@settings(QUICK, max_examples=150)
@given(scenes, plans)
def test_more_of_it(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


@pytest.mark.soak
@settings(QUICK, max_examples=1200, derandomize=False)
@given(scenes, plans)
def test_much_more_of_it(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


# -- one fault for each thing that is judged: the mutants of the model check are many more ---------


def _blind_to_copies(self: Decisions, life: Life) -> bool:
    kept, life.copying = life.copying, 0
    changed: bool = _quiesced(self, life)
    life.copying = kept
    return changed


def _column_stays(self: Actions, command: ClearColumn) -> None:
    self._tenants.move_out(command.key)
    self.close_idle_reader(command.key)


def _given_back_at_once(self: StagingRing, count: int) -> list[Buffer]:
    taken = self._free[:count]
    self._free = self._free[count:] + taken
    return taken


def _free_of_charge(self: HostBudget, key: AdapterKey, nbytes: int, cost: float) -> None:
    if nbytes:
        self.held[key] = 0
        self.policy.admit(key, nbytes, cost)


_quiesced = vars(Decisions)["_slot_quiesced"]

FAULTS: dict[str, tuple[object, str, object]] = {
    "a slot is freed under a copy": (Decisions, "_slot_quiesced", _blind_to_copies),
    "a column is not cleared": (Actions, "_clear_column", _column_stays),
    "a staging buffer is used too early": (StagingRing, "take", _given_back_at_once),
    "a kernel does not wait for its copy": (SimulatedDevice, "wait_for", lambda *_: None),
    "held files cost nothing": (HostBudget, "claim", _free_of_charge),
    "ranks are not padded": (transfer, "zero", lambda *_: None),
}
"""Whose attribute, its name, and what stands there instead."""


# A play that ends half-way may leave handles, which say so when they are forgotten.
@pytest.mark.filterwarnings("ignore:an adapter handle .* was never released:ResourceWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[name])
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)
    noticed: list[AssertionError] = []

    @seed(4)  # by which each is met within some dozens of plays
    @settings(QUICK, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)
    @given(scenes, plans)
    def examples(scene: Scene, plan: list[Step]) -> None:
        if noticed:  # Hypothesis would play it again, for threads that take other turns
            raise noticed[0]
        try:
            play(scene, plan, seconds=1.0)
        except AssertionError as fault:
            noticed.append(fault)
            raise

    with pytest.raises(AssertionError):
        examples()
