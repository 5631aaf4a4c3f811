"""Redirects, and what must not go along: credentials, other schemes, other places."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fault_server import Asked, Client, FaultServer
from fetching import DATA, Anywhere, asked, check, engine, fetched, target

from lorax_async.errors import AccessDeniedError, FetchError, UsageError
from lorax_async.io.http.target import Target
from lorax_async.io.http.urls import parse_url

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

SECRET = "Bearer hf_swordfish"


def test_credentials_go_to_their_own_origin_only() -> None:
    headers = {"Authorization": SECRET, "X-Api-Key": "swordfish"}
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine() as fetching:

        def to_store(asked: Asked, client: Client) -> None:
            if asked.target == "/weights":
                client.head("302 Found", "Content-Length: 0", "Location: /second")
            else:
                place = store.url("/signed?X-Signature=swordfish")
                client.head("307 Moved", "Content-Length: 0", f"Location: {place}")

        hub.behave = to_store
        answer = fetching.ask(target(hub.url(), headers), 5_000).done.result(10)
        check(*fetched(fetching, answer))
        assert len(hub.asked) == 2, "ranges are asked for where the file lies"
        for each in hub.asked:
            assert each.fields["authorization"] == SECRET
        assert store.asked
        for each in store.asked:
            assert "swordfish" not in each.raw.partition("\r\n")[2]
            assert each.target == "/signed?X-Signature=swordfish"
        assert "swordfish" not in repr(answer) + repr(answer.target) + repr(answer.place)


def test_credentials_are_not_sent_again_by_way_of_another_origin() -> None:
    with FaultServer(DATA) as away, FaultServer(DATA) as home, engine() as fetching:

        def leave(asked: Asked, client: Client) -> None:
            if asked.target == "/weights":
                client.head("302 F", "Content-Length: 0", f"Location: {away.url('/x')}")
            else:
                home.right(asked, client)

        def come_back(asked: Asked, client: Client) -> None:
            client.head("302 F", "Content-Length: 0", f"Location: {home.url('/private')}")

        home.behave, away.behave = leave, come_back
        fetching.ask(target(home.url(), {"Authorization": SECRET}), 100).done.result(10)
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


@pytest.mark.parametrize("location", ["/weights", "/loop?x", ""])
def test_redirects_have_an_end(location: str) -> None:
    def loop(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", f"Location: {location}")

    with FaultServer(DATA, loop) as server, engine() as fetching:
        with pytest.raises(FetchError, match="3 redirects") as caught:
            asked(fetching, server.url())
        assert len(server.asked) == 4
        assert not caught.value.retryable


@pytest.mark.parametrize(
    "location",
    [
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://user:swordfish@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "gopher:x",
        "http://" + "a" * 9_000,
    ],
)
def test_redirects_to_what_is_no_place(location: str) -> None:
    def away(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", f"Location: {location}")

    with FaultServer(DATA, away) as server, engine() as fetching:
        with pytest.raises(FetchError, match="no URL") as caught:
            asked(fetching, server.url())
        assert len(server.asked) == 1
        assert "swordfish" not in str(caught.value)


class OnlyFiles(Anywhere):
    """Plain redirects are not allowed to leave `/weights`."""

    def allows(self, url: object, hop: int) -> bool:
        return "/weights" in getattr(url, "target", "")


def test_rules_are_asked_at_every_hop() -> None:
    def away(asked: Asked, client: Client) -> None:
        client.head("302 Found", "Content-Length: 0", "Location: /secret?token=swordfish")

    with FaultServer(DATA, away) as server, engine() as fetching:
        with pytest.raises(AccessDeniedError, match="not allowed") as caught:
            fetching.ask(target(server.url(), rules=OnlyFiles()), 10).done.result(10)
        assert len(server.asked) == 1
        assert "swordfish" not in str(caught.value)


def test_without_rules_plain_http_is_refused() -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        with pytest.raises(AccessDeniedError, match="not allowed"):
            fetching.ask(Target(parse_url(server.url()), "weights"), 10).done.result(10)
        assert not server.asked


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x"},
        {"Range": "bytes=0-"},
        {"a b": "x"},
        {"X": "a\r\nY: b"},
        {"X": "a\n"},
        {"": "x"},
    ],
)
def test_fields_that_a_caller_may_not_set(headers: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        target("http://127.0.0.1/", headers)


def test_a_place_that_is_known_is_asked_first_and_without_credentials() -> None:
    headers = {"Authorization": SECRET}
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine() as fetching:
        there = replace(target(hub.url(), headers), found=parse_url(store.url("/signed")))
        answer = fetching.ask(there, 5_000).done.result(10)
        check(*fetched(fetching, answer))
        assert not hub.asked
        assert all("authorization" not in each.fields for each in store.asked)


def test_where_a_known_place_has_expired_the_way_is_asked_for_anew() -> None:
    headers = {"Authorization": SECRET}
    with FaultServer(DATA) as store, FaultServer(DATA) as hub, engine() as fetching:
        store.behave = lambda _, client: client.head("403 Forbidden", "Content-Length: 0")
        there = replace(target(hub.url(), headers), found=parse_url(store.url("/signed")))
        answer = fetching.ask(there, 5_000).done.result(10)
        check(*fetched(fetching, answer))
        assert len(store.asked) == 1
        assert all(each.fields["authorization"] == SECRET for each in hub.asked)
