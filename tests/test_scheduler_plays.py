"""Requests, loads and passes in virtual time, on the simulated device, judged from outside.

Nobody waits for ever; no row is computed before its adapter may join, no layer before its weights;
nobody's batches are longer or fewer for adapters that do not come; and nothing is left.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from common import LOOPS
from contention.adapters import IDS
from lorax_async import Request
from lorax_async.core.arrival_estimate import Arrival
from lorax_async.scheduling import picking
from lorax_async.scheduling.guestbook import Guestbook
from lorax_async.scheduling.guests import Guest
from scheduling.link import Conduct
from scheduling.play import Step, play
from scheduling.world import MISSING, Scene

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
steps = (
    st.builds(Step, pauses, requests)
    | st.builds(Step, pauses, requests)
    | st.builds(Step, pauses, st.none(), st.integers(0, 7))
)
plans = st.lists(steps, min_size=1, max_size=16)

QUICK = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@settings(QUICK, max_examples=12)
@given(scenes, plans)
def test_some_plays(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


@pytest.mark.slow
@QUICK
@given(scenes, plans)
def test_many_plays(scene: Scene, plan: list[Step]) -> None:
    play(scene, plan)


@pytest.mark.soak
@settings(QUICK, max_examples=2000, derandomize=False)
@given(scenes, plans)
def test_thousands_of_plays(scene: Scene, plan: list[Step]) -> None:
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


def _asks(pause: float, id: str | None, prompt: int, new: int) -> Step:
    return Step(pause, Request(id, prompt, new))


_NEVER, _LAST = COLD["never begins"], COLD["stalls before its last layer"]
TELLING: dict[str, Play] = {
    "the only slot is taken by one that stalls": _one(
        1, 8, [_asks(0.0, "c", 5, 1), _asks(0.01, "a", 5, 1)], c=_NEVER
    ),
    "and another one comes only then": _one(
        1, 8, [_asks(0.0, "c", 5, 1), _asks(0.01, "a", 5, 1), _asks(0.1, "b", 5, 1)], c=_LAST
    ),
    "one joined alone and is too slow once there are others": _one(
        2, 8, [_asks(0.0, "c", 5, 2), _asks(0.002, None, 5, 9)], c=SLOW
    ),
    "one joins others and then stops": _one(
        2, 8, [_asks(0.0, None, 5, 9), _asks(0.02, "c", 5, 2)], c=_LAST
    ),
    "one fails": _one(2, 8, [_asks(0.0, id, 5, 3) for id in "acb"], c=Conduct(0.001, 0.0, "fails")),
    "more than fits, of one adapter most of all, and two engines": _one(
        3, 2, [_asks(0.0, id, 150, 3) for id in "aaaab"], engines=2
    ),
    "one is cancelled while it is computed": _one(
        2, 8, [_asks(0.0, "a", 5, 9), Step(0.03), _asks(0.0, "b", 5, 2)]
    ),
}

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


@pytest.mark.parametrize("name", TELLING)
def test_plays_that_tell_much(name: str) -> None:
    play(*TELLING[name])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = FAULTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)
    noticed = []
    for scene, plan in TELLING.values():
        try:
            play(scene, plan)
        except Exception as fault:
            noticed.append(fault)
            break
    assert noticed
