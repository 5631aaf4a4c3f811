"""Loaders whose memory is for few adapters: what of the others is in the disk cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

import tiny
from lorax_async import AdapterLoader, LoaderConfig
from lorax_async.testing import FakeSource

FILE = 14_500
"""Bytes of a tiny F32 adapter of rank 4 with its header, and less than 300 more."""

FILLERS = [f"filler {number}" for number in range(4)]
"""Other adapters that the loader's source has: as many as there are slots."""


def roomy(folder: Path, files: float, **settings: Any) -> AdapterLoader:
    """A loader with memory for so many tiny adapters, and a disk cache in `folder`."""
    plain: dict[str, Any] = {
        "device_bytes": 1 << 20,
        "max_slots": len(FILLERS),
        "io_threads": 2,
        "timeout": 20,
        "memory_bytes": int(files * FILE),
        "cache_dir": folder,
    }
    source = FakeSource()
    for number, name in enumerate(FILLERS):
        source.put(name, json.dumps(tiny.config()).encode(), save(tiny.tensors(1000 + number)))
    return AdapterLoader(tiny.layout(), LoaderConfig(**(plain | settings)), source=source)
