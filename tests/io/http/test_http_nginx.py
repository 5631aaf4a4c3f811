"""Against nginx, a server that nobody here wrote; without it these tests are listed as not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import until
from fetching import DATA, asked, check, engine, fetched

import servers
from lorax_async.core.retries import Retries
from servers import Nginx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("nginx"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left"),
]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    with servers.nginx(tmp_path) as server:
        server.put("weights", DATA)
        yield server


@pytest.mark.parametrize("path", ["weights", "moved/weights", "whole/weights"])
def test_bytes_come_whole(nginx: Nginx, path: str) -> None:
    """By ranges, after a redirect to another port, and from a place that knows no ranges."""
    with engine(8) as fetching:
        answer = asked(fetching, nginx.url(path))
        assert answer.ranges is (path != "whole/weights")
        assert answer.validators.strong_etag is not None
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
