"""Object stores on loopback, SeaweedFS (S3), Azurite, a stand-in for Google; access to them."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit
from urllib.request import Request, urlopen

import pytest
import web_servers as servers
from fault_server import Asked, Client, FaultServer, answer, until
from obstore.store import AzureStore, S3Store
from range_downloads import DATA, GROUPS, PATIENT, MemorySink, engine
from web_folder import Locator

from lorax_async.remote.base import LocatedAdapter, RemoteFile
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.types import AdapterRef

NOWHERE = "http://127.0.0.1:1"

_OTHERS = ("AWS_", "GOOGLE_", "AZURE_", "MSI_", "IDENTITY_")


def set_environment(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """Set these variables, and remove all others by which obstore finds credentials."""
    for name in list(os.environ):
        if name.startswith(_OTHERS):
            patch.delenv(name)
    patch.setenv("AWS_METADATA_ENDPOINT", NOWHERE)
    for name, value in values.items():
        patch.setenv(name, value)


S3_KEY, S3_SECRET = "AKIDOFTHETESTS", "the/secret+of/the+tests"
REGION = "us-east-1"


@dataclass(frozen=True)
class Weed:
    """SeaweedFS; its buckets are "adapters", "versioned" (keeps versions), "public" (no key)."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": S3_KEY,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        }


@contextmanager
def weed(binary: str, root: Path) -> Iterator[Weed]:
    """Run SeaweedFS, all of it on loopback, with its data below `root`."""
    ports = list({servers.free_port() for _ in range(16)})[:8]
    credentials = [{"accessKey": S3_KEY, "secretKey": S3_SECRET}]
    actions = ["Admin", "Read", "Write", "List"]
    identities = [
        {"name": "owner", "credentials": credentials, "actions": actions},
        {"name": "anonymous", "actions": ["Read:public", "List:public"]},
    ]
    (root / "s3.json").write_text(json.dumps({"identities": identities}))
    (root / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    at = {name: f"127.0.0.1:{ports[n]}.{ports[n + 4]}" for n, name in enumerate(names)}
    command = [
        *(binary, "-logtostderr", "server", f"-dir={root / 'data'}", "-filer", "-s3"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={root / 's3.json'}"),
        *(f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)),
        *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)),
        # Volumes are claimed by sevens, for each bucket.
        *("-volume.max=64", "-master.volumeSizeLimitMB=16", "-s3.iam=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    shell = [binary, "shell", f"-master={at['master']}", f"-filer={at['filer']}"]
    buckets = [f"s3.bucket.create -name {name}\n" for name in ("adapters", "versioned", "public")]
    words = "".join(
        [*buckets, "s3.bucket.versioning -name versioned -enable\n", "s3.bucket.list\n"]
    )

    def is_ready() -> bool:
        done = subprocess.run(shell, input=words, text=True, check=False, capture_output=True)
        return "versioned" in done.stdout

    server = Weed(ports[3])
    with servers.running(command, ports[:4], root / "weed.log"):
        until(is_ready, 60)
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, server.environment)
            bucket("s3", "adapters").put("ready", b"yes")  # obstore waits until it takes objects
        yield server


AZURE_ACCOUNT = "devstoreaccount1"

AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)

"""What Azurite's documentation says they are."""


@dataclass(frozen=True)
class Azurite:
    """Azurite; its container is "adapters"."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{AZURE_ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def ready(self) -> bool:
        """Create the container; return whether it exists."""
        now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        fields = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
        texts = [f"{name}:{fields[name]}" for name in sorted(fields)]
        path = f"/{AZURE_ACCOUNT}/adapters"
        signed = ["PUT", *[""] * 11, *texts, f"/{AZURE_ACCOUNT}{path}", "restype:container"]
        fields["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{_azure_signature(signed)}"
        url = f"http://127.0.0.1:{self.port}{path}?restype=container"
        try:
            with urlopen(Request(url, None, fields, method="PUT"), timeout=20):
                return True
        except HTTPError as error:
            error.close()
            return error.code == 409
        except (URLError, OSError):
            return False

    def token(self) -> str:
        """Return a shared access signature to read the container for an hour."""
        end = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        what = {"sp": "r", "se": end, "sv": "2020-12-06", "sr": "c"}
        resource = f"/blob/{AZURE_ACCOUNT}/adapters"
        signed = ["r", "", end, resource, "", "", "", what["sv"], "c", *[""] * 7]
        return urlencode(what | {"sig": _azure_signature(signed)})


def _azure_signature(lines: list[str]) -> str:
    key = base64.b64decode(AZURE_KEY)
    return base64.b64encode(hmac.digest(key, "\n".join(lines).encode(), "sha256")).decode()


@contextmanager
def azurite(binary: str, root: Path) -> Iterator[Azurite]:
    """Run Azurite on loopback, with its data below `root`."""
    port = servers.free_port()
    command = [
        *(binary, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(root)),
        *("--skipApiVersionCheck", "--disableTelemetry", "--silent"),
    ]
    server = Azurite(port)
    with servers.running(command, [port], root / "azurite.log"):
        until(server.ready, 60)
        yield server


GOOGLE_ACCOUNT = "tests@project.iam.gserviceaccount.com"


@cache
def google_key() -> str:
    make = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
    return subprocess.run(make, capture_output=True, check=True, timeout=60, text=True).stdout


@dataclass
class GoogleStandIn:
    """Answers like Google's XML API: HEAD with a bearer token, GET with a signature."""

    objects: dict[str, bytes] = field(default_factory=dict)
    generation: int = 1
    public: bool = False
    port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        key = {
            "type": "service_account",
            "client_email": GOOGLE_ACCOUNT,
            "private_key": google_key(),
            "private_key_id": "made for tests",
            "gcs_base_url": f"http://127.0.0.1:{self.port}",
        }
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key), "GOOGLE_ALLOW_HTTP": "true"}

    def __call__(self, asked: Asked, client: Client) -> None:
        method, target, _ = asked.line.split(" ")
        bearer = asked.fields.get("authorization", "").startswith("Bearer ")
        granted = self.public or (bearer if method == "HEAD" else self.opens(asked))
        data = self.objects.get(unquote(urlsplit(target).path))
        if not granted or data is None:
            client.head("403 Forbidden" if not granted else "404 Not Found", "Content-Length: 0")
            return
        etag = f'ETag: "{hashlib.md5(data).hexdigest()}"'
        tell = [etag, f"x-goog-generation: {self.generation}", f"Last-Modified: {formatdate(0)}"]
        if method == "HEAD":
            client.head("200 OK", f"Content-Length: {len(data)}", *tell)
        else:
            answer(asked, client, data, *tell)

    def opens(self, asked: Asked) -> bool:
        """Return whether the request has a signature, of any value: obstore makes it."""
        query = dict(parse_qsl(urlsplit(asked.target).query))
        email = query.get("X-Goog-Credential", "").partition("/")[0]
        return email == GOOGLE_ACCOUNT and "X-Goog-Signature" in query


