"""Where connections may lead: URLs, names, addresses, redirects, and where credentials go."""

import socket
import threading
import time
from dataclasses import replace
from ipaddress import ip_address

import pytest
from fault_server import Asked, Behaviour, Client, FaultServer, until
from range_downloads import (
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

from lorax_async import AccessDeniedError, Allow, FetchError, FetchTimeoutError, UsageError
from lorax_async.http.client import Endpoint
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import Rules, Timeouts, is_public
from lorax_async.http.target import Target
from lorax_async.remote.base import AllowRules
from lorax_async.urls import InvalidUrlError, parse_url

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


PUBLIC = "93.184.216.34"
INSIDE = "10.1.2.3"
URL = "http://files.internal/loras/weights?key=swordfish"
SECRET = "Bearer hf_swordfish"


def _started(fetching: RangeDownloader, url: str, rules: Rules | None = None) -> bytes:
    return fetching.probe(target(url, rules=rules), 100).done.result(10).start


def _refused(fetching: RangeDownloader, url: str, rules: Rules, words: str = "not public") -> None:
    with pytest.raises(AccessDeniedError, match=words) as caught:
        _started(fetching, url, rules)
    assert "swordfish" not in str(caught.value)
    assert not caught.value.retryable


def network_of(**places: tuple[str, FaultServer]) -> PretendNetwork:
    """Map hosts, by their first label, to an address and to the server behind it."""
    return PretendNetwork(
        names={f"{name}.internal": [address] for name, (address, _) in places.items()},
        ports={address: server.port for address, server in places.values()},
    )


def to(location: str) -> Behaviour:
    def away(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", f"Location: {location}")

    return away


class NoLoopback(Anywhere):
    """All URLs, public addresses only."""

    def allows_address(self, url: object, address: object) -> bool:
        return False


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "//h/x", "ftp://h/", "http://", "http://u:p@h/", "http://h/a b", "http://h/\n"),
        *("http://h:0/", "http://h:65536/", "http://h:x/", "http://é/", "http://h\\x"),
        *("http://h/é", "http://h\x00/", "http://[::1", " http://h/", "http://a@h", "http://-h/"),
    ],
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(InvalidUrlError):
        parse_url(text)


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
    assert all(map(is_public, map(ip_address, (PUBLIC, "2606:4700::1", "::ffff:8.8.8.8"))))


@pytest.mark.parametrize(
    ("host", "address"),
    [
        *[("files.example", text) for text in ("127.0.0.1", "169.254.169.254", "10.1.2.3")],
        *[(text, text) for text in ("127.0.0.1", "::1", "169.254.169.254")],
    ],
)
def test_a_private_address_is_not_even_connected_to(host: str, address: str) -> None:
    network = PretendNetwork(names={host: [address]})
    written = f"[{host}]" if ":" in host else host
    with engine(network=network) as fetching:
        _refused(fetching, f"http://{written}/weights?key=swordfish", NoLoopback())
    assert network.connected == []


def test_the_address_of_the_connected_socket_counts() -> None:
    """The name service said one thing, the socket is at another."""
    with FaultServer(DATA) as server:
        network = PretendNetwork(
            names={"files.example": [PUBLIC]},
            ports={PUBLIC: server.port},
            peers={PUBLIC: "192.168.1.1"},
        )
        with engine(network=network) as fetching:
            _refused(fetching, "http://files.example/weights", NoLoopback())
        assert network.connected == [PUBLIC]
        assert not server.asked


def test_the_next_address_of_a_name_is_tried() -> None:
    """After a private one, which is not connected to, and after one that refuses."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refusing = gone.getsockname()[1]
    with FaultServer(DATA) as server:
        network = PretendNetwork(
            names={"files.example": ["10.0.0.1", "8.8.8.8", PUBLIC]},
            ports={"8.8.8.8": refusing, PUBLIC: server.port},
        )
        with engine(network=network) as fetching:
            assert _started(fetching, "http://files.example/w", NoLoopback()) == DATA[:100]
        assert network.connected == ["8.8.8.8", PUBLIC]
        assert server.asked[0].fields["host"] == "files.example"


def test_a_place_that_no_connection_leads_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with engine() as fetching, pytest.raises(FetchError, match="ECONNREFUSED") as caught:
        asked(fetching, f"http://127.0.0.1:{port}/")
    assert caught.value.retryable
    with (
        engine(network=PretendNetwork()) as fetching,
        pytest.raises(FetchError, match=r"'nowhere.example' cannot be found \(EAI_NONAME"),
    ):
        asked(fetching, "http://nowhere.example/")


class SlowNames(PretendNetwork):
    """A name service that answers once `answer` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        self.resolved.append(host)
        self.answer.wait(20)
        return [Endpoint(socket.AF_INET, PUBLIC, port)]


