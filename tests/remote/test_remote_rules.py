"""Where requests may lead, by the operator's entries; nothing is sent anywhere."""

from ipaddress import ip_address

import pytest

from lorax_async.ids import Allow
from lorax_async.remote.base import AllowRules
from lorax_async.urls import parse_url

METADATA = "169.254.169.254"
ENDPOINT = parse_url("http://hub.internal:8080/hf").origin


def allows(rules: AllowRules, text: str, hop: int = 0) -> bool:
    return rules.allows(parse_url(text), hop)


def admits(rules: AllowRules, text: str, address: str) -> bool:
    return rules.allows_address(parse_url(text), ip_address(address))


def test_the_first_request_needs_an_entry() -> None:
    rules = AllowRules((Allow("https", "host", prefix="a/"), Allow("http", "plain", 8080)))
    for text in ("https://host/a/x", "https://host:443/a/x?k=v", "https://host/%61/x"):
        assert allows(rules, text)
    assert allows(rules, "http://plain:8080/any//thing;x")
    for text in (
        *("https://host/b", "https://host/ab", "https://host/", "http://host/a/x"),
        *("https://host:8443/a/x", "https://other/a/x", "http://plain/x", "https://plain:8080/x"),
    ):
        assert not allows(rules, text)
    assert not allows(AllowRules(), "https://host/")


def test_entries_of_other_kinds_are_for_no_url() -> None:
    rules = AllowRules((Allow("hub"), Allow("s3", "host-bucket"), Allow("az", "abc")))
    assert not allows(rules, "https://host-bucket/")
    assert not allows(rules, "https://huggingface.co/org/name")


def test_a_redirect_goes_to_any_https_and_no_other_http() -> None:
    rules = AllowRules((Allow("http", "plain", prefix="a/"),))
    assert allows(rules, "https://anywhere.example/x?sig=s", 1)
    assert allows(rules, "http://plain/a/x", 1)
    for text in ("http://anywhere.example/x", "http://plain/b", "http://plain:81/a/x"):
        assert not allows(rules, text, 1)


@pytest.mark.parametrize(
    "path",
    [
        *("a/../b", "a/%2e%2e/b", "a/%2E./b", "a%2f..%2fb", "a//b", "a/;/../b", "a/%c0%ae%c0%ae/b"),
        *("a/..%5cb", "a/%252e%252e/b", "b?/a/", "?a/", "A/b", "%2561/x"),
    ],
)
def test_a_prefix_is_not_fooled(path: str) -> None:
    rules = AllowRules((Allow("http", "10.0.0.1", prefix="a/"),))
    for hop in (0, 1):
        assert not allows(rules, f"http://10.0.0.1/{path}", hop)
    assert not admits(rules, f"http://10.0.0.1/{path}", "10.0.0.1")


def test_named_origins_are_allowed_as_they_are() -> None:
    rules = AllowRules(named=(ENDPOINT,))
    for hop in (0, 1):
        assert allows(rules, "http://hub.internal:8080/any;where", hop)
        assert not allows(rules, "http://hub.internal/", hop)
    for address in ("127.0.0.1", "10.0.0.1", METADATA, "::1"):
        assert admits(rules, "http://HUB.internal:8080/", address)
        assert not admits(rules, "http://hub.internal/", address)
        assert not admits(rules, "https://hub.internal:8080/", address)
        assert not admits(rules, "https://cdn.example/", address)


def test_a_private_name_needs_its_word() -> None:
    for private in (False, True):
        rules = AllowRules((Allow("http", "files.internal", prefix="a/", private=private),))
        assert allows(rules, "http://files.internal/a/x", 1)
        assert admits(rules, "http://files.internal/a/x", "10.0.0.1") is private
        assert not admits(rules, "http://files.internal/b", "10.0.0.1")


@pytest.mark.parametrize(
    ("host", "own", "others"),
    [
        ("10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2", "127.0.0.1", "::ffff:10.0.0.2"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1", "10.0.0.1"]),
        (METADATA, [METADATA], ["169.254.0.1", "127.0.0.1"]),
        ("::1", ["::1"], ["127.0.0.1", "::2", "fe80::1"]),
        ("fe80::1", ["fe80::1"], ["fe80::2"]),
        ("localhost", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"], ["10.0.0.1", METADATA]),
    ],
)  # fmt: skip
def test_an_address_or_localhost_is_itself(host: str, own: list[str], others: list[str]) -> None:
    rules = AllowRules((Allow("http", host),))
    url = f"http://[{host}]/" if ":" in host else f"http://{host}/"
    assert all(admits(rules, url, address) for address in own)
    assert not any(admits(rules, url, address) for address in [*others, "0.0.0.0", "224.0.0.1"])
    assert not any(admits(rules, "http://name.example/", address) for address in own)
    assert not any(admits(rules, url.replace("http:", "https:"), address) for address in own)


def test_a_host_has_one_spelling_here_too() -> None:
    rules = AllowRules(
        (Allow("http", "2001:db8::1"),), named=(parse_url("http://[::1]:80").origin,)
    )
    for host in ("[2001:0DB8:0::1]", "[2001:db8::1]"):
        assert allows(rules, f"http://{host}:80/x")
    assert allows(rules, "http://[0:0::1]/x", 1)
    assert admits(rules, "http://[0::1]/x", "::1")


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "a..b", "h."])
def test_odd_hosts_match_no_entry(host: str) -> None:
    rules = AllowRules((Allow("http", "127.0.0.1"), Allow("http", "localhost")))
    assert not allows(rules, f"http://{host}/", 1)
    assert not admits(rules, f"https://{host}/", "127.0.0.1")
