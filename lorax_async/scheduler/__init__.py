"""Turn requests into batches while their adapters load.

A request whose adapter is missing delays no other request. Files:

- `scheduler`: `AdapterScheduler`, the public API;
- `requests`: requests, tickets, clients and the clock;
- `step`: a batch and its rows; the pass-time model;
- `admission`: which requests get the engine's places, rows and tokens;
- `adapter_queue`: one adapter's requests and the expected arrival of its layers;
- `adapter_queues`: all queues, driven by the loader's events: loads, prefetches, slots.

It knows `AdapterLoader` and its handles, and no engine.
"""

from lorax_async.scheduler.scheduler import AdapterScheduler

__all__ = ["AdapterScheduler"]
