"""Devices: an arena for slots, a pointer table, and copies into them.

- `base`: the interface of a device, and its copy tickets
- `cpu`: host memory; files are read straight into the arena
- `cuda`: a GPU; pinned staging, one copy stream, events
- `simulated`: an asynchronous device without hardware, for tests
- `staging`: the ring of host buffers in which layer groups are cast and padded
- `streams`: streams, events and errors of an accelerator, and the threads that wait for events
- `pointer_table`: a GPU's pointer table, and its pinned images of rows
- `transfer`: the copy of one layer group: read, cast, check, send

The package may know `planning`, `files`, `tracing` and the lifecycle's `Extent`. It knows no event
loop, source or lease.
"""

from __future__ import annotations

from lorax_async.config import LoaderConfig
from lorax_async.devices.base import Device
from lorax_async.devices.cpu import CpuDevice
from lorax_async.planning.layout import ModelLayout


def make_device(layout: ModelLayout, config: LoaderConfig) -> Device:
    """Return the device that the settings name, not yet open."""
    dtype = config.storage_dtype or layout.dtype
    nbytes, slots = config.device_bytes, config.max_slots
    if config.device == "cpu":
        return CpuDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    if config.device == "simulated":
        from lorax_async.devices.simulated import SimulatedDevice  # noqa: PLC0415

        return SimulatedDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    return CudaDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots, device=config.device)
