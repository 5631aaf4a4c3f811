"""The numbers of a loader as families of metrics; their names are an interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from lorax_async.errors import Stage
from lorax_async.metrics.loop_lag import BOUNDS, Lags
from lorax_async.runtime.journal import Statistics
from lorax_async.runtime.usage import Usage

STAGES: tuple[Stage, ...] = get_args(Stage)


class Numbers(NamedTuple):
    """All of a loader at one moment."""

    statistics: Statistics
    usage: Usage
    lags: Lags


def families_of(numbers: Numbers) -> Iterator[Metric]:
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
