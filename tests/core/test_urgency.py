"""Who comes first, and how far one looks ahead."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.urgency import LookAhead, Reach, urgency

LEVEL = 5.0


@pytest.mark.parametrize(
    ("since", "priority", "deadline", "expected"),
    [
        (100.0, 0, inf, 100.0),
        (100.0, 2, inf, 90.0),
        (100.0, -1, inf, 105.0),
        (100.0, 0, 105.0, 100.0),  # as long as a level: as if there were none
        (100.0, 0, 102.0, 97.0),  # 3 s less than a level: as if it had waited for 3 s
        (100.0, 1, 101.0, 91.0),
    ],
)
def test_urgency(since: float, priority: int, deadline: float, expected: float) -> None:
    assert urgency(since, priority, deadline, LEVEL) == expected


@given(st.floats(0, 1e6), st.integers(-3, 3), st.floats(0, 1e3), st.integers(-3, 3))
def test_a_low_priority_waits_for_a_bounded_time(
    since: float, low: int, later: float, high: int
) -> None:
    """Whoever comes later than by the levels between, and one for a deadline, is behind."""
    old = urgency(since, low, inf, LEVEL)
    after = since + LEVEL * max(0, high - low) + LEVEL + 1 + later
    assert old < urgency(after, high, after, LEVEL)


def test_look_ahead_goes_from_loads_to_the_device_to_the_host() -> None:
    ahead = LookAhead(loads=2, slots=5, hints=3)
    load, device, host = Reach.LOAD, Reach.DEVICE, Reach.HOST
    assert ahead.reaches(0) == [load, load, device, device, device, host, host, host]
    assert ahead.reaches(2) == [load, load, device, host, host, host]
    assert ahead.reaches(4) == [load, load, host, host, host]
    assert ahead.reaches(5) == [load, load, host, host, host]
