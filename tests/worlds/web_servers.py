"""Third-party servers on loopback, for the length of a test."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certifi import where
from fault_server import until
from tools import tool

BEGIN_SECONDS = 60.0
END_SECONDS = 20.0

Command = Sequence[str | Path]

SCRATCH = """
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
"""
NGINX = """
daemon off; pid {root}/pid; error_log {root}/errors; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
    log_format ours '"$request" $status $server_port "$http_range" "$http_authorization" '
                    '$body_bytes_sent';
    access_log {root}/requests ours; sendfile on; gzip on; gzip_types *; gzip_min_length 1;
    {scratch}
    limit_req_zone $server_port zone=slow:1m rate=30r/s;
    server {{
        listen 127.0.0.1:{first}; root {root}/files; keepalive_requests 3;
        location /moved/ {{ rewrite ^/moved/(.*)$ http://127.0.0.1:{second}/$1 redirect; }}
        location /slow/ {{ alias {root}/files/; limit_req zone=slow; }}
        location /whole/ {{ alias {root}/files/; max_ranges 0; }}
        location /untagged/ {{ alias {root}/files/; etag off; }}
        location /private/ {{
            if ($http_authorization != "Bearer the-token") {{ return 401; }}
            alias {root}/files/;
        }}
    }}
    server {{ listen 127.0.0.1:{second}; root {root}/files; }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


class Nginx:
    """nginx, which serves `files` in a different way at each location of its configuration."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "files"
        self.first, self.second = free_port(), free_port()
        self._puts = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.first}/{path}"

    def put(self, name: str, data: bytes) -> None:
        """Replace a file; its ETag is its time, in seconds, and its size."""
        file = self.files / name
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_bytes(data)
        self._puts += 1
        os.utime(new, (1_000_000_000, 1_000_000_000 + self._puts))
        new.rename(file)

    def requests(self) -> list[str]:
        """Return a line per request: request, status, port, range, authorization, body bytes."""
        log = self.root / "requests"
        return log.read_text().splitlines() if log.exists() else []


@contextmanager
def nginx(root: Path) -> Iterator[Nginx]:
    server = Nginx(root)
    server.files.mkdir()
    ports = {"first": server.first, "second": server.second}
    text = NGINX.format(root=root, user=_user(), scratch=SCRATCH.format(root=root), **ports)
    (root / "nginx.conf").write_text(text)
    command: Command = [_program("nginx"), "-p", root, "-c", root / "nginx.conf"]
    with running(
        [*command, "-e", root / "errors"], [server.first, server.second], root / "nginx.log"
    ):
        yield server


@dataclass
class CachingProxy:
    """nginx by the configuration of docs/fleet.md, and the ports of its parts."""

    root: Path
    web: int = field(default_factory=free_port)
    hub: int = field(default_factory=free_port)
    store: int = field(default_factory=free_port)

    def configuration(self, origin: str, hub: str, store: str) -> str:
        """Return the page's text with addresses and folders of this machine."""
        page = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()
        _, _, rest = page.partition("```nginx\n")
        text, _, _ = rest.partition("```\n")
        here = {
            "https://huggingface.co": f"http://{hub}",
            "https://cas-bridge.xethub.hf.co": f"http://{store}",
            "cas-bridge.xethub.hf.co": store,
            "huggingface.co": hub,
            "files.internal:9000": origin,
            "10.0.0.5:8080": f"127.0.0.1:{self.web}",
            "10.0.0.5:8081": f"127.0.0.1:{self.hub}",
            "10.0.0.5:8082": f"127.0.0.1:{self.store}",
            "/run/adapter-versions.sock": f"{self.root}/s",
            "/var/cache/adapters": f"{self.root}/cache",
            "/etc/ssl/certs/ca-certificates.crt": where(),
            "worker_processes auto;": "worker_processes 2;",
            "http {": "http { access_log off;" + SCRATCH.format(root=self.root),
        }
        for word, ours in here.items():
            assert word in text, f"docs/fleet.md has no {word!r}"
            text = text.replace(word, ours)
        return text

    @contextmanager
    def running(self, origin: str, hub: str, store: str) -> Iterator[None]:
        """Run it in front of servers at these addresses."""
        file, errors = self.root / "nginx.conf", self.root / "errors"
        file.write_text(self.configuration(origin, hub, store))
        directives = f"daemon off; pid {self.root}/pid; {_user()}"
        command: Command = [_program("nginx"), "-p", self.root, "-c", file, "-g", directives]
        ports = [self.web, self.hub, self.store]
        with running([*command, "-e", errors], ports, self.root / "log"):
            yield


@contextmanager
def caching_proxy(
    root: Path, origin: str, hub: str = "127.0.0.1:9", store: str = "127.0.0.1:9"
) -> Iterator[CachingProxy]:
    """A caching proxy in front of servers at these addresses."""
    root.mkdir()
    proxy = CachingProxy(root)
    with proxy.running(origin, hub, store):
        yield proxy


@contextmanager
def rclone(kind: str, folder: Path, scratch: Path) -> Iterator[str]:
    """Run `rclone serve KIND` over a folder without caching; yield its URL."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command: Command = [_program("rclone"), "serve", kind, "--config", scratch / "rclone.conf"]
    options = ["--addr", address, "--dir-cache-time", "0s"]
    with running([*command, *options, folder], [port], scratch / "rclone.log"):
        yield f"http://{address}/"


@contextmanager
def pythons_own(folder: Path, scratch: Path) -> Iterator[str]:
    """Serve the folder by Python's `http.server`, which does not support ranges; yield its URL."""
    port = free_port()
    command: Command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory"]
    with running([*command, folder, str(port)], [port], scratch / "python.log"):
        yield f"http://127.0.0.1:{port}/"


@contextmanager
def running(command: Command, ports: Sequence[int], log: Path) -> Iterator[None]:
    """Run a process until it answers on its ports; end it, and wait for it, afterwards."""
    with log.open("wb") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(list(map(str, command)), stdout=output, **streams)
    try:
        until(lambda: process.poll() is not None or all(map(_answers, ports)), BEGIN_SECONDS)
        assert process.poll() is None, log.read_text(errors="replace")[-2_000:]
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _user() -> str:
    """Let nginx's workers read the tests' folders."""
    return "user root;" if os.geteuid() == 0 else ""


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _program(name: str) -> Path:
    found = tool(name)
    assert found is not None, f"{name} is not installed; mark the test with needs({name!r})"
    return found
