"""The devices, by the names that `LoaderConfig.device` has for them."""

from __future__ import annotations

from lorax_async.config import LoaderConfig
from lorax_async.devices.base import Device
from lorax_async.devices.cpu import CpuDevice
from lorax_async.planning.layout import ModelLayout


def make_device(layout: ModelLayout, config: LoaderConfig) -> Device:
    """The device that the settings name, not opened yet."""
    dtype = config.storage_dtype or layout.dtype
    nbytes, slots = config.device_bytes, config.max_slots
    if config.device == "cpu":
        return CpuDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    if config.device == "simulated":
        from lorax_async.devices.simulated import SimulatedDevice  # noqa: PLC0415

        return SimulatedDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    return CudaDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots, device=config.device)
