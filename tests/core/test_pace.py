"""Predictions of passes, worked out by hand."""

from __future__ import annotations

import pytest

from lorax_async.core.pace import DECAY, Pace


def seen(*passes: tuple[int, float]) -> Pace:
    pace = Pace()
    for tokens, seconds in passes:
        pace.note(tokens, seconds)
    return pace


def test_nothing_is_known_at_first() -> None:
    assert Pace().predict(10) is None


def test_of_one_size_smaller_ones_are_shorter_and_larger_ones_no_longer() -> None:
    pace = seen((100, 2.0), (100, 2.0))
    assert pace.predict(100) == pytest.approx(2.0)
    assert pace.predict(50) == pytest.approx(1.0)
    assert pace.predict(200) == pytest.approx(2.0)


def test_a_line_is_found_again() -> None:
    pace = seen(*((n, 0.5 + 0.01 * n) for n in (1, 200, 8, 64)))
    for tokens in (1, 100, 1000):
        assert pace.predict(tokens) == pytest.approx(0.5 + 0.01 * tokens)


def test_a_pass_without_tokens_does_not_take_less_than_nothing() -> None:
    pace = seen((10, 0.1), (20, 0.9))  # the line would be at -0.7 for 0
    mean_tokens, mean_seconds = (10 * DECAY + 20) / (DECAY + 1), (0.1 * DECAY + 0.9) / (DECAY + 1)
    assert pace.predict(5) == pytest.approx(mean_seconds * 5 / mean_tokens)


def test_larger_ones_that_were_faster_make_no_line_downwards() -> None:
    pace = seen((10, 1.0), (20, 0.5))
    assert pace.predict(1000) == pytest.approx((1.0 * DECAY + 0.5) / (DECAY + 1))


def test_the_latest_count_most() -> None:
    pace = seen(*[(10, 1.0)] * 50, *[(10, 2.0)] * 50)
    assert pace.predict(10) == pytest.approx(2.0, rel=0.01)