def test_a_name_service_that_does_not_answer() -> None:
    """The deadline holds; concurrent lookups of a name are one, and later ones are new."""
    network = SlowNames()
    try:
        with engine(network=network, timeouts=PATIENT) as fetching:
            begun = time.monotonic()
            jobs = [
                fetching.probe(target("http://slow.example/"), 9, timeout=0.3) for _ in range(3)
            ]
            for job in jobs:
                with pytest.raises(FetchTimeoutError):
                    job.done.result(5)
            assert took(begun) < 2
            assert network.resolved == ["slow.example"]
        hasty = engine(network=network, timeouts=Timeouts(connect=0.1))
        with hasty as fetching, pytest.raises(FetchTimeoutError):
            asked(fetching, "http://slow.example/")
        network.resolved.clear()
    finally:
        network.answer.set()
        until(lambda: not [t for t in threading.enumerate() if t.name == "lorax-lookup"])
    with FaultServer(DATA, lambda _, client: client.reset()) as server:
        network.ports = {PUBLIC: server.port}
        with engine(1, network=network) as fetching, pytest.raises(FetchError):
            asked(fetching, "http://slow.example/")
    assert network.resolved == ["slow.example"] * 3, "each of three attempts asks anew"


def test_credentials_go_to_their_own_origin_only() -> None:
    headers = {"Authorization": SECRET, "X-Api-Key": "swordfish"}
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine() as fetching:
        away = to(store.url("/signed?X-Signature=swordfish"))

        def to_store(asked: Asked, client: Client) -> None:
            (to("/second") if asked.target == "/weights" else away)(asked, client)

        hub.behave = to_store
        answer = fetching.probe(target(hub.url(), headers), 5_000).done.result(10)
        check(*fetched(fetching, answer))
        assert len(hub.asked) == 2, "ranges are requested where the file lies"
        for each in hub.asked:
            assert each.fields["authorization"] == SECRET
        assert store.asked
        for each in store.asked:
            assert "swordfish" not in each.raw.partition("\r\n")[2]
            assert each.target == "/signed?X-Signature=swordfish"
        assert "swordfish" not in repr(answer) + repr(answer.target) + repr(answer.location)


def test_credentials_are_not_sent_again_by_way_of_another_origin() -> None:
    with FaultServer(DATA) as away, FaultServer(DATA) as home, engine() as fetching:
        away.behave = to(home.url("/private"))
        leave = to(away.url("/x"))
        home.behave = lambda asked, client: (leave if asked.target == "/weights" else home.right)(
            asked, client
        )
        fetching.probe(target(home.url(), {"Authorization": SECRET}), 100).done.result(10)
        first, last = home.asked
        assert first.fields["authorization"] == SECRET
        assert "authorization" not in last.fields


def test_signed_places_that_expire_are_asked_for_anew() -> None:
    number = [0]
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine(2) as fetching:

        def sign(asked: Asked, client: Client) -> None:
            number[0] += 1
            place = store.url(f"/{number[0]}")
            client.head("302 Found", "Content-Length: 0", f"Location: {place}")

        def check_signature(asked: Asked, client: Client) -> None:
            if asked.target == "/1" and asked.span != (0, 5_000):
                client.head("403 Expired", "Content-Length: 0")
            else:
                store.right(asked, client)

        hub.behave, store.behave = sign, check_signature
        check(*fetched(fetching, asked(fetching, hub.url())))
        assert 2 <= number[0] <= 4


NO_URLS = (
    *("ftp://127.0.0.1/x", "file:///etc/passwd", "gopher:x", "http://127.0.0.1:99999/"),
    *("http://[::1/", "http://u:swordfish@127.0.0.1/", f"http://{'a' * 9_000}"),
)


