"""Turn requests into batches while their adapters load.

A request whose adapter is missing delays no other request. Files:

- `scheduler`: `AdapterScheduler`, the public API, and its batches;
- `requests`: requests, tickets, clients, and the queue of one adapter's requests;
- `adapter_queues`: all queues and slots, driven by the loader's events;
- `look_ahead`: which adapters without a slot to load or to prefetch;
- `admission`: which requests get the engine's places, rows and tokens;
- `estimates`: when layers arrive, and how long a pass takes.

It knows `AdapterLoader` and its handles, and no engine.
"""

from lorax_async.scheduler.scheduler import AdapterScheduler

__all__ = ["AdapterScheduler"]
