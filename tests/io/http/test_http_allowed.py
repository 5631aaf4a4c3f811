"""The operator's entries as the engine keeps them, at every hop and on every connection."""

from __future__ import annotations

import pytest
from fault_server import Asked, Behaviour, Client, FaultServer, until
from fetching import DATA, PretendNetwork, engine, target

from lorax_async import Allow
from lorax_async.errors import AccessDeniedError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import Rules
from lorax_async.io.http.urls import parse_url
from lorax_async.io.remote.rules import AllowRules

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

INSIDE = "10.1.2.3"
URL = "http://files.internal/loras/weights?key=swordfish"


def started(fetching: RangeEngine, url: str, rules: Rules) -> bytes:
    return fetching.ask(target(url, rules=rules), 100).done.result(10).start


def refused(fetching: RangeEngine, url: str, rules: Rules, words: str) -> None:
    with pytest.raises(AccessDeniedError, match=words) as caught:
        started(fetching, url, rules)
    assert "swordfish" not in str(caught.value)
    assert not caught.value.retryable


def network_of(**places: tuple[str, FaultServer]) -> PretendNetwork:
    """Hosts by their first label: which address they have, and who answers there."""
    return PretendNetwork(
        names={f"{name}.internal": [address] for name, (address, _) in places.items()},
        ports={address: server.port for address, server in places.values()},
    )


def to(location: str) -> Behaviour:
    def away(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", f"Location: {location}")

    return away


def test_a_private_name_needs_its_word() -> None:
    with FaultServer(DATA) as server:
        network = network_of(files=(INSIDE, server))
        with engine(network=network) as fetching:
            refused(fetching, URL, AllowRules(), "not allowed")
            assert network.resolved == []
            refused(fetching, URL, AllowRules((Allow("http", "files.internal"),)), "not public")
            assert network.connected == []
            entry = Allow("http", "files.internal", prefix="loras/", private=True)
            assert started(fetching, URL, AllowRules((entry,))) == DATA[:100]
            assert network.connected == [INSIDE]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254"])
def test_a_private_name_is_neither_this_machine_nor_its_link(address: str) -> None:
    with FaultServer(DATA) as server:
        network = network_of(files=(address, server))
        with engine(network=network) as fetching:
            rules = AllowRules((Allow("http", "files.internal", private=True),))
            refused(fetching, URL, rules, "not public")
        assert network.connected == []


def test_loopback_by_its_entry() -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        rules = AllowRules((Allow("http", "127.0.0.1", server.port),))
        assert started(fetching, server.url(), rules) == DATA[:100]
        named = AllowRules(named=(parse_url(server.url()).origin,))
        assert started(fetching, server.url(), named) == DATA[:100]
        refused(fetching, server.url(), AllowRules((Allow("http", "127.0.0.1"),)), "not allowed")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://other.internal/loras/x", "not allowed"),
        ("https://other.internal/loras/x", "not public"),
        ("/admin?key=swordfish", "not allowed"),
        ("/loras/%2e%2e/admin", "not allowed"),
        ("/loras/..%2fadmin", "not allowed"),
    ],
)
def test_a_redirect_leads_nowhere_else_inside(location: str, words: str) -> None:
    with FaultServer(DATA, to(location)) as server, FaultServer(DATA) as other:
        network = network_of(files=(INSIDE, server), other=("10.9.9.9", other))
        entry = Allow("http", "files.internal", prefix="loras/", private=True)
        with engine(network=network) as fetching:
            refused(fetching, URL, AllowRules((entry,)), words)
        assert (len(server.asked), len(other.clients)) == (1, 0)


def test_a_redirect_to_what_was_named() -> None:
    with FaultServer(DATA) as store:
        with FaultServer(DATA, to("http://store.internal/blobs/x")) as server:
            network = network_of(files=(INSIDE, server), store=("10.9.9.9", store))
            files = Allow("http", "files.internal", private=True)
            blobs = Allow("http", "store.internal", prefix="blobs/", private=True)
            with engine(network=network) as fetching:
                assert started(fetching, URL, AllowRules((files, blobs))) == DATA[:100]
                origin = parse_url("http://store.internal").origin
                assert started(fetching, URL, AllowRules((files,), (origin,))) == DATA[:100]
        assert {asked.target for asked in store.asked} == {"/blobs/x"}


def test_an_idle_connection_is_not_a_way_around() -> None:
    """It leads inside, and was opened for somebody who may go there."""
    with FaultServer(DATA) as server:
        network = network_of(files=(INSIDE, server))
        with engine(network=network) as fetching:
            named = AllowRules(named=(parse_url(URL).origin,))
            assert started(fetching, URL, named) == DATA[:100]
            until(lambda: server.connected() == 1)
            refused(fetching, URL, AllowRules((Allow("http", "files.internal"),)), "not public")
            assert len(server.asked) == 1
            assert started(fetching, URL, named) == DATA[:100]
            assert len(server.clients) == 1, "it was kept for those who may use it"


def test_an_idle_connection_through_a_proxy_is_not_one_either() -> None:
    with FaultServer(DATA) as proxy:
        place = f"http://{INSIDE}/weights"
        with engine(proxies={"http": f"http://127.0.0.1:{proxy.port}"}) as fetching:
            assert started(fetching, place, AllowRules((Allow("http", INSIDE),))) == DATA[:100]
            assert proxy.asked[0].target == place

            class Careless(AllowRules):
                def allows(self, url: object, hop: int) -> bool:
                    return True

            refused(fetching, place, Careless(), "not public")
            assert len(proxy.asked) == 1