CONFIG, WEIGHTS = b'{"peft_type": "LORA", "r": 8}', "adapter_model.safetensors"


def bucket(kind: str, name: str) -> AzureStore | S3Store:
    return (S3Store if kind == "s3" else AzureStore)(name)


@contextmanager
def locator(
    threads: int = 2, *, signed_for: float = 600.0, convert_bin: bool = False
) -> Iterator[Locator]:
    with ThreadPoolExecutor(threads, "lorax-test") as pool:
        made = StoreBackend(pool, signed_for=signed_for, convert_bin=convert_bin)
        try:
            yield Locator(made)
        finally:
            made.close()


@dataclass
class Store:
    """A folder in one kind of store."""

    kind: str
    path: str
    port: int
    server: Any
    bucket: str = "adapters"

    @property
    def id(self) -> str:
        return f"{self.kind}://{self.bucket}/{self.path}"

    def environment(self, port: int) -> dict[str, str]:
        """Return the variables by which obstore finds the store behind `port`."""
        own, other = f":{self.port}", f":{port}"
        return {name: text.replace(own, other) for name, text in self.server.environment.items()}

    def put(self, name: str, data: bytes) -> str | None:
        """Store an object; return its version if the bucket keeps versions."""
        if isinstance(self.server, GoogleStandIn):
            self.server.objects[f"/{self.bucket}/{self.path}{name}"] = data
            self.server.generation += 1
            return str(self.server.generation)
        return bucket(self.kind, self.bucket).put(f"{self.path}{name}", data)["version"]

    def put_all(self, files: dict[str, bytes]) -> None:
        for file in files.items():
            self.put(*file)

    def put_adapter(self, weights: bytes = DATA, config: bytes = CONFIG) -> None:
        self.put_all({"adapter_config.json": config, WEIGHTS: weights})

    def etag(self, name: str = WEIGHTS) -> str:
        found = bucket(self.kind, self.bucket).head(f"{self.path}{name}")["e_tag"]
        assert found is not None
        return found

    @property
    def url(self) -> str:
        """The URL of the weights."""
        return located(self.id).files[1].target.url.text


@contextmanager
def stored(kind: str, path: str, begun: Callable[[str], Any]) -> Iterator[Store]:
    if kind != "gs":
        server = begun(kind)
        yield Store(kind, path, server.port, server)
        return
    stand_in = GoogleStandIn()
    with FaultServer(b"", stand_in) as google:
        stand_in.port = google.port
        yield Store(kind, path, google.port, stand_in)


def located(id: str, revision: str | None = None, *, convert_bin: bool = False) -> LocatedAdapter:
    with locator(convert_bin=convert_bin) as made:
        return asyncio.run(made.locate(AdapterRef(id, revision=revision)))


def download_file(file: RemoteFile) -> bytes:
    """Download by ranges as a source does: the beginning, then the rest on many connections."""
    assert file.nbytes is not None
    with engine(4, timeouts=PATIENT) as fetching:
        answer = fetching.probe(file.target, 5_000, timeout=30).done.result(40)
        file.require_match(answer)
        assert answer.ranges
        sink, order = MemorySink(file.nbytes), list[int]()
        groups = GROUPS if file.nbytes == len(DATA) else [[(0, file.nbytes)]]
        job = fetching.download(answer, groups, sink.write, order.append, timeout=30)
        job.done.result(40)
        assert sorted(order) == list(range(len(groups)))
        start = groups[1][0][0] if len(groups) > 1 else 0
        assert set(sink.times[start:]) == {1}, "all of it came, and came once"
        sink.data[:start] = answer.start[:start]
        return bytes(sink.data)
