"""Sources that find out too late that an adapter's bytes are others, and devices to look into."""

import tiny
from gated_device import GatedDevice

from lorax_async.config import LoaderConfig
from lorax_async.errors import IntegrityError
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource

FALSE = IntegrityError("its bytes are not what was promised", stage="verify", retryable=False)


def watched(source: FakeSource, **settings: object) -> tuple[AdapterLoader, GatedDevice]:
    """A loader whose device can be looked into."""
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=4)
    plain: dict[str, object] = {"device_bytes": 1 << 20, "max_slots": 4, "timeout": 20}
    config = LoaderConfig(**(plain | settings))  # type: ignore[arg-type]
    return AdapterLoader(tiny.layout(), config, source=source, device=device), device


def told_false(source: FakeSource, id: str = "a") -> None:
    """What is known from now on: the bytes of `id` are others."""
    source.fail("verify", FALSE, id=id)
    source.allow_verification(id)
