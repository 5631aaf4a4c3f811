"""A loader's metrics and spans, for Prometheus and OpenTelemetry (docs/metrics.md).

Both are subscribers of one `AdapterLoader`, made and closed on its event loop, and use its public
API only. The loader does not know them. Importing this package needs the extra `metrics`.

- `prometheus.py`: `LoaderCollector`, a collector for a registry
- `opentelemetry.py`: `LoadSpans`, spans of calls; needs `opentelemetry-api`, import it from there
"""

from lorax_async.observability.prometheus import LoaderCollector

__all__ = ["LoaderCollector"]
