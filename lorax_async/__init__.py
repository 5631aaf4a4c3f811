"""An asyncio streaming loader for LoRA adapters, embedded in an LLM server.

async with AdapterLoader(layout, LoaderConfig()) as loader:
    async with loader.load(Path("sql-adapter")) as adapter:
        ...
"""

import logging

from lorax_async import layouts
from lorax_async.config import Limits, LoaderConfig, LocalRoot, Shard, StoreConfig
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterTimeoutError,
    CapacityError,
    ConfigError,
    EvictedError,
    FetchError,
    FetchTimeoutError,
    HandleClosedError,
    IncompatibleAdapterError,
    IntegrityError,
    InternalError,
    InvalidAdapterIdError,
    InvalidTransitionError,
    LoaderClosedError,
    LoraxError,
    TransferError,
    UnsupportedAdapterError,
    UsageError,
)
from lorax_async.events import (
    BytesMoved,
    CallBegan,
    CallEnded,
    CallEvent,
    CallWaits,
    Event,
    Failed,
    HeaderChecked,
    LayerReady,
    Leaving,
    Resident,
    SlotFreed,
    SlotGranted,
    SlotId,
)
from lorax_async.handle import AdapterHandle, ModuleWeights
from lorax_async.ids import Allow, parse_adapter_id
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout
from lorax_async.runtime.folders import AdapterFolder, StoredAdapter
from lorax_async.runtime.placement import AdapterResidency, Placement
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.runtime.telemetry import Budget, Statistics, Usage
from lorax_async.scheduler.requests import Request, Ticket
from lorax_async.scheduler.scheduler import AdapterScheduler, Batch, BatchRow
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterKey, AdapterRef, Merge, Verification

__all__ = [
    "AccessDeniedError",
    "AdapterError",
    "AdapterFolder",
    "AdapterFormatError",
    "AdapterHandle",
    "AdapterInUseError",
    "AdapterKey",
    "AdapterLoader",
    "AdapterNotFoundError",
    "AdapterRef",
    "AdapterResidency",
    "AdapterScheduler",
    "AdapterStore",
    "AdapterTimeoutError",
    "Allow",
    "Batch",
    "BatchRow",
    "Budget",
    "BytesMoved",
    "CallBegan",
    "CallEnded",
    "CallEvent",
    "CallWaits",
    "CapacityError",
    "ConfigError",
    "Event",
    "EvictedError",
    "Failed",
    "FetchError",
    "FetchTimeoutError",
    "HandleClosedError",
    "HeaderChecked",
    "IncompatibleAdapterError",
    "IntegrityError",
    "InternalError",
    "InvalidAdapterIdError",
    "InvalidTransitionError",
    "LayerReady",
    "Leaving",
    "Limits",
    "LoaderClosedError",
    "LoaderConfig",
    "LocalRoot",
    "LoraxError",
    "Merge",
    "ModelLayout",
    "ModuleWeights",
    "Placement",
    "Prefetch",
    "Request",
    "Resident",
    "Shard",
    "SlotFreed",
    "SlotGranted",
    "SlotId",
    "Statistics",
    "StoreConfig",
    "StoredAdapter",
    "Ticket",
    "TransferError",
    "UnsupportedAdapterError",
    "Usage",
    "UsageError",
    "Verification",
    "layouts",
    "parse_adapter_id",
]

# A library must not log unless the application configures it.
logging.getLogger("lorax_async").addHandler(logging.NullHandler())
