"""`LoaderCollector`: a loader's metrics for Prometheus. Needs the extra `metrics`."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import accumulate
from time import monotonic
from typing import Self, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lorax_async.concurrency import complete, running_loop
from lorax_async.errors import LoaderClosedError, Stage
from lorax_async.loader import AdapterLoader
from lorax_async.telemetry import Statistics, Usage

__all__ = ["LoaderCollector"]

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper bounds of the histogram's buckets, in seconds."""


def _totals(statistics: Statistics) -> Iterator[Metric]:
    for name, text, value in (
        ("moved_bytes", "Bytes that arrived on the device.", statistics.bytes_moved),
        ("fetches", "Adapters whose files were opened at their source.", statistics.fetches),
        ("loads", "Adapters that became resident.", statistics.loads),
        ("departures", "Adapters that began to leave their slot.", statistics.departures),
    ):
        yield CounterMetricFamily(f"lorax_{name}", text, value=value)


def _by_label(statistics: Statistics) -> Iterator[Metric]:
    stages: tuple[Stage, ...] = get_args(Stage)
    nbytes = {stage: statistics.nbytes.get(stage, 0) for stage in stages}
    seconds = {stage: statistics.seconds.get(stage, 0.0) for stage in stages}
    for name, text, label, values in (
        ("stage_bytes", "Bytes handled in a stage.", "stage", nbytes),
        ("stage_seconds", "Seconds of adapters in a stage.", "stage", seconds),
        ("hits", "Loads, by the tier at which they found their adapter.", "tier", statistics.hits),
        ("evictions", "Adapters that made room for others, by tier.", "tier", statistics.evictions),
    ):
        counter = CounterMetricFamily(f"lorax_{name}", text, labels=[label])
        for value, amount in values.items():
            counter.add_metric([value], amount)
        yield counter
    for name, text, kinds in (
        ("failures", "Loads that failed, each once.", statistics.failures_by),
        ("call_errors", "Calls of load, stream and pin that raised.", statistics.errors_by),
    ):
        counter = CounterMetricFamily(f"lorax_{name}", text, labels=["stage", "error"])
        for kind, count in sorted(kinds.items()):
            counter.add_metric(kind, count)
        yield counter


def _gauges(usage: Usage) -> Iterator[Metric]:
    used = GaugeMetricFamily("lorax_budget_used_bytes", "Bytes in use.", labels=["budget"])
    limit = GaugeMetricFamily("lorax_budget_limit_bytes", "Bytes of the budget.", labels=["budget"])
    for name in ("device", "host", "pinned", "memory", "cache"):
        if (budget := getattr(usage, f"{name}_bytes")) is not None:
            used.add_metric([name], budget.used)
            limit.add_metric([name], budget.limit)
    yield from (used, limit)
    for name, text, value in (
        ("slots_used", "Occupied slots of the device.", usage.slots.used),
        ("slots_limit", "Slots of the device.", usage.slots.limit),
        ("leases", "Handles that are not released.", usage.leases),
        ("waiting", "Waiters for adapters.", usage.waiting),
    ):
        yield GaugeMetricFamily(f"lorax_{name}", text, value=value)


def _lag_histogram(counts: Sequence[int], total: float) -> Metric:
    """Return the lags' histogram, by their counts per bucket and their sum."""
    buckets = zip((*map(str, BOUNDS), "+Inf"), accumulate(counts), strict=True)
    return HistogramMetricFamily(
        "lorax_loop_lag_seconds",
        "How late a timer on the loader's event loop was.",
        buckets=[(bound, float(count)) for bound, count in buckets],
        sum_value=total,
    )


LAG_PERIOD = 0.25
SCRAPE_SECONDS = 1.0


class LoaderCollector(Collector):
    """Collect one loader's metrics, for a registry of the embedding program.

    `collect` may be called from any thread and never blocks the loop. Once the loader is closed, it
    returns the last metrics.

    Parameters
    ----------
    loader
        Open. Create and close the collector on its event loop.
    lag_period
        Seconds between two measurements of the loop's lag. They end with `close`, or soon after the
        loader is closed.
    timeout
        Seconds for which a scrape in another thread waits for the loop. After that, it returns the
        metrics of the scrape before.

    Raises
    ------
    UsageError
        The loader is not open, or belongs to another loop.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        *,
        lag_period: float = LAG_PERIOD,
        timeout: float = SCRAPE_SECONDS,
    ) -> None:
        loader.statistics()  # raises unless the loader belongs to this loop
        if loader.closed:
            raise LoaderClosedError("the loader is closed")
        self._loader = loader
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._period = lag_period
        self._lags, self._lag_sum = [0] * (len(BOUNDS) + 1), 0.0
        self._start_timer()
        self._update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop measuring the loop's lag; `collect` still works. Idempotent; call on the loop."""
        self._timer.cancel()

    def _start_timer(self) -> None:
        self._due = monotonic() + self._period
        self._timer = self._loop.call_later(self._period, self._measure)

    def _measure(self) -> None:
        lag = max(0.0, monotonic() - self._due)
        self._lags[bisect_left(BOUNDS, lag)] += 1
        self._lag_sum += lag
        if not self._loader.closed:
            self._start_timer()

    def describe(self) -> Iterable[Metric]:
        """Return the last metrics, so that a registry can check their names."""
        statistics, usage, counts, total = self._last
        yield from _totals(statistics)
        yield from _by_label(statistics)
        yield from _gauges(usage)
        yield _lag_histogram(counts, total)

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        self._refresh()
        return self.describe()

    def _refresh(self) -> None:
        if running_loop() is self._loop or self._loop.is_closed():
            self._update()
            return
        updated: Future[None] = Future()
        try:
            self._loop.call_soon_threadsafe(complete, updated, self._update)
        except RuntimeError:  # the loop was closed just now
            return
        done, _ = wait([updated], self._timeout)
        if not done and updated.cancel():  # the loop is busy or has stopped
            return
        updated.result()  # raises what the update raised

    def _update(self) -> None:
        statistics, usage = self._loader.statistics(), self._loader.placement().usage
        self._last = statistics, usage, tuple(self._lags), self._lag_sum
