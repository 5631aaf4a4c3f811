"""Where connections lead: URLs, names, addresses before and after connecting."""

from __future__ import annotations

import socket
import threading
import time
from ipaddress import ip_address

import pytest
from fault_server import Asked, Client, FaultServer, until
from fetching import (
    DATA,
    PATIENT,
    Anywhere,
    PretendNetwork,
    asked,
    check,
    engine,
    fetched,
    target,
    took,
)

from lorax_async.errors import AccessDeniedError, FetchError, FetchTimeoutError
from lorax_async.io.http.network import Endpoint
from lorax_async.io.http.settings import Timeouts, is_public
from lorax_async.io.http.urls import InvalidUrlError, Origin, parse_url

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
        "2002:c0a8:101::1",
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", [PUBLIC, "8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8"])
def test_addresses_that_are(text: str) -> None:
    assert is_public(ip_address(text))


class NoLoopback(Anywhere):
    """All URLs, public addresses only."""

    def allows_address(self, url: object, address: object) -> bool:
        return False


def refusal(network: PretendNetwork, url: str) -> AccessDeniedError:
    with (
        engine(network=network) as fetching,
        pytest.raises(AccessDeniedError, match="not public") as caught,
    ):
        fetching.ask(target(url, rules=NoLoopback()), 10).done.result(10)
    return caught.value


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.1.2.3"])
def test_a_name_of_a_private_address_is_not_even_connected_to(address: str) -> None:
    network = PretendNetwork(names={"files.example": [address]})
    error = refusal(network, "http://files.example/weights?key=swordfish")
    assert network.connected == []
    assert address not in str(error)
    assert "swordfish" not in str(error)
    assert not error.retryable


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "169.254.169.254"])
def test_a_private_address_as_a_number(host: str) -> None:
    number = host.strip("[]")
    network = PretendNetwork(names={number: [number]})
    refusal(network, f"http://{host}/weights")
    assert network.connected == []


def test_what_is_connected_to_counts() -> None:
    """The name service said one thing, the socket is at another."""
    with FaultServer(DATA) as server:
        network = PretendNetwork(
            names={"files.example": [PUBLIC]},
            ports={PUBLIC: server.port},
            peers={PUBLIC: "192.168.1.1"},
        )
        refusal(network, "http://files.example/weights")
        assert network.connected == [PUBLIC]
        assert not server.asked


def test_a_redirect_to_a_private_address() -> None:
    def away(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", "Location: http://inside.example/latest")

    with FaultServer(DATA, away) as server, FaultServer(DATA) as inside:
        network = PretendNetwork(
            names={"files.example": [PUBLIC], "inside.example": ["169.254.169.254"]},
            ports={PUBLIC: server.port, "169.254.169.254": inside.port},
        )
        refusal(network, "http://files.example/weights")
        assert len(server.asked) == 1
        assert not inside.clients


def test_a_public_address_among_private_ones_is_used() -> None:
    with FaultServer(DATA) as server:
        network = PretendNetwork(
            names={"files.example": ["10.0.0.1", PUBLIC]}, ports={PUBLIC: server.port}
        )
        with engine(network=network) as fetching:
            place = target("http://files.example/weights", rules=NoLoopback())
            assert fetching.ask(place, 100).done.result(10).start == DATA[:100]
        assert network.connected == [PUBLIC]
        assert server.asked[0].fields["host"] == "files.example"


def test_the_next_address_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refusing = gone.getsockname()[1]
    with FaultServer(DATA) as server:
        network = PretendNetwork(
            names={"files.example": ["8.8.8.8", PUBLIC]},
            ports={"8.8.8.8": refusing, PUBLIC: server.port},
        )
        with engine(network=network) as fetching:
            answer = fetching.ask(target("http://files.example/weights"), 100).done.result(10)
            assert answer.start == DATA[:100]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with engine() as fetching, pytest.raises(FetchError, match="ECONNREFUSED") as caught:
        asked(fetching, f"http://127.0.0.1:{port}/")
    assert caught.value.retryable


def test_a_name_that_is_none() -> None:
    with (
        engine(network=PretendNetwork()) as fetching,
        pytest.raises(FetchError, match=r"'nowhere.example' cannot be found \(EAI_NONAME"),
    ):
        asked(fetching, "http://nowhere.example/")


def test_a_full_backlog_is_a_timeout() -> None:
    """The system drops what it cannot queue: the connection never comes about."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(place)
        with engine(timeouts=Timeouts(connect=0.1)) as fetching:
            begun = time.monotonic()
            with pytest.raises(FetchTimeoutError):
                asked(fetching, f"http://127.0.0.1:{place[1]}/")
            assert took(begun) < 3
            job = fetching.ask(target(f"http://127.0.0.1:{place[1]}/"), 9)
            time.sleep(0.05)
            job.cancel(FetchError("enough"))
            with pytest.raises(FetchError, match="enough"):
                job.done.result(5)
        for each in waiting:
            each.close()


class SlowNames(PretendNetwork):
    """A name service that answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        self.resolved.append(host)
        self.answer.wait(20)
        return [Endpoint(socket.AF_INET, PUBLIC, port)]


def test_a_name_service_that_does_not_answer() -> None:
    """The deadline holds, and all who ask share one question."""
    network = SlowNames()
    try:
        with engine(network=network, timeouts=PATIENT) as fetching:
            begun = time.monotonic()
            jobs = [fetching.ask(target("http://slow.example/"), 9, timeout=0.3) for _ in range(3)]
            for job in jobs:
                with pytest.raises(FetchTimeoutError):
                    job.done.result(5)
            assert took(begun) < 2
            assert network.resolved == ["slow.example"]
    finally:
        network.answer.set()
        until(lambda: not [t for t in threading.enumerate() if t.name == "lorax-lookup"])


def test_no_more_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said plainly; and what has sockets goes on."""

    def full(*_: object, **__: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        with monkeypatch.context() as patched:
            patched.setattr("lorax_async.io.http.network.socket.socket", full)
            with pytest.raises(FetchError, match=r"EMFILE.*ulimit -n"):
                asked(fetching, "http://127.0.0.1:1/")
        check(*fetched(fetching, answer))


# -- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "origin", "where"),
    [
        ("http://h", Origin("http", "h", 80), "/"),
        (
            "HTTPS://Host.Example:8443/a%20b?c=d#e",
            Origin("https", "host.example", 8443),
            "/a%20b?c=d",
        ),
        ("https://[2001:DB8::1]/x", Origin("https", "2001:db8::1", 443), "/x"),
        ("http://h?q", Origin("http", "h", 80), "/?q"),
    ],
)
def test_urls(text: str, origin: Origin, where: str) -> None:
    url = parse_url(text)
    assert (url.origin, url.target) == (origin, where)
    assert where == "/" or where not in repr(url) + str(url)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "//h/x", "ftp://h/", "http://", "http://u:p@h/", "http://h/a b", "http://h/\n"),
        *(
            "http://h:0/",
            "http://h:65536/",
            "http://h:x/",
            "http://é/",
            "http://h\\x",
            "http://-h/",
        ),
        *("http://h/é", "http://h\x00/", "http://[::1", " http://h/", "http://a@h"),
    ],
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(InvalidUrlError):
        parse_url(text)
