"""SeaweedFS, an S3 that nobody here wrote, and the requests that obstore has no call for."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from store_process import free_ports, running, status

KEY, SECRET = "AKIDOFTHETESTS", "the/secret+of/the+tests"
REGION = "us-east-1"

_VERSIONED = (
    b'<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Status>Enabled</Status></VersioningConfiguration>"
)


@dataclass(frozen=True)
class Weed:
    """Its buckets: "adapters"; "versioned", which keeps versions; "public", which all may read."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def ready(self) -> bool:
        """Whether it takes objects, which is later than it listens."""
        made = self._put("/adapters") in {200, 409}
        return made and self._put("/adapters/ready", data=b"yes") == 200

    def prepare(self) -> None:
        assert self._put("/public") == 200
        assert self._put("/versioned") == 200
        assert self._put("/versioned", {"versioning": ""}, _VERSIONED) == 200

    def _put(self, path: str, query: dict[str, str] | None = None, data: bytes = b"") -> int:
        return status("PUT", self._signed("PUT", path, query or {}), data)

    def _signed(self, method: str, path: str, query: dict[str, str]) -> str:
        """By AWS Signature Version 4, in the query."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = [now[:8], REGION, "s3", "aws4_request"]
        query = query | {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": "/".join([KEY, *scope]),
            "X-Amz-Date": now,
            "X-Amz-Expires": "60",
            "X-Amz-SignedHeaders": "host",
        }
        text = "&".join(f"{name}={quote(query[name], safe='')}" for name in sorted(query))
        host = f"127.0.0.1:{self.port}"
        request = [method, path, text, f"host:{host}\n", "host", "UNSIGNED-PAYLOAD"]
        digest = hashlib.sha256("\n".join(request).encode()).hexdigest()
        key = f"AWS4{SECRET}".encode()
        for part in scope:
            key = hmac.digest(key, part.encode(), "sha256")
        signed = "\n".join(["AWS4-HMAC-SHA256", now, "/".join(scope), digest])
        signature = hmac.digest(key, signed.encode(), "sha256").hex()
        return f"http://{host}{path}?{text}&X-Amz-Signature={signature}"


@contextmanager
def weed(binary: str, root: Path) -> Iterator[Weed]:
    """Its process, with all its parts on loopback; what it stores lies below `root`."""
    ports = free_ports(8)
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identities = [
        {
            "name": "owner",
            "credentials": credentials,
            "actions": ["Admin", "Read", "Write", "List"],
        },
        {"name": "anonymous", "actions": ["Read:public", "List:public"]},
    ]
    (root / "s3.json").write_text(json.dumps({"identities": identities}))
    (root / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    command = [
        *(binary, "-logtostderr", "server", f"-dir={root / 'data'}", "-filer", "-s3"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={root / 's3.json'}"),
        *(f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)),
        *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)),
        # Volumes are claimed by sevens, for each bucket.
        *("-volume.max=64", "-master.volumeSizeLimitMB=16", "-s3.iam=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    server = Weed(ports[3])
    with running(command, root / "weed.log", server.ready):
        server.prepare()
        yield server
