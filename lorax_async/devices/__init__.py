"""Devices: an arena for slots, a pointer table, and copies into them.

- `base`: the interface of a device, and its copy tickets
- `cpu`: host memory; files are read straight into the arena
- `cuda`: a GPU; pinned staging, one copy stream, events, the pointer table
- `simulated`: an asynchronous device without hardware, for tests
- `base_copies`: compares copies of the base's weights in adapters' files with the base
- `staging`: the ring of host buffers in which layer groups are cast and padded
- `streams`: streams, events and errors of an accelerator, and the threads that wait for events
- `transfer`: copies of layer groups: read, cast, check, send; the I/O threads that run them

The package may know `planning`, `files`, `telemetry` and the lifecycle's commands. It knows no
source or lease, and the event loop only through an `Inbox`.
"""
