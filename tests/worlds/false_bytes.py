"""Sources that find wrong bytes only after an adapter is used, and devices to inspect."""

import tiny
from gated_device import GatedDevice

from lorax_async.config import LoaderConfig
from lorax_async.errors import IntegrityError
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource

FALSE = IntegrityError("its bytes are not what was promised", stage="verify", retryable=False)


def watched(source: FakeSource, **settings: object) -> tuple[AdapterLoader, GatedDevice]:
    """Return a loader, and its device for inspection."""
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=4)
    plain: dict[str, object] = {"device_bytes": 1 << 20, "max_slots": 4, "timeout": 20}
    config = LoaderConfig(**(plain | settings))  # type: ignore[arg-type]
    return AdapterLoader(tiny.layout(), config, source=source, device=device), device


def told_false(source: FakeSource, id: str = "a") -> None:
    """Let the verification of `id` end now, with wrong bytes."""
    source.fail("verify", FALSE, id=id)
    source.allow_verification(id)
