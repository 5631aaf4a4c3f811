"""A loader's numbers for Prometheus (docs/metrics.md). Needs the extra `metrics`."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from time import monotonic
from types import TracebackType
from typing import NamedTuple, Self, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lorax_async.concurrency import running_loop
from lorax_async.errors import Stage
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.telemetry import Statistics, Usage

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper ends of the histogram's buckets, in seconds."""


class LoopLags(NamedTuple):
    """A histogram: how many lags were up to each of `BOUNDS`, then all; and their sum, seconds."""

    counts: Sequence[int]
    total: float


class LoopLag:
    """Looks every `period` seconds, until `close`, or until `ended` says so at a look.

    Parameters
    ----------
    loop
        The running one.
    clock
        Seconds, as of `time.monotonic`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        period: float,
        ended: Callable[[], bool],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._loop = loop
        self._period = period
        self._ended = ended
        self._clock = clock
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._set()

    @property
    def running(self) -> bool:
        return self._timer is not None

    def lags(self) -> LoopLags:
        """Since it began."""
        counts, below = [], 0
        for count in self._counts:
            below += count
            counts.append(below)
        return LoopLags(tuple(counts), self._total)

    def close(self) -> None:
        """Look no more. Idempotent; on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self._due = self._clock() + self._period
        self._timer = self._loop.call_later(self._period, self._look)

    def _look(self) -> None:
        self._timer = None
        lag = max(0.0, self._clock() - self._due)
        self._counts[bisect_left(BOUNDS, lag)] += 1
        self._total += lag
        if not self._ended():
            self._set()


STAGES: tuple[Stage, ...] = get_args(Stage)


class LoaderNumbers(NamedTuple):
    """All of a loader at one moment."""

    statistics: Statistics
    usage: Usage
    lags: LoopLags


def families_of(numbers: LoaderNumbers) -> Iterator[Metric]:
    """Every family, with its samples."""
    statistics, usage, lags = numbers
    yield from _totals(statistics)
    yield from _by_words(statistics)
    yield from _now(usage)
    buckets = zip((*map(str, BOUNDS), "+Inf"), lags.counts, strict=True)
    yield HistogramMetricFamily(
        "lorax_loop_lag_seconds",
        "How late a timer on the loader's event loop was.",
        buckets=[(bound, float(count)) for bound, count in buckets],
        sum_value=lags.total,
    )


def _totals(told: Statistics) -> Iterator[Metric]:
    for name, text, value in (
        ("moved_bytes", "Bytes that arrived on the device.", told.bytes_moved),
        ("fetches", "Adapters whose files were opened at their source.", told.fetches),
        ("loads", "Adapters that became resident.", told.loads),
        ("departures", "Adapters that were told to leave their slot.", told.departures),
        ("spills", "Adapters given as tensors that went to the disk cache.", told.spills),
    ):
        yield CounterMetricFamily(f"lorax_{name}", text, value=value)


def _by_words(told: Statistics) -> Iterator[Metric]:
    nbytes = {stage: told.nbytes.get(stage, 0) for stage in STAGES}
    seconds = {stage: told.seconds.get(stage, 0.0) for stage in STAGES}
    for name, text, word, values in (
        ("stage_bytes", "Bytes handled in a stage.", "stage", nbytes),
        ("stage_seconds", "Seconds of adapters in a stage.", "stage", seconds),
        ("hits", "Loads, by the tier at which they found their adapter.", "tier", told.hits),
        ("evictions", "Adapters that made room for others, by tier.", "tier", told.evictions),
    ):
        counter = CounterMetricFamily(f"lorax_{name}", text, labels=[word])
        for value, amount in values.items():
            counter.add_metric([value], amount)
        yield counter
    for name, text, kinds in (
        ("failures", "Loads that failed, each once.", told.failures_by),
        ("call_errors", "Calls of load, stream and pin that raised.", told.errors_by),
    ):
        counter = CounterMetricFamily(f"lorax_{name}", text, labels=["stage", "error"])
        for kind, count in sorted(kinds.items()):
            counter.add_metric(kind, count)
        yield counter


def _now(usage: Usage) -> Iterator[Metric]:
    used = GaugeMetricFamily("lorax_budget_used_bytes", "Bytes taken.", labels=["budget"])
    limit = GaugeMetricFamily("lorax_budget_limit_bytes", "Bytes there are.", labels=["budget"])
    for name, budget in (
        ("device", usage.device_bytes),
        ("host", usage.host_bytes),
        ("pinned", usage.pinned_bytes),
        ("memory", usage.memory_bytes),
        ("cache", usage.cache_bytes),
    ):
        if budget is not None:
            used.add_metric([name], budget.used)
            limit.add_metric([name], budget.limit)
    yield from (used, limit)
    for name, text, value in (
        ("slots_used", "Slots of the device that have an adapter.", usage.slots.used),
        ("slots_limit", "Slots of the device.", usage.slots.limit),
        ("leases", "Handles that are out.", usage.leases),
        ("waiting", "Wishes for adapters that have not come true.", usage.waiting),
    ):
        yield GaugeMetricFamily(f"lorax_{name}", text, value=value)


LAG_PERIOD = 0.25
ANSWER_SECONDS = 1.0


class LoaderCollector(Collector):
    """The numbers of one loader, for a registry of the embedding program.

    Parameters
    ----------
    loader
        Open. This is made on its event loop, and closed there.
    lag_period
        Seconds between two looks at how late the loop is; they end with `close`, or soon after the
        loader's end.
    timeout
        Seconds for which a scrape in another thread waits for the loop. Then it gets the numbers of
        the scrape before.

    `collect` may be called from any thread and never keeps the loop waiting. Once the loader is
    closed it goes on with the last numbers.

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
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        loader.statistics()  # raises unless it is open, and here
        self._loader = loader
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._lag = LoopLag(self._loop, lag_period, lambda: loader.closed)
        self._last = self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the looks at the loop; `collect` goes on without. Idempotent; on the loop."""
        self._lag.close()

    def describe(self) -> Iterable[Metric]:
        """The families, for a registry to see whether their names are free. Asks nobody."""
        return families_of(self._last)

    def collect(self) -> Iterable[Metric]:
        """The families with their numbers of now."""
        self._refresh()
        return families_of(self._last)

    def _refresh(self) -> None:
        if running_loop() is self._loop or self._loop.is_closed():
            self._look()
            return
        answer: Future[None] = Future()
        try:
            self._loop.call_soon_threadsafe(self._answer, answer)
        except RuntimeError:  # it was closed now
            return
        done, _ = wait([answer], self._timeout)
        if not done and answer.cancel():  # the loop is busy or has stopped
            return
        answer.result()  # raises what the look has raised

    def _answer(self, answer: Future[None]) -> None:
        """On the loop. Whoever asked may have gone: then nobody needs it."""
        if not answer.set_running_or_notify_cancel():
            return
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            answer.set_exception(error)
        else:
            answer.set_result(None)

    def _look(self) -> LoaderNumbers:
        self._last = LoaderNumbers(*self._loader.last_numbers(), self._lag.lags())
        return self._last
