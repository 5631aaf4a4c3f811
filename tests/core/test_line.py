"""A queue by urgency: against a sorted list, and without growing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.adapter import AdapterKey
from lorax_async.core.line import Line

KEYS = [AdapterKey(name, ()) for name in "abcde"]
CHANGES = st.lists(
    st.tuples(st.sampled_from(KEYS), st.none() | st.tuples(st.booleans(), st.integers(0, 3))),
    max_size=300,
)


@settings(deadline=None, derandomize=True)
@given(CHANGES)
def test_the_head_is_the_most_urgent(
    changes: list[tuple[AdapterKey, tuple[bool, int] | None]],
) -> None:
    line: Line[tuple[bool, int]] = Line()
    waiting: dict[AdapterKey, tuple[bool, int]] = {}
    for key, urgency in changes:
        line.update(key, urgency)
        if urgency is None:
            waiting.pop(key, None)
        else:
            waiting[key] = urgency
        head = line.head
        if not waiting:
            assert head is None
        else:
            assert head is not None
            assert waiting[head] == min(waiting.values())


def test_of_equals_the_first_is_first() -> None:
    line: Line[tuple[bool, float]] = Line()
    for key in reversed(KEYS):
        line.update(key, (False, 1.0))
    left = []
    while (head := line.head) is not None:
        left.append(head)
        line.update(head, None)
    assert left == KEYS[::-1]


def test_wishes_that_come_and_go_behind_a_head_that_stays_take_no_memory() -> None:
    line: Line[tuple[bool, float]] = Line()
    line.update(KEYS[0], (False, 0.0))
    for n in range(10_000):
        line.update(KEYS[1], (False, 1.0 + n))
        line.update(KEYS[1], None)
        line.update(KEYS[2], (True, 1.0))
        line.update(KEYS[2], None)
    assert line.head == KEYS[0]
    assert len(line._heap) < 200
