"""Azurite, an Azure Blob Storage that nobody here wrote, and the request obstore has no call for."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

from store_process import free_ports, running, status

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""What Azurite's documentation says they are."""


@dataclass(frozen=True)
class Azurite:
    """Its container is "adapters"."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def ready(self) -> bool:
        """Whether the container is there, which is made by asking for it."""
        now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        fields = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
        texts = [f"{name}:{fields[name]}" for name in sorted(fields)]
        path = f"/{ACCOUNT}/adapters"
        signed = ["PUT", *[""] * 11, *texts, f"/{ACCOUNT}{path}", "restype:container"]
        fields["Authorization"] = f"SharedKey {ACCOUNT}:{_signature(signed)}"
        url = f"http://127.0.0.1:{self.port}{path}?restype=container"
        return status("PUT", url, None, fields) in {201, 409}

    def token(self) -> str:
        """A shared access signature, with which the container may be read for an hour."""
        end = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        what = {"sp": "r", "se": end, "sv": "2020-12-06", "sr": "c"}
        resource = f"/blob/{ACCOUNT}/adapters"
        signed = ["r", "", end, resource, "", "", "", what["sv"], "c", *[""] * 7]
        return urlencode(what | {"sig": _signature(signed)})


def _signature(lines: list[str]) -> str:
    key = base64.b64decode(KEY)
    return base64.b64encode(hmac.digest(key, "\n".join(lines).encode(), "sha256")).decode()


@contextmanager
def azurite(binary: str, root: Path) -> Iterator[Azurite]:
    """Its process on loopback; what it stores lies below `root`."""
    (port,) = free_ports(1)
    command = [
        *(binary, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(root)),
        *("--skipApiVersionCheck", "--disableTelemetry", "--silent"),
    ]
    server = Azurite(port)
    with running(command, root / "azurite.log", server.ready):
        yield server
