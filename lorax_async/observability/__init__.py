"""A loader's numbers for Prometheus (docs/metrics.md). Needs the extra `metrics`."""

from lorax_async.observability.prometheus import LoaderCollector

__all__ = [
    "LoaderCollector",
]