@pytest.mark.parametrize(
    ("location", "words", "requests"),
    [
        *((text, "3 redirects", 4) for text in ("/weights", "/loop?x", "")),
        *((text, "no URL", 1) for text in NO_URLS),
    ],
)
def test_redirects_that_end_or_lead_nowhere(location: str, words: str, requests: int) -> None:
    with FaultServer(DATA, to(location)) as server, engine() as fetching:
        with pytest.raises(FetchError, match=words) as caught:
            asked(fetching, server.url())
        assert len(server.asked) == requests
        assert caught.value.retryable is (words == "no URL")
        assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("Host", "x"), ("Range", "x"), ("a b", "x"), ("X", "a\r\nY: b"), ("X", "a\n"), ("", "x")],
)
def test_fields_that_a_caller_may_not_set(name: str, text: str) -> None:
    with pytest.raises(UsageError):
        target("http://127.0.0.1/", {name: text})


@pytest.mark.parametrize("expired", [False, True])
def test_a_place_that_is_known_is_asked_first_and_without_credentials(expired: bool) -> None:
    """If it has expired, the redirects are followed anew."""
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine() as fetching:
        if expired:
            store.behave = lambda _, client: client.head("403 Forbidden", "Content-Length: 0")
        plain = target(hub.url(), {"Authorization": SECRET})
        there = replace(plain, redirected_to=parse_url(store.url("/signed")))
        answer = fetching.probe(there, 5_000).done.result(10)
        check(*fetched(fetching, answer))
        assert all("authorization" not in each.fields for each in store.asked)
        assert all(each.fields["authorization"] == SECRET for each in hub.asked)
        assert (len(store.asked) == 1) is expired
        assert bool(hub.asked) is expired


def test_a_private_name_needs_its_word() -> None:
    with FaultServer(DATA) as server:
        network = network_of(files=(INSIDE, server))
        with engine(network=network) as fetching:
            with pytest.raises(AccessDeniedError, match="not allowed"):  # without any rules
                fetching.probe(Target(parse_url(URL), "weights"), 10).done.result(10)
            _refused(fetching, URL, AllowRules(), "not allowed")
            assert network.resolved == []
            _refused(fetching, URL, AllowRules((Allow("http", "files.internal"),)), "not public")
            assert network.connected == []
            entry = Allow("http", "files.internal", prefix="loras/", private=True)
            assert _started(fetching, URL, AllowRules((entry,))) == DATA[:100]
            assert network.connected == [INSIDE]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://other.internal/loras/x", "not allowed"),
        ("https://other.internal/loras/x", "not public"),
        ("/admin?key=swordfish", "not allowed"),
        ("/loras/..%2fadmin", "not allowed"),
        ("/loras/%2e%2e/admin", "not allowed"),
    ],
)
def test_a_redirect_leads_nowhere_else_inside(location: str, words: str) -> None:
    with FaultServer(DATA, to(location)) as server, FaultServer(DATA) as other:
        network = network_of(files=(INSIDE, server), other=("10.9.9.9", other))
        entry = Allow("http", "files.internal", prefix="loras/", private=True)
        with engine(network=network) as fetching:
            _refused(fetching, URL, AllowRules((entry,)), words)
        assert (len(server.asked), len(other.clients)) == (1, 0)


def test_a_redirect_to_what_was_named() -> None:
    with FaultServer(DATA) as store:
        with FaultServer(DATA, to("http://store.internal/blobs/x")) as server:
            network = network_of(files=(INSIDE, server), store=("10.9.9.9", store))
            files = Allow("http", "files.internal", private=True)
            blobs = Allow("http", "store.internal", prefix="blobs/", private=True)
            with engine(network=network) as fetching:
                assert _started(fetching, URL, AllowRules((files, blobs))) == DATA[:100]
                origin = parse_url("http://store.internal").origin
                assert _started(fetching, URL, AllowRules((files,), (origin,))) == DATA[:100]
        assert {asked.target for asked in store.asked} == {"/blobs/x"}


def test_an_idle_connection_is_not_a_way_around() -> None:
    """It leads inside, and was opened by rules that allow that."""
    with FaultServer(DATA) as server:
        network = network_of(files=(INSIDE, server))
        with engine(network=network) as fetching:
            named = AllowRules(named=(parse_url(URL).origin,))
            assert _started(fetching, URL, named) == DATA[:100]
            until(lambda: server.connected() == 1)
            _refused(fetching, URL, AllowRules((Allow("http", "files.internal"),)), "not public")
            assert len(server.asked) == 1
            assert _started(fetching, URL, named) == DATA[:100]
            assert len(server.clients) == 1, "it was kept for requests that may use it"
