"""Former name of `lorax_async.observability.prometheus`, kept for compatibility."""

from lorax_async.observability.prometheus import LoaderCollector

__all__ = ["LoaderCollector"]
