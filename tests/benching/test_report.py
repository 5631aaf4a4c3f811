"""Percentiles, throughput and errors, worked out by hand; and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_async.commands.benching.open_loop import NOT_SENT, Played
from lorax_async.commands.benching.picture import draw, require
from lorax_async.commands.benching.report import percentile, spread, summary
from lorax_async.commands.benching.streaming_client import Answer
from lorax_async.core.request_schedule import Arrival
from lorax_async.errors import ConfigError


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
