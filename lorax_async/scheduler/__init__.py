"""Requests for adapters become batches, as adapters become ready.

A request whose adapter is not ready blocks nobody. `adapter_queues` follows the loader's events,
`admission` chooses the rows of a batch, `step` is what an engine computes at once.
"""

from lorax_async.scheduler.scheduler import AdapterScheduler

__all__ = ["AdapterScheduler"]
