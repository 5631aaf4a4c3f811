"""When requests of a benchmark are due, and what is reported of their answers, by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_async.commands.benching.open_loop import NOT_SENT, Played
from lorax_async.commands.benching.picture import draw, require
from lorax_async.commands.benching.report import percentile, spread, summary
from lorax_async.commands.benching.streaming_client import Answer
from lorax_async.core.request_schedule import Arrival, schedule
from lorax_async.errors import ConfigError

# -- due -------------------------------------------------------------------------------------------


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


def test_all_may_be_cold_and_none_may_come() -> None:
    arrivals = made(random.Random(1).random, [str(n) for n in range(50)], cold_share=1.0)
    assert len({each.model for each in arrivals}) == len(arrivals) > 0
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
def test_impossible_schedules_are_refused(changes: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        made(random.Random(0).random, ["a", "b"], **({"rate": 50.0} | changes))


# -- reported --------------------------------------------------------------------------------------


def answer(due: float, *, cold: bool = False, **said: object) -> Answer:
    return Answer(Arrival(due, "m"), cold, **said)  # type: ignore[arg-type]


ANSWERS = [
    # 101 ms to the first of three, 1 of which late; then 50 and 150 ms, for 4 more tokens
    answer(1.0, sent=1.001, chunks=[1.101, 1.151, 1.301], ended=1.4, tokens=5, prompt_tokens=8),
    # 303 ms; the server says no tokens, so that two pieces count; 3 ms late
    answer(2.0, cold=True, sent=2.003, chunks=[2.303, 2.323], ended=2.4, prompt_tokens=10),
    # an answer without any text is whole, too
    answer(3.0, sent=3.0, ended=3.1, tokens=0),
    # broken after a piece: it counts for what came, and not for times
    answer(3.5, sent=3.5, chunks=[3.6], ended=4.0, error="hang-up"),
    answer(3.6, sent=3.6, ended=3.7, status=429, error="429"),
    answer(3.7, cold=True, ended=3.7, error=NOT_SENT),
]


def test_percentiles_are_values_that_occur() -> None:
    values = [float(n) for n in range(1, 11)]
    assert [percentile(values, p) for p in (50, 90, 99, 100, 1)] == [5, 9, 10, 10, 1]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7
    assert spread([0.003, 0.001, 0.002]) == {"p50": 2, "p90": 3, "p99": 3, "max": 3}
    assert spread([]) is None


def test_a_summary_by_warm_and_cold() -> None:
    told = summary(Played(ANSWERS, most_at_once=2))
    assert (told["seconds"], told["most_at_once"]) == (4.0, 2)
    assert told["late_ms"] == pytest.approx({"p50": 0, "p90": 3, "p99": 3, "max": 3})
    warm, cold, all = told["warm"], told["cold"], told["all"]
    assert (all["requests"], all["whole"]) == (6, 3)
    assert all["errors"] == {"hang-up": 1, "429": 1, NOT_SENT: 1}
    assert (warm["requests"], warm["whole"], warm["errors"]) == (4, 2, {"hang-up": 1, "429": 1})
    assert warm["ttft_ms"] == pytest.approx({"p50": 101, "p90": 101, "p99": 101, "max": 101})
    assert warm["between_chunks_ms"] == pytest.approx(
        {"p50": 50, "p90": 150, "p99": 150, "max": 150}
    )
    assert (warm["chunks"], warm["tokens"]) == (4, 6)  # 3 and the 1 that was cut; 5 and that one
    assert warm["tokens_per_second"] == 6 / 4
    assert warm["requests_per_second"] == 2 / 4
    assert (warm["prompt_tokens_mean"], all["prompt_tokens_mean"]) == (8, 9)
    assert cold["ttft_ms"] == pytest.approx({"p50": 303, "p90": 303, "p99": 303, "max": 303})
    assert all["per_token_ms"] == pytest.approx({"p50": 20, "p90": 50, "p99": 50, "max": 50})
    assert (cold["requests"], cold["tokens"], cold["errors"]) == (2, 2, {NOT_SENT: 1})


def test_nothing_is_no_error() -> None:
    told = summary(Played())
    assert told["seconds"] == told["all"]["tokens_per_second"] == 0
    assert told["late_ms"] is told["cold"]["ttft_ms"] is None


@pytest.mark.parametrize("answers", [ANSWERS, ANSWERS[3:], []])
def test_a_picture_is_drawn(tmp_path: Path, answers: list[Answer]) -> None:
    draw(tmp_path / "out.png", answers)
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["out.nonsense", "out", "folder.png", "nowhere/out.png"])
def test_where_no_picture_can_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=name):
        require(tmp_path / name)
    require(tmp_path / "out.png")
