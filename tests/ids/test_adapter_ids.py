"""Which texts are ids, what they mean, and that each adapter has one spelling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorax_async import AdapterRef, InvalidAdapterIdError, parse_adapter_id
from lorax_async.errors import MAX_TEXT
from lorax_async.ids.parsing import parsed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def meaning(text: Any, **more: Any) -> tuple[str | None, str | Path, str | None]:
    found = parsed(AdapterRef(text, **more))
    return found.source, found.id, found.revision


@pytest.mark.parametrize(
    ("text", "source", "id", "revision"),
    [
        ("org/name", "hub", "org/name", None),
        ("Org_1/na-me.v2_x", "hub", "Org_1/na-me.v2_x", None),
        ("_a/_", "hub", "_a/_", None),
        ("o/" + "n" * 96, "hub", "o/" + "n" * 96, None),
        ("org/name@main", "hub", "org/name", "main"),
        ("org/name@v1.0+cpu", "hub", "org/name", "v1.0+cpu"),
        ("org/name@team/branch-2", "hub", "org/name", "team/branch-2"),
        (f"org/name@{COMMIT}", "hub", "org/name", COMMIT),
        ("org/name@refs/pr/12", "hub", "org/name", "refs/pr/12"),
        ("s3://bucket/a/b", "s3", "s3://bucket/a/b/", None),
        ("S3://bucket/a/b/", "s3", "s3://bucket/a/b/", None),
        ("s3://my.bucket-1", "s3", "s3://my.bucket-1/", None),
        ("s3://bucket/a@v1/ü b/x=1", "s3", "s3://bucket/a@v1/ü b/x=1/", None),
        ("gs://my_bucket.example.com/x", "gs", "gs://my_bucket.example.com/x/", None),
        ("az://con-tainer/x", "az", "az://con-tainer/x/", None),
        ("https://Host.Example", "https", "https://host.example/", None),
        ("HTTPS://host.example:443/a/b", "https", "https://host.example/a/b/", None),
        ("http://host:80/", "http", "http://host/", None),
        ("http://host:08080/a/", "http", "http://host:8080/a/", None),
        ("https://host/a%7eb/%c3%a4/%2B", "https", "https://host/a~b/%C3%A4/%2B/", None),
        ("https://host/@scope/a,b;c".replace(";", ":"), "https", "https://host/@scope/a,b:c/", None),
        ("http://[2001:DB8:0:0::1]:80/x", "http", "http://[2001:db8::1]/x/", None),
        ("http://127.0.0.1:9000/x", "http", "http://127.0.0.1:9000/x/", None),
        ("https://xn--bcher-kva.example/", "https", "https://xn--bcher-kva.example/", None),
        ("/a//b/./c/", "local", "/a/b/c", None),
        ("/", "local", "/", None),
        ("./", "local", "./", None),
        ("./one/../two", "local", "./one/../two", None),
        (".//one", "local", "./one", None),
        ("../", "local", "../", None),
        ("../../x", "local", "../../x", None),
        ("file:///a%20b", "local", "/a b", None),
        ("FILE://LocalHost/a/", "local", "/a", None),
        ("./a?b#c@d:e", "local", "./a?b#c@d:e", None),
        ("file:///a%3Fb", "local", "/a?b", None),
    ],
)  # fmt: skip
def test_ids(text: str, source: str, id: str, revision: str | None) -> None:
    assert meaning(text) == (source, id, revision)
    again = AdapterRef(id, revision=revision)
    assert meaning(id, revision=revision) == (source, id, revision), "the one spelling is its own"
    assert parsed(parsed(again)) == parsed(again)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("name", r"a local folder is written \./name"),
        ("~/x", "a local folder begins with"),
        ("a/b/c", "org/name"),
        ("org/", "org/name"),
        ("/../x\0", "NUL"),
        *((f"org/{name}", "1 to 96 letters") for name in ("a--b", "a..b", ".a", "a-", "x.git", "é")),
        *((f"{org}/name", "1 to 96 letters") for org in ("-a", "a.", "n" * 97, "a b", "a\\b")),
        *((f"{org}/name", "no model repository") for org in ("datasets", "spaces", "kernels")),
        *(
            (f"org/name@{revision}", "a revision on the hub is")
            for revision in (
                *("", "a b", "../x", "a//b", "/a", "a/", "-a", "a..b", "a.", "x.lock", "a~1", "a^"),
                *("a:b", "a%2fb", "refs/heads/main", "refs/pr/0", "refs/pr/", "REFS/pr/1", "refs"),
                *("refs/pr/1/x", "a@b", "é", "n" * 201),
            )
        ),
        *(
            (f"s3://{name}/x", "bucket's name has 3 to 63")
            for name in (
                *("", "ab", "a" * 64, "Bucket", "a_b", "-ab", "ab-", "a..b", ".ab", "192.168.5.4"),
                *("xn--ab", "a b", "bücket", "bucket:9000"),
            )
        ),
        *(
            (f"gs://{name}/x", "bucket's name has 3 to 63")
            for name in ("ab", "Bucket", "10.0.0.1", "a" * 64 + ".com", "a..b", "_ab", "ab_")
        ),
        *(
            (f"az://{name}/x", "container's name has 3 to 63")
            for name in ("ab", "a--b", "a.b", "a_b", "Con", "-ab", "ab-", "a" * 64, "$web")
        ),
        *((f"s3://bucket/{key}", "no part that is") for key in ("/", "a//b", "../a", "a/.", "a//")),
        *(
            (f"s3://bucket/{key}", "without any encoding")
            for key in ("a%20b", "a\\b", "a|b", "a*b[c", "\u200bx", "a\u202eb", "{x}")
        ),
        ("s3://bucket/" + "k" * 901, "more than 900 bytes"),
        ("s3a://bucket/x", "no such source"),
        ("hf://org/name", "no such source"),
        ("ftp://host/x", "no such source"),
        ("hub://org/name", "no such source"),
        ("local://x", "no such source"),
        ("://x", "org/name"),
        ("https:/host/x", "org/name"),
        ("https:host/x", "org/name"),
        *(
            (f"https://{host}/x", "host")
            for host in ("", "-a", "a-", "a..b", "a.", ".a", "bücher.de", "\u212aelvin.example")
        ),
        *((f"https://{host}/", "host") for host in ("a" * 64, "a." * 127 + "com", "a b", "a\\b")),
        *(
            (f"http://{host}/", "four decimal numbers")
            for host in ("127.1", "0x7f.0.0.1", "2130706433", "0177.0.0.1", "1.2.3.256", "a.0x1")
        ),
        *(
            (f"http://[{host}]/", "no IPv6 address")
            for host in ("", "1.2.3.4", ":::1", "fe80::1%eth0", "fe80::1%25eth0", "v1.x")
        ),
        ("http://[::ffff:127.0.0.1]/", "an IPv4 address is written as such"),
        *((f"http://h:{port}/", "port") for port in ("0", "65536", "99999")),
        *((f"http://h:{port}/", "http") for port in ("", "x", "-1", "123456", "8 0")),
        *(
            (f"https://h/{path}", "no part that is")
            for path in ("../x", "a/..", ".", "%2e%2e/x", "a/%2E", ".%2e", "/", "a//b", "a//")
        ),
        *(
            (f"https://h/{path}", "in a part of it")
            for path in ("a%2fb", "a%2Fb", "a%5cb", "%00", "a%0a", "%252e%252e", "a%3b", "%E2%80%AE")
        ),
        *((f"https://h/{path}", "in ASCII, with all but") for path in ("é", "a b", "..;/x", "a%2")),
        *((f"https://h/{path}", "decode to UTF-8") for path in ("%ff", "%c0%ae%c0%ae", "%c0%af")),
        ("https://h/" + "a" * 2048, "2,048"),
        ("x" * 4097, "longer than 4096 bytes"),
        ("./" + "ä" * 2048, "longer than 4096 bytes"),
        ("org/na\nme", "control"),
        ("./\ud800", "Unicode"),
        ("file:", "file:///path"),
        ("file:one", "file:///path"),
        ("file://host/a", "no other host"),
        ("file:///a%00b", "control"),
        ("file:///a?b", "%3F"),
        ("file:///%ff", "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_id(text: str, words: str) -> None:
    with pytest.raises(InvalidAdapterIdError, match=words) as caught:
        parse_adapter_id(text)
    assert len(str(caught.value)) <= MAX_TEXT
    assert (caught.value.stage, caught.value.retryable) == ("resolve", False)


@pytest.mark.parametrize("id", [7, None, b"org/name", ["org/name"]])
def test_what_is_no_text(id: Any) -> None:
    with pytest.raises(InvalidAdapterIdError, match="is a str or a pathlib.Path"):
        parse_adapter_id(id)


def test_a_path_stays_one() -> None:
    path = Path("s3:/bucket")
    assert meaning(path) == ("local", path, None)
    assert meaning(path, source="local") == ("local", path, None)
    for id in (Path("a\0b"), Path("a" * 4097), Path("\ud800")):
        with pytest.raises(InvalidAdapterIdError):
            parsed(AdapterRef(id))


# -- the form that LoRAX has ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "id"),
    [
        ("org/name", "hub", "org/name"),
        ("bucket/a/b", "s3", "s3://bucket/a/b/"),
        ("s3://bucket/a/b", "s3", "s3://bucket/a/b/"),
        ("bucket", "gs", "gs://bucket/"),
        ("container/a/", "az", "az://container/a/"),
        ("Host.example/a", "https", "https://host.example/a/"),
        ("host:8080", "http", "http://host:8080/"),
        ("name", "local", "./name"),
        ("org/name", "local", "./org/name"),
        ("org//name@x", "local", "./org/name@x"),
        ("..", "local", "../"),
        (".", "local", "./"),
        ("../..", "local", "../.."),
        ("file:///a", "local", "/a"),
    ],
)
def test_the_source_decides_what_a_text_without_one_means(text: str, source: str, id: str) -> None:
    assert meaning(text, source=source) == (source, id, None)
    assert meaning(id) == (source, id, None)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        *(("./name", source) for source in ("hub", "s3", "gs", "az", "https", "http", "pbase", "")),
        *(("s3://bucket/a", source) for source in ("hub", "gs", "az", "https", "local", "pbase")),
        ("https://host/a", "http"),
        ("http://host/a", "https"),
        ("file:///a", "hub"),
        ("/bucket/a", "s3"),
        (Path("bucket/a"), "s3"),
        (Path("org/name"), "hub"),
    ],
)
def test_two_words_that_contradict(text: str | Path, source: str) -> None:
    with pytest.raises(InvalidAdapterIdError, match="source= says otherwise; leave the source out"):
        parsed(AdapterRef(text, source=source))


@pytest.mark.parametrize("source", ["pbase", "", "HUB", "S3", "file", "azure"])
def test_a_source_that_there_is_not(source: str) -> None:
    with pytest.raises(InvalidAdapterIdError, match="no such source; it is one of hub, s3, gs, az"):
        parsed(AdapterRef("org/name", source=source))


def test_revisions_come_from_one_place() -> None:
    assert meaning("org/name", revision="v1") == ("hub", "org/name", "v1")
    assert meaning("org/name@v1", revision="v1") == ("hub", "org/name", "v1")
    with pytest.raises(InvalidAdapterIdError, match="one revision and revision= another"):
        parsed(AdapterRef("org/name@v1", revision="v2"))
    for wrong in ("", "a b", "refs/heads/x"):
        with pytest.raises(InvalidAdapterIdError, match="a revision on the hub is"):
            parsed(AdapterRef("org/name", revision=wrong))
    for version in ('"strong-etag"', "null", "3sL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY"):
        assert meaning("s3://bucket/a", revision=version)[2] == version
        assert meaning("https://host/a", revision=version)[2] == version
    for wrong in ("", "a b", "a\r\nb", "é", "v" * 1025):
        with pytest.raises(InvalidAdapterIdError, match="versionId or a strong ETag"):
            parsed(AdapterRef("s3://bucket/a", revision=wrong))
    for id in ("./one", "file:///one", Path("one")):
        with pytest.raises(InvalidAdapterIdError, match="a local folder has no revisions"):
            parsed(AdapterRef(id, revision="main"))


def test_what_else_was_said_stays() -> None:
    ref = AdapterRef("org/name@v1", token="t", digest="a" * 64, allow_stale=True)
    assert parsed(ref) == replace(ref, id="org/name", source="hub", revision="v1")
