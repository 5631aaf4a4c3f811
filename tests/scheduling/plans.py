"""Scenes and plans: arrivals, sizes, rates, failures, sources that stall, as they come."""

from __future__ import annotations

from hypothesis import strategies as st

import tiny
from contention.adapters import IDS
from lorax_async import Request
from scheduling.link import Conduct
from scheduling.play import Step
from scheduling.world import MISSING, Scene

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
