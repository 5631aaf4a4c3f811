"""Waits between attempts, and what a Retry-After means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.retries import Retries, retry_after_of

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def test_waits_double_up_to_the_most() -> None:
    retries = Retries(attempts=7, base=1.0, most=8.0)
    assert [retries.wait(failed, 0.5) for failed in range(1, 8)] == [0.5, 1, 2, 4, 4, 4, None]


def test_a_source_is_obeyed_within_reason() -> None:
    retries = Retries(obeyed=30.0, base=0.5)
    assert retries.wait(1, 0.5, retry_after=10.0) == pytest.approx(10.25)
    assert retries.wait(1, 0.0, retry_after=30.0) == 30.0
    assert retries.wait(1, 0.0, retry_after=30.1) is None
    assert retries.wait(1, 0.0, retry_after=86_400.0) is None


@given(
    failed=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
    after=st.none() | st.floats(0, 1e9),
)
def test_no_wait_is_longer_than_it_may_be(failed: int, draw: float, after: float | None) -> None:
    retries = Retries(attempts=20_000)
    wait = retries.wait(failed, draw, after)
    if wait is not None:
        assert (after or 0.0) <= wait <= max(retries.most, retries.obeyed + 1.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("9" * 40, None),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 +2400", None),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert retry_after_of(text, NOW) == seconds
