"""When requests are due and what they name, worked out from the numbers that were drawn."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest

from lorax_async.core.request_schedule import Arrival, schedule
from lorax_async.errors import ConfigError


def drawn(*numbers: float) -> Callable[[], float]:
    left = list(numbers)
    return lambda: left.pop(0)


def made(uniform: Callable[[], float], models: list[str], **changes: float) -> list[Arrival]:
    plain = {"rate": 2.0, "seconds": 1.0, "exponent": 1.0, "cold_share": 0.5}
    return schedule(uniform, models, **(plain | changes))


def test_three_numbers_make_an_arrival() -> None:
    """Gaps are -ln(1 - u) / 2: of u = 1/2 they are ln(2) / 2, of u = 0 nothing."""
    half = math.log(2) / 2
    uniform = drawn(0.5, 0.9, 0.0, 0.5, 0.1, 0.7, 0.0, 0.6, 0.7, 0.5)
    # a, b are left for Zipf (2 : 1), for one of three is cold; 0.0 is a and 0.7 is b.
    assert made(uniform, ["a", "b", "new"]) == [
        Arrival(half, "a"),
        Arrival(2 * half, "new"),
        Arrival(2 * half, "b"),
    ]


def test_arrivals_of_a_seed_are_those_of_its_draws() -> None:
    models = [f"m{n}" for n in range(400)]
    arrivals = made(random.Random(11).random, models, rate=20, seconds=30, cold_share=0.25)
    draws, due, expected = random.Random(11), 0.0, []
    while True:
        due += -math.log(1 - draws.random()) / 20
        if due >= 30:
            break
        expected.append((due, draws.random() < 0.25, draws.random()))
    assert [each.due for each in arrivals] == [due for due, *_ in expected]
    once = sum(cold for _, cold, _ in expected)
    assert 100 < once < 200 < 500 < len(expected) < 700
    popular = models[: 400 - once]
    weights = [1 / (n + 1) for n in range(len(popular))]
    fresh = iter(models[400 - once :])
    for arrival, (_, cold, number) in zip(arrivals, expected, strict=True):
        if cold:
            assert arrival.model == next(fresh)
            continue
        place = popular.index(arrival.model)
        assert sum(weights[:place]) <= number * sum(weights) * (1 + 1e-9)
        assert number * sum(weights) <= sum(weights[: place + 1]) * (1 + 1e-9)
    named = Counter(each.model for each in arrivals)
    assert named["m0"] > named["m9"] > 0


def test_all_may_be_cold() -> None:
    arrivals = made(random.Random(1).random, [str(n) for n in range(50)], cold_share=1.0)
    assert len({each.model for each in arrivals}) == len(arrivals) > 0


def test_nobody_may_come() -> None:
    assert made(drawn(0.999), ["a"]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rate": 0}, "more than 0"),
        ({"rate": float("inf")}, "more than 0"),
        ({"seconds": -1}, "more than 0"),
        ({"cold_share": 1.5}, "from 0 to 1"),
        ({"cold_share": 1.0}, "too few"),
        ({"cold_share": 0.5}, "too few"),
        ({"exponent": -1, "cold_share": 0}, "Zipf's law"),
        ({"rate": 1e7, "seconds": 10}, "over"),
    ],
)
def test_what_cannot_be(changes: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        made(random.Random(0).random, ["a", "b"], **({"rate": 50.0} | changes))
