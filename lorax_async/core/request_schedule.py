"""Requests that come when they come: when each is due, and which adapter it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from lorax_async.core.popularity import Zipf
from lorax_async.errors import ConfigError

MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """`due` seconds after the beginning, and which adapter it names."""

    due: float
    model: str


def schedule(
    uniform: Callable[[], float],
    models: Sequence[str],
    *,
    rate: float,
    seconds: float,
    exponent: float,
    cold_share: float,
) -> list[Arrival]:
    """Poisson arrivals over `seconds`, of requests for adapters by Zipf's law.

    Parameters
    ----------
    uniform
        Gives numbers drawn evenly from [0, 1): three for each arrival. The first makes the time
        since the one before, -ln(1 - u) / rate; the second says whether it is to name an adapter
        that nobody named (u < cold_share); the third whom it names if not.
    models
        The most popular first. The last of them are those that are named once each, as many as it
        takes.

    Raises
    ------
    ConfigError
        A number is out of range, or there are too few models.
    """
    if not (0 < rate < float("inf") and 0 < seconds < float("inf") and 0 <= cold_share <= 1):
        raise ConfigError("a rate and a duration are more than 0, and a share is from 0 to 1")
    if rate * seconds > MOST:
        raise ConfigError(f"{rate:g} a second for {seconds:g} s are over {MOST:,} requests")
    drawn: list[tuple[float, bool, float]] = []
    due = -log(1 - uniform()) / rate
    while due < seconds:
        drawn.append((due, uniform() < cold_share, uniform()))
        due += -log(1 - uniform()) / rate
    return _named(drawn, models, exponent)


def _named(
    drawn: Sequence[tuple[float, bool, float]], models: Sequence[str], exponent: float
) -> list[Arrival]:
    once = sum(is_new for _, is_new, _ in drawn)
    popular = len(models) - once
    if popular < (once < len(drawn)):
        raise ConfigError(
            f"{once:,} requests are to name an adapter for the first time, and {len(models):,}"
            " models are too few for that and those that are named again"
        )
    fresh = iter(models[popular:])
    zipf = Zipf(popular, exponent) if popular else None
    return [
        Arrival(due, next(fresh) if is_new or zipf is None else models[zipf.pick(number)])
        for due, is_new, number in drawn
    ]
