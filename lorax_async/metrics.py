"""`lorax_async.observability.prometheus`, by the name that it had first."""

from lorax_async.observability.prometheus import LoaderCollector

__all__ = ["LoaderCollector"]
