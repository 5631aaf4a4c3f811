"""Requests, loads and passes in virtual time, on the simulated device, judged from outside.

Nobody waits for ever; no row is computed before its adapter may join, no layer before its weights;
nobody's batches are longer or fewer for adapters that do not come; and nothing is left.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from common import LOOPS
from contention.adapters import IDS
from lorax_async import Request
from lorax_async.core.arrival_estimate import Arrival
from lorax_async.scheduling import picking
from lorax_async.scheduling.guestbook import Guestbook
from lorax_async.scheduling.guests import Guest
from scheduling.link import Conduct
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


# -- who does not come costs the others nothing ----------------------------------------------------

WARM = Conduct(0.0, 0.0)
COLD = {
    "comes slowly": Conduct(0.05, 0.05),
    "comes in time": Conduct(0.001, 0.002),
    "never begins": Conduct(0.0, 0.0, "stalls", 0),
    "stalls in its midst": Conduct(0.001, 0.001, "stalls", 2),
    "stalls before its last layer": Conduct(0.001, 0.001, "stalls", 3),
    "fails in its midst": Conduct(0.001, 0.001, "fails", 2),
}
READY = [
    Step(pause, Request(id, 20, 6)) for pause in (0.0, 0.013, 0.021) for id in ("a", "b", None)
]


def scene(loop: str, conduct: Conduct) -> Scene:
    """Room for all: whoever is late is late for want of its adapter."""
    conducts = {id: WARM if id in "ab" else conduct for id in IDS}
    return Scene(loop, 6, 4096, 64, None, None, conducts)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", COLD)
def test_ready_requests_are_as_fast_beside_cold_ones(loop: str, name: str) -> None:
    alone = play(scene(loop, WARM), READY, "ab")
    cold = [Step(0.0, Request(id, 20, 6)) for id in "cdef"]
    beside = play(scene(loop, COLD[name]), [READY[0], *cold, *READY[1:]], "ab")
    ready = [beside.ended[0], *beside.ended[5:]]
    assert len(ready) == len(READY)
    for one, other in zip(alone.ended, ready, strict=True):
        assert one is not None
        assert other is not None
        # As many passes; these wait for layers within their budget of a tenth, and not again.
        assert other <= one + beside.waited + 0.001
    assert beside.waited <= 4 * 0.001 + 1e-9, "each of four adapters spends a budget once"


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_comes_in_time_does_not_wait_for_its_last_layer(loop: str) -> None:
    """A pass takes 40 ms; the one that begins at 40 finds two layers, the others come at 41 and 43."""
    slow = replace(scene(loop, COLD["comes in time"]), seconds=0.04)
    plan = [*READY[:3], Step(0.036, Request("c", 20, 1))]
    result = play(slow, plan, "ab")
    assert result.ended[3] == pytest.approx(0.08, abs=0.001)
    assert result.waited <= 0.004


# -- the plays can fail ----------------------------------------------------------------------------

Play = tuple[Scene, list[Step]]
SLOW = Conduct(0.001, 0.03)


def _one(
    slots: int, sequences: int, steps: list[Step], engines: int = 1, **conducts: Conduct
) -> Play:
    all_of_them = dict.fromkeys(IDS, Conduct(0.002, 0.001)) | conducts
    return Scene("asyncio", slots, 100, sequences, None, None, all_of_them, engines), steps


TELLING: list[Play] = [
    # The only slot is taken by one that stalls.
    _one(
        1,
        8,
        [Step(0.0, Request("c", 5, 1)), Step(0.01, Request("a", 5, 1))],
        c=COLD["never begins"],
    ),
    # So it is, and another one comes only then.
    _one(
        1,
        8,
        [
            Step(0.0, Request("c", 5, 1)),
            Step(0.01, Request("a", 5, 1)),
            Step(0.1, Request("b", 5, 1)),
        ],
        c=COLD["stalls before its last layer"],
    ),
    # One that joined alone and is too slow, once there are others.
    _one(2, 8, [Step(0.0, Request("c", 5, 2)), Step(0.002, Request(None, 5, 9))], c=SLOW),
    # One that joins others and then stops.
    _one(
        2,
        8,
        [Step(0.0, Request(None, 5, 9)), Step(0.02, Request("c", 5, 2))],
        c=COLD["stalls before its last layer"],
    ),
    # One that fails.
    _one(2, 8, [Step(0.0, Request(id, 5, 3)) for id in "acb"], c=Conduct(0.001, 0.0, "fails")),
    # More than fits, of one adapter most of all; and two engines.
    _one(3, 2, [Step(0.0, Request(id, 150, 3)) for id in "aaaab"], 2),
    # One whose row is computed when it is cancelled.
    _one(2, 8, [Step(0.0, Request("a", 5, 9)), Step(0.03), Step(0.0, Request("b", 5, 2))]),
]

FAULTS: dict[str, tuple[object, str, object]] = {
    "who streams joins at once": (Arrival, "joins_at", lambda self, now, seconds, layers: now),
    "who waited in vain joins again": (
        Guestbook,
        "begin_again",
        lambda self, ticket: setattr(ticket, "begun", ticket.begun),
    ),
    "batches are too large": (
        picking,
        "share",
        lambda wants, tokens, rows: [list(each) for each in wants],
    ),
    "who is in a batch is picked again": (
        Guest,
        "waiting",
        lambda self, most, fresh: self.tickets[:most],
    ),
    "a failed adapter is not noticed": (Guestbook, "fail", lambda self, guest, error: None),
    "a stuck slot is kept": (Guestbook, "_relieve", lambda self: None),
    "the oldest come last": (Guest, "add", lambda self, ticket: self.tickets.insert(0, ticket)),
    "handles are kept": (Guestbook, "landed", lambda self, guests: None),
    "the cancelled go on": (Guestbook, "leave", lambda self, ticket: None),
}


@pytest.mark.parametrize("number", range(len(TELLING)))
def test_plays_that_tell_much(number: int) -> None:
    play(*TELLING[number])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = FAULTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)
    noticed = []
    for scene, plan in TELLING:
        try:
            play(scene, plan)
        except Exception as fault:
            noticed.append(fault)
            break
    assert noticed
