"""Former name of `lorax_async.observability.opentelemetry`, kept for compatibility."""

from lorax_async.observability.opentelemetry import LoadSpans

__all__ = ["LoadSpans"]
