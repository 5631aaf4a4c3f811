"""`lorax_async.observability.opentelemetry`, by the name that it had first."""

from lorax_async.observability.opentelemetry import LoadSpans

__all__ = ["LoadSpans"]
