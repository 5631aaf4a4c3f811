"""When layers are expected and who may join, worked out by hand."""

from __future__ import annotations

from math import inf

import pytest

from lorax_async.core.arrival_estimate import LATE, Arrival, Course, Courses

LAYERS = (0, 1, 2, 3)


def arrival(course: Course | None = None, nbytes: int = 400, since: float = 10.0) -> Arrival:
    return Arrival(LAYERS, nbytes, since, Course() if course is None else course)


def test_nothing_is_expected_before_something_came() -> None:
    load = arrival()
    assert load.expected(10.0) is None
    assert load.joins_at(10.0, 100.0, 4) == inf
    assert load.latest == 10.0


def test_nothing_is_expected_of_what_came_in_no_time() -> None:
    load = arrival()
    load.note(0, 10.0)
    assert load.expected(10.0) is None
    load.note(1, 12.0)
    assert load.expected(12.0) == pytest.approx([13.0, 14.0])


def test_the_rest_is_expected_as_the_first_came() -> None:
    load = arrival()
    load.note(0, 12.0)
    assert load.arrived == 1
    assert load.latest == 12.0
    assert load.expected(12.0) == pytest.approx([14.0, 16.0, 18.0])


def test_several_may_come_at_once() -> None:
    load = arrival()
    load.note(2, 13.0)
    assert load.arrived == 3
    assert load.expected(13.0) == pytest.approx([14.0])


def test_what_is_late_is_expected_later_and_later() -> None:
    load = arrival()
    load.note(0, 12.0)
    assert load.expected(14.0) == pytest.approx([14.0, 16.0, 18.0])
    # After 10 s the second layer is expected after 11, and the others in proportion.
    assert load.expected(20.0) == pytest.approx([10 + 10 * LATE * n for n in (1, 1.5, 2)])


def test_a_pass_may_begin_when_no_layer_is_computed_before_it_is_expected() -> None:
    load = arrival()
    load.note(0, 12.0)  # the others at 14, 16, 18
    # A second per layer: layer 3 is computed 3 s after the beginning, and expected at 18.
    assert load.joins_at(12.0, 4.0, 4) == pytest.approx(15.0)
    # Three seconds per layer: layer 1 is the one to wait for, at 14 - 3.
    assert load.joins_at(12.0, 12.0, 4) == pytest.approx(11.0)
    assert load.joins_at(12.0, None, 4) == pytest.approx(18.0)


def test_groups_outside_of_the_layers_are_needed_at_the_beginning_and_at_the_end() -> None:
    load = Arrival((-1, 0, 1, 2), 300, 0.0, Course())
    load.note(-1, 1.0)  # the others at 2, 3, 4
    # Two layers of 1 s: 0 at once, 1 after 1 s, the head (2) after 2 s.
    assert load.joins_at(1.0, 2.0, 2) == pytest.approx(2.0)


def test_one_that_has_stopped_does_not_join() -> None:
    load = arrival()
    load.note(2, 13.0)  # the last one is expected at 14
    assert load.joins_at(13.0, 4.0, 4) <= 13.0
    assert load.joins_at(110.0, 4.0, 4) > 110.0


def test_a_load_teaches_the_course_of_the_next_one() -> None:
    course = Course()
    first = arrival(course)
    first.note(0, 11.0)
    first.note(3, 18.0)  # the rest at once, after 8 s
    assert course.per_byte == pytest.approx(8.0 / 400)
    assert course.part(0.25) == pytest.approx(1 / 8)
    assert course.part(0.5) == pytest.approx(1.0)
    second = arrival(course, since=0.0)
    second.note(0, 2.0)  # half as fast
    assert second.expected(2.0) == pytest.approx([16.0, 16.0, 16.0])


def test_courses_are_averaged() -> None:
    course = Course()
    course.note([4.0], 4)
    course.note([8.0], 4)
    assert course.per_byte == pytest.approx(1.5)
    course.note([0.0], 4)  # no time has passed: it says nothing
    assert course.per_byte == pytest.approx(1.5)


def test_a_load_that_nobody_saw_begin_teaches_nothing() -> None:
    course = Course()
    course.note([1.0, 2.0, 3.0, 4.0], 400)
    load = arrival(course)
    load.missed(2)
    assert load.arrived == 2
    assert load.expected(10.0) == pytest.approx([13.0, 14.0])  # as others went
    load.note(3, 30.0)
    assert course.per_byte == pytest.approx(4.0 / 400)


def test_each_kind_has_its_course() -> None:
    courses = Courses()
    assert courses.of("file") is courses.of("file")
    assert courses.of("file") is not courses.of("hub")
