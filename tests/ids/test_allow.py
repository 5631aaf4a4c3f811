"""What an `Allow` may be, and by which words others are refused at construction."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lorax_async import Allow, ConfigError, LoaderConfig
from lorax_async.settings.allow import Reach


def made(*words: Any, **more: Any) -> Allow:
    return Allow(*words, **more)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (Allow("https", "Host.Example", 443), Allow("https", "host.example")),
        (Allow("http", "host", 80, "a/"), Allow("http", "host", prefix="a/")),
        (Allow("https", "[2001:DB8::0:1]"), Allow("https", "2001:db8::1")),
        (Allow("https", "host", prefix="%7ea/%c3%a4/"), Allow("https", "host", prefix="~a/%C3%A4/")),
    ],
)  # fmt: skip
def test_an_entry_has_one_spelling(given: Allow, kept: Allow) -> None:
    assert given == kept
    assert hash(given) == hash(kept)


def test_what_an_entry_is_kept_as() -> None:
    entry = Allow("https", "[2001:DB8::0:1]", 8443, "a%7E/")
    assert (entry.host, entry.port, entry.prefix) == ("2001:db8::1", 8443, "a~/")
    assert (entry.private, entry.pull_requests) == (False, False)
    assert Allow("http", "host", 80).port is None
    assert Allow("http", "host", 443).port == 443


@pytest.mark.parametrize(
    ("words", "more", "text"),
    [
        (("ftp", "host"), {}, "the scheme of Allow must be one of hub, s3, gs, az, https, http"),
        (("HTTPS", "host"), {}, "the scheme of Allow must be"),
        ((None,), {}, "the scheme of Allow must be"),
        (("https", None), {}, "host of Allow must be a str"),
        (("https", "host", None, None), {}, "prefix of Allow must be a str"),
        (("hub", "org"), {}, r"Allow\('hub', …\) has no host"),
        (("hub", "", 443), {}, "has no port"),
        (("s3", "bucket", 443), {}, "has no port"),
        (("s3", "bucket", 0), {}, "has no port"),
        (("s3", "bucket"), {"private": True}, "has no private"),
        (("hub",), {"private": True}, "has no private"),
        (("https", "host"), {"pull_requests": True}, "has no pull_requests"),
        (("https", "host"), {"use_token": True}, "has no use_token"),
        (("s3", "bucket"), {"use_token": True}, "has no use_token"),
        (("hub",), {"use_token": None}, "use_token of Allow must be True or False"),
        (("https", "host"), {"private": 1}, "private of Allow must be True or False"),
        (("hub",), {"pull_requests": None}, "pull_requests of Allow must be True or False"),
        (("s3",), {}, "must name the bucket"),
        (("gs",), {"prefix": "a/"}, "must name the bucket"),
        (("az",), {}, "must name the container"),
        (("https",), {}, "must name the host"),
        (("s3", "Bucket"), {}, "bucket's name has 3 to 63"),
        (("gs", "goo..gle"), {}, "bucket's name has"),
        (("az", "a--b"), {}, "container's name has"),
        *((("https", host), {}, "host is a name of") for host in ("*", "*.com", "h/a", "h:80", "a@b")),
        *((("https", host), {}, "host is a name of") for host in ("h.", "é", "a b", "https://h")),
        (("https", "127.1"), {}, "four decimal numbers"),
        (("https", "[::1"), {}, "is no IPv6|host is a name of"),
        (("https", "fe80::1%eth0"), {}, "no IPv6 address"),
        (("http", "::ffff:10.0.0.1"), {}, "IPv4 address is written as such"),
        *((("https", "h", port), {}, "1 to 65535") for port in (0, -1, 65_536)),
        *((("https", "h", port), {}, "an integer or None") for port in (True, "443", 443.0)),
        *(
            (("https", "h"), {"prefix": prefix}, "must end with '/'.*must not begin")
            for prefix in ("a", "/", "/a/", "a/b")
        ),
        *((("https", "h"), {"prefix": prefix}, "no part that is") for prefix in ("../", "a//", "%2e/")),
        *((("https", "h"), {"prefix": prefix}, "in a part") for prefix in ("a%2fb/", "%252e/")),
        (("https", "h"), {"prefix": "é/"}, "in ASCII"),
        *((("s3", "bucket"), {"prefix": prefix}, "no part that is") for prefix in ("../", "a//b/")),
        (("s3", "bucket"), {"prefix": "a%20/"}, "without any encoding"),
        *(
            (("hub",), {"prefix": prefix}, "neither 'org/' nor")
            for prefix in ("a--b/", "org/name/x/", "org//", ".x/", "org/na me/")
        ),
        (("https", "localhost"), {"private": True}, "need none"),
        (("https", "10.0.0.1"), {"private": True}, "need none"),
        (("https", "fd00::1"), {"private": True}, "need none"),
    ],
)  # fmt: skip
def test_what_is_no_entry(words: tuple[Any, ...], more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        made(*words, **more)
    assert len(str(caught.value)) <= 1000


def test_two_words_go_by_name() -> None:
    with pytest.raises(TypeError):
        made("hub", "", None, "", True)


def test_an_entry_is_a_frozen_value() -> None:
    entry = Allow("hub", prefix="org/")
    with pytest.raises(FrozenInstanceError):
        entry.prefix = ""  # type: ignore[misc]
    assert {entry, Allow("hub", prefix="org/")} == {entry}


def test_what_an_entry_covers() -> None:
    entry = Allow("https", "host", prefix="a/")
    assert entry.covers(Reach("https", "host", None, "a/"))
    assert entry.covers(Reach("https", "host", None, "a/b/"))
    for other in (
        Reach("http", "host", None, "a/"),
        Reach("https", "hosts", None, "a/"),
        Reach("https", "host", 444, "a/"),
        Reach("https", "host", None, "ab/"),
        Reach("https", "host", None, ""),
    ):
        assert not entry.covers(other)


def test_a_config_keeps_its_entries() -> None:
    entries = [Allow("hub", prefix="org/"), Allow("s3", "bucket")]
    wanted: Any = entries
    assert LoaderConfig(allow=wanted).allow == tuple(entries)
    assert LoaderConfig().allow == ()


@pytest.mark.parametrize("value", [None, "hub", Allow("hub"), ("hub",), [Allow], {Allow("hub")}])
def test_what_is_no_tuple_of_entries(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"allow must be a tuple of Allow\("):
        LoaderConfig(allow=value)
