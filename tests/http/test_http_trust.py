"""Proxies and TLS, as users have them set up."""

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_server import Asked, Client, FaultServer, Hangup
from range_downloads import DATA, PretendNetwork, asked, check, engine, fetched
from tls_servers import certificate, tls_server

from lorax_async.errors import AccessDeniedError, ConfigError, FetchError
from lorax_async.http.settings import Proxies, tls_context
from lorax_async.urls import Origin

__all__ = ["certificate"]

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


PUBLIC = "93.184.216.34"


def forward(server: FaultServer) -> Callable[[Asked, Client], None]:
    """A proxy that knows one place, and tunnels bytes to it."""

    def behave(asked: Asked, client: Client) -> None:
        if not asked.line.startswith("CONNECT"):
            server.right(asked, client)
            return
        with socket.create_connection(("127.0.0.1", server.port)) as onward:
            client.head("200 Connected")
            back = threading.Thread(target=pour, args=(onward, client.socket))
            back.start()
            pour(client.socket, onward)
            back.join()
        raise Hangup

    return behave


def pour(source: socket.socket, drain: socket.socket) -> None:
    try:
        while data := source.recv(65_536):
            drain.sendall(data)
        drain.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other direction sees it too


def test_plain_requests_through_a_proxy() -> None:
    """It knows the names; addresses are checked here."""
    with FaultServer(DATA) as server, FaultServer(DATA, forward(server)) as proxy:
        given = {"http": f"http://user:sword%20fish@127.0.0.1:{proxy.port}"}
        with engine(proxies=given) as fetching:
            check(*fetched(fetching, asked(fetching, "http://files.example/weights")))
            count = len(proxy.asked)
            with pytest.raises(AccessDeniedError, match="not public"):
                asked(fetching, "http://169.254.169.254/latest")
            assert len(proxy.asked) == count
        first = proxy.asked[0]
        assert first.target == "http://files.example/weights"
        assert first.fields["proxy-authorization"] == "Basic dXNlcjpzd29yZCBmaXNo"
        assert first.fields["host"] == "files.example"
        assert not server.clients


def test_which_hosts_need_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://u:swordfish@p:3128")
    monkeypatch.setenv("no_proxy", "localhost, .example, 10.0.0.1:8080,*.corp")
    proxies = Proxies(None)
    for host in ("localhost", "a.example", "example", "x.corp"):
        assert proxies.to(Origin("http", host, 80)) is None
    for host in ("notexample", "10.0.0.1", "h"):
        found = proxies.to(Origin("http", host, 80))
        assert found is not None
        assert "swordfish" not in repr(found)


@pytest.mark.parametrize("text", ["socks5://p:1080", "https://p:1", "http://u:swordfish@", "p:x"])
def test_proxies_that_are_not_known(text: str) -> None:
    with pytest.raises(ConfigError, match="a proxy must be") as caught:
        Proxies({"http": text})
    assert "swordfish" not in str(caught.value)


def network_of(server: FaultServer) -> PretendNetwork:
    """A network in which it is files.example, other.example, and the proxy."""
    names = {name: [PUBLIC] for name in ("files.example", "other.example", "proxy")}
    return PretendNetwork(names=names, ports={PUBLIC: server.port})


@pytest.mark.parametrize("proxied", [False, True])
def test_over_tls(certificate: Path, proxied: bool) -> None:
    with tls_server(certificate) as server, FaultServer(DATA, forward(server)) as proxy:
        network = network_of(proxy if proxied else server)
        proxies = {"https": "http://u:p@proxy:3128"} if proxied else {}
        with engine(network=network, proxies=proxies, ca_bundle=str(certificate)) as fetching:
            check(*fetched(fetching, asked(fetching, "https://files.example/weights")))
        assert server.asked
        if proxied:
            assert proxy.asked[0].line == "CONNECT files.example:443 HTTP/1.1"
            assert "proxy-authorization" not in server.asked[0].fields


@pytest.mark.parametrize(
    ("host", "place"),
    [("[2606:2800::1]", "[2606:2800::1]:443"), ("files.example:8443", "files.example:8443")],
)
def test_a_proxy_is_asked_for_host_and_port(host: str, place: str) -> None:
    refusal = ("403 Forbidden", "Content-Length: 0")
    with FaultServer(DATA, lambda _, client: client.head(*refusal)) as proxy:
        proxies = {"https": f"http://127.0.0.1:{proxy.port}"}
        with engine(proxies=proxies) as fetching, pytest.raises(AccessDeniedError, match="proxy"):
            asked(fetching, f"https://{host}/weights")
        assert proxy.asked[0].line == f"CONNECT {place} HTTP/1.1"


def test_a_host_that_is_no_name_for_tls() -> None:
    """Behind a proxy, no name service has refused it before."""
    label = "a" * 64
    with FaultServer(DATA, lambda _, client: client.head("200 Connected")) as proxy:
        proxies = {"https": f"http://127.0.0.1:{proxy.port}"}
        with engine(proxies=proxies) as fetching, pytest.raises(FetchError, match="is no name"):
            asked(fetching, f"https://{label}.example/weights")


@pytest.mark.parametrize(("host", "known"), [("files.example", False), ("other.example", True)])
def test_certificates_that_are_not_trusted(certificate: Path, host: str, known: bool) -> None:
    with tls_server(certificate) as server:
        bundle = str(certificate) if known else None
        with (
            engine(network=network_of(server), ca_bundle=bundle) as fetching,
            pytest.raises(AccessDeniedError, match="SSL_CERT_FILE") as caught,
        ):
            asked(fetching, f"https://{host}/weights?k=swordfish")
        assert "swordfish" not in str(caught.value)
        assert not server.asked


def test_https_does_not_go_on_as_http(certificate: Path) -> None:
    with tls_server(certificate) as server, FaultServer(DATA) as plain:
        network = network_of(server)
        moved = ("302 Found", "Content-Length: 0", f"Location: {plain.url('/?k=swordfish')}")
        server.behave = lambda _, client: client.head(*moved)
        with (
            engine(network=network, ca_bundle=str(certificate)) as fetching,
            pytest.raises(AccessDeniedError, match="from https to http") as caught,
        ):
            asked(fetching, "https://files.example/weights")
        assert "swordfish" not in str(caught.value)
        assert not plain.clients


def test_certificates_that_cannot_be_read_fail_https_alone(
    certificate: Path, tmp_path: Path
) -> None:
    with tls_server(certificate) as server, FaultServer(DATA) as plain:
        network, bundle = network_of(server), str(tmp_path / "none.pem")
        with engine(network=network, ca_bundle=bundle) as fetching:
            with pytest.raises(ConfigError, match="cannot be read"):
                asked(fetching, "https://files.example/weights")
            assert not server.asked
        with engine(ca_bundle=bundle) as fetching:
            assert asked(fetching, plain.url()).start == DATA[:5_000]


def test_bundles_of_other_tools_count(certificate: Path, tmp_path: Path) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        context = tls_context(None, {name: str(certificate)})
        assert "files.example" in str(context.get_ca_certs())
    with pytest.raises(ConfigError, match="cannot be read"):
        tls_context(str(tmp_path / "none.pem"), {})
    assert tls_context(None, {}).verify_mode is ssl.CERT_REQUIRED
