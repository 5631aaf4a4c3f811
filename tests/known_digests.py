"""What adapters' files come to, and who holds leases on them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from lorax_async import AdapterLoader
from tiny_sources import WEIGHTS

OTHER = "0" * 64
"""What nothing comes to."""


def digest_of(folder: Path) -> str:
    return sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def holders(there: AdapterLoader) -> int:
    return sum(map(len, there._driver.tenants.leases.values()))
