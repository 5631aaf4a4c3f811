"""Against nginx, a server that nobody here wrote; without it these tests are listed as not run."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import until
from fetching import DATA, GROUPS, MemorySink, asked, check, engine, fetched

from lorax_async.core.retries import Retries
from lorax_async.errors import AdapterNotFoundError, FetchError, IntegrityError

pytestmark = [
    pytest.mark.needs("nginx"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left"),
]

CONFIG = """
daemon off; pid {root}/pid; error_log {root}/errors; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
    access_log {root}/requests; sendfile on; gzip on; gzip_types *; gzip_min_length 1;
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
    limit_req_zone $server_port zone=slow:1m rate=30r/s;
    server {{
        listen 127.0.0.1:{first}; root {root}/files; keepalive_requests 3;
        location /moved/ {{ rewrite ^/moved/(.*)$ http://127.0.0.1:{second}/$1 redirect; }}
        location /loop {{ return 302 /loop; }}
        location /slow/ {{ alias {root}/files/; limit_req zone=slow; }}
        location /whole/ {{ alias {root}/files/; max_ranges 0; }}
    }}
    server {{ listen 127.0.0.1:{second}; root {root}/files; }}
}}
"""


class Nginx:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = root / "files" / "weights"
        self.first, self.second = _free_port(), _free_port()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.first}/{path}"

    def put(self, data: bytes) -> None:
        """Replace the file; its ETag is made of its time and size."""
        new = self.weights.with_suffix(".new")
        new.write_bytes(data)
        os.utime(new, (1_000_000_000, 1_000_000_000 + len(self.requests())))
        new.rename(self.weights)

    def requests(self) -> list[str]:
        log = self.root / "requests"
        return log.read_text().splitlines() if log.exists() else []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    server = Nginx(tmp_path)
    server.weights.parent.mkdir()
    server.put(DATA)
    user = "user root;" if os.geteuid() == 0 else ""
    text = CONFIG.format(root=tmp_path, first=server.first, second=server.second, user=user)
    (tmp_path / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    process = subprocess.Popen(
        [*command, "-e", str(tmp_path / "errors")], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _answers(server.second) and _answers(server.first))
        yield server
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("path", ["weights", "moved/weights", "whole/weights"])
def test_bytes_come_whole(nginx: Nginx, path: str) -> None:
    """By ranges, after a redirect to another port, and from a place that knows no ranges."""
    with engine(8) as fetching:
        answer = asked(fetching, nginx.url(path))
        assert answer.ranges is (path != "whole/weights")
        assert answer.known.validator is not None
        check(*fetched(fetching, answer))
    until(lambda: len(nginx.requests()) > 1)
    redirects = [line for line in nginx.requests() if '" 302 ' in line]
    assert len(redirects) == (path == "moved/weights"), "ranges go straight to where it lies"


def test_a_server_that_limits_requests(nginx: Nginx) -> None:
    """The others are told 503, and nothing fails."""
    retries = Retries(attempts=8, base=0.05, most=0.2)
    with engine(8, retries=retries) as fetching:
        check(*fetched(fetching, asked(fetching, nginx.url("slow/weights"))))
    until(lambda: any('" 503 ' in line for line in nginx.requests()))


def test_another_file_under_the_same_name(nginx: Nginx) -> None:
    with engine() as fetching:
        answer = asked(fetching, nginx.url("weights"))
        nginx.put(DATA[::-1])
        with pytest.raises(IntegrityError, match="changed"):
            fetched(fetching, answer)
        sink = MemorySink()
        again = asked(fetching, nginx.url("weights"))
        fetching.download(again, GROUPS, sink, lambda _: None).done.result(10)
        assert sink.data[5_000:] == DATA[::-1][5_000:]


def test_what_is_not_there(nginx: Nginx) -> None:
    with engine() as fetching:
        with pytest.raises(AdapterNotFoundError, match="404"):
            asked(fetching, nginx.url("nothing"))
        with pytest.raises(FetchError, match="3 redirects"):
            asked(fetching, nginx.url("loop"))
        nginx.put(b"")
        assert asked(fetching, nginx.url("weights")).known.size == 0
