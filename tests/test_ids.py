"""Which texts are ids, what they mean, that each adapter has one spelling; and which are allowed."""

import posixpath
import re
import socket
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_async import AdapterRef, errors
from lorax_async.errors import MAX_TEXT, InvalidAdapterIdError
from lorax_async.ids import Allow, parse_adapter_id, parse_allowed_ref, parse_ref
from lorax_async.urls import parse_url

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def meaning(text: Any, **more: Any) -> tuple[str | None, str | Path, str | None]:
    found = parse_ref(AdapterRef(text, **more))
    return found.source, found.id, found.revision


@pytest.mark.parametrize(
    ("text", "source", "id", "revision"),
    [
        *((id, "hub", id, None) for id in ("org/name", "Org_1/na-me.v2_x", "o/" + "n" * 96)),
        *(
            (f"org/name@{revision}", "hub", "org/name", revision)
            for revision in ("main", "v1.0+cpu", "team/branch-2", COMMIT, "refs/pr/12")
        ),
        *((text, "s3", "s3://bucket/a/b/", None) for text in ("s3://bucket/a/b", "S3://bucket/a/b/")),
        ("s3://bucket/a@v1/ü b/x=1", "s3", "s3://bucket/a@v1/ü b/x=1/", None),
        ("gs://my_bucket.example.com/x", "gs", "gs://my_bucket.example.com/x/", None),
        ("az://con-tainer/x", "az", "az://con-tainer/x/", None),
        *(
            (f"{store}://{bucket}/x", store, f"{store}://{bucket}/x/", None)  # the store's matter
            for store in ("s3", "gs", "az")
            for bucket in ("a", "Bucket", "a..b", "10.0.0.1", "xn--ab", "$web", "_-", "a" * 300)
        ),
        ("s3://bucket/a|b*[{`'c;d", "s3", "s3://bucket/a|b*[{`'c;d/", None),
        (f"s3://bucket/{'k' * 1000}", "s3", f"s3://bucket/{'k' * 1000}/", None),
        ("HTTPS://host.example:443/a/b", "https", "https://host.example/a/b/", None),
        ("https://host/a%7eb/%c3%a4/%2B", "https", "https://host/a~b/%C3%A4/%2B/", None),
        ("https://host/@scope/a,b:c", "https", "https://host/@scope/a,b:c/", None),
        ("https://xn--bcher-kva.example/", "https", "https://xn--bcher-kva.example/", None),
        ("http://host:80/", "http", "http://host/", None),
        ("http://host:08080/a/", "http", "http://host:8080/a/", None),
        ("http://[2001:DB8:0:0::1]:80/x", "http", "http://[2001:db8::1]/x/", None),
        *((id, "local", id, None) for id in ("/", "./", "./one/../two", "../../x")),
        ("/a//b/./c/", "local", "/a/b/c", None), (".//one", "local", "./one", None),
        ("file:///a%20b", "local", "/a b", None), ("file:///a%3Fb", "local", "/a?b", None),
        ("FILE://LocalHost/a/", "local", "/a", None),
    ],
)  # fmt: skip
def test_an_id_has_one_spelling(text: str, source: str, id: str, revision: str | None) -> None:
    assert meaning(text) == (source, id, revision)
    again = AdapterRef(id, revision=revision)
    assert meaning(id, revision=revision) == (source, id, revision), "the one spelling is its own"
    assert parse_ref(parse_ref(again)) == parse_ref(again)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (form.format(part), words)
        for words, form, *parts in (
            ("empty", "{}", ""),
            (r"a local folder is written \./name", "{}", "name"),
            ("a local folder begins with", "{}", "~/x"),
            ("org/name", "{}", "a/b/c", "org/", "://x", "https:/host/x"),
            ("NUL", "{}", "/../x\0"),
            ("1 to 96 letters", "org/{}", "a--b", "a..b", ".a", "a-", "x.git", "é"),
            ("1 to 96 letters", "{}/name", "-a", "a.", "n" * 97, "a b", "a\\b"),
            ("no model repository", "{}/name", "datasets", "spaces", "kernels"),
            ("a revision on the hub is", "org/name@{}", "", "a b", "../x", "a//b", "/a", "a/", "-a",
             "a..b", "a.", "x.lock", "a~1", "a^", "a:b", "a%2fb", "a@b", "é", "n" * 201, "refs",
             "refs/heads/main", "refs/pr/0", "refs/pr/", "REFS/pr/1", "refs/pr/1/x"),
            ("bucket's name has letters", "s3://{}/x", "", ".", "..", ".ab", "a b", "bücket",
             "bucket:9000", "a%2fb", "a\\b", "a;b", "[::1]", "a&b", "a\u200b"),
            ("bucket's name has letters", "gs://{}/x", "..", "a:1"),
            ("container's name has letters", "az://{}/x", "..", "a:1"),
            ("no part that is", "s3://bucket/{}", "/", "a//b", "../a", "a/.", "a//", "a/../../b"),
            ("a part of the path", "s3://bucket/{}", "a%20b", "%2e%2e/a", "a\\b", "\u200bx",
             "a\u202eb"),
            ("no such source", "{}", "s3a://bucket/x", "hf://org/name", "local://x"),
            ("host", "https://{}/x", "", "-a", "a-", "a..b", "a.", ".a", "bücher.de",
             "\u212aelvin.example", "a" * 64, "a." * 127 + "com", "a b", "a\\b"),
            ("four decimal numbers", "http://{}/", "127.1", "0x7f.0.0.1", "2130706433",
             "0177.0.0.1", "1.2.3.256", "a.0x1"),
            ("an IPv6 address in brackets", "http://[{}]/", "", "1.2.3.4", ":::1", "fe80::1%eth0",
             "fe80::1%25eth0", "v1.x"),
            ("an IPv4 address is written as such", "{}", "http://[::ffff:127.0.0.1]/"),
            ("port", "http://h:{}/", "0", "65536", "99999"),
            ("http", "http://h:{}/", "", "x", "-1", "123456", "8 0"),
            ("no part that is", "https://h/{}", "../x", "a/..", ".", "%2e%2e/x", "a/%2E", ".%2e",
             "/", "a//b", "a//"),
            ("a part of the path", "https://h/{}", "a%2fb", "a%2Fb", "a%5cb", "%00", "a%0a",
             "%252e%252e", "a%3b", "%E2%80%AE"),
            ("in ASCII, with all but", "https://h/{}", "é", "a b", "..;/x", "a%2"),
            ("decode to UTF-8", "https://h/{}", "%ff", "%c0%ae%c0%ae", "%c0%af"),
            ("2,048", "https://h/{}", "a" * 2048),
            ("longer than 4096 bytes", "{}", "x" * 4097, "./" + "ä" * 2048),
            ("control", "{}", "org/na\nme", "file:///a%00b"),
            ("Unicode", "{}", "./\ud800"),
            ("file:///path", "{}", "file:", "file:one"),
            ("no other host", "{}", "file://host/a"),
            ("%3F", "{}", "file:///a?b"),
            ("UTF-8", "{}", "file:///%ff"),
        )
        for part in parts
    ],
)  # fmt: skip
def test_a_text_that_is_no_id_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidAdapterIdError, match=words) as caught:
        parse_adapter_id(text)
    assert len(str(caught.value)) <= MAX_TEXT
    assert (caught.value.stage, caught.value.retryable) == ("resolve", False)


def test_an_id_is_a_text_or_a_path() -> None:
    wrong: list[Any] = [7, None, b"org/name", ["org/name"]]
    for id in wrong:
        with pytest.raises(InvalidAdapterIdError, match="is a str or a pathlib.Path"):
            parse_adapter_id(id)
    path = Path("s3:/bucket")
    assert meaning(path) == ("local", path, None)
    assert meaning(path, source="local") == ("local", path, None)
    assert parse_allowed_ref(AdapterRef(path), (Allow("hub", prefix="org/"),)).source == "local"
    for id in (Path("a\0b"), Path("a" * 4097), Path("\ud800")):
        with pytest.raises(InvalidAdapterIdError):
            parse_ref(AdapterRef(id))


@pytest.mark.parametrize(
    ("text", "source", "id"),
    [
        ("org/name", "hub", "org/name"),
        ("s3://bucket/a/b", "s3", "s3://bucket/a/b/"),
        ("bucket", "gs", "gs://bucket/"),
        ("container/a/", "az", "az://container/a/"),
        ("Host.example/a", "https", "https://host.example/a/"),
        ("host:8080", "http", "http://host:8080/"),
        ("name", "local", "./name"),
        ("org//name@x", "local", "./org/name@x"),
        ("..", "local", "../"),
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
        *(("org/name", source) for source in ("pbase", "", "HUB", "S3", "file", "azure")),
    ],
)
def test_a_source_that_contradicts_the_text_is_refused(text: str | Path, source: str) -> None:
    words = "no such source; it is one of hub, s3" if text == "org/name" else "contradicts source="
    with pytest.raises(InvalidAdapterIdError, match=words):
        parse_ref(AdapterRef(text, source=source))


def test_revisions_come_from_one_place() -> None:
    assert meaning("org/name", revision="v1") == ("hub", "org/name", "v1")
    assert meaning("org/name@v1", revision="v1") == ("hub", "org/name", "v1")
    with pytest.raises(InvalidAdapterIdError, match="one revision and revision= another"):
        parse_ref(AdapterRef("org/name@v1", revision="v2"))
    for wrong in ("", "a b", "refs/heads/x"):
        with pytest.raises(InvalidAdapterIdError, match="a revision on the hub is"):
            parse_ref(AdapterRef("org/name", revision=wrong))
    for version in ('"strong-etag"', "null", "3sL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY"):
        assert meaning("s3://bucket/a", revision=version)[2] == version
        assert meaning("https://host/a", revision=version)[2] == version
    for wrong in ("", "a b", "a\r\nb", "é", "v" * 1025):
        with pytest.raises(InvalidAdapterIdError, match="versionId or a strong ETag"):
            parse_ref(AdapterRef("s3://bucket/a", revision=wrong))
    for id in ("./one", "file:///one", Path("one")):
        with pytest.raises(InvalidAdapterIdError, match="a local folder has no revisions"):
            parse_ref(AdapterRef(id, revision="main"))


def test_what_else_was_said_stays() -> None:
    ref = AdapterRef("org/name@v1", token="t", digest="a" * 64, allow_stale=True)
    parsed = replace(ref, id="org/name", source="hub", revision="v1")
    assert parse_ref(ref).plain == parsed


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("https://user:swordfish@host/a", None),
        (" https:/swordfish@host/a", None),
        ("#https:///user:swordfish@host/a", None),
        ("user:swordfish@host/a", "https"),
        ("AKIA:swordfish@bucket/a", "s3"),
        ("https://host?sig=swordfish", None),
        ("host/a?sig=swordfish", "https"),
        ("az://container/a?sv=1&sig=swordfish", None),
        ("https://host/a#swordfish", None),
        ("s3://bucket/a\n?swordfish", None),
        ("ftp://user:swordfish@host/", None),
    ],
)
def test_a_url_with_a_secret_is_not_even_a_reference(text: str, source: str | None) -> None:
    """References stand in logs and texts; so none with a secret comes about."""
    with pytest.raises(InvalidAdapterIdError, match=r"user name|signatures and keys") as caught:
        AdapterRef(text, source=source)
    assert "swordfish" not in str(caught.value) + repr(caught.value)
    assert caught.value.__context__ is None


NAMES = ["policy", "lora:v1@step?", "what?", "./a://b@c?d", "/x?y#z", "file:///a", "a@b", "s3@x"]


@pytest.mark.parametrize("text", NAMES)
def test_other_texts_may_be_names(text: str) -> None:
    """Of tensors, say, which no grammar binds; and of folders."""
    assert AdapterRef(text).text == text
    assert AdapterRef(f"x://{text}@y?", source="local").source == "local"


@pytest.mark.parametrize("text", ["https://host/swordfish/../x", "gs://sword:fish/", "swordfish"])
def test_no_text_repeats_what_was_given(text: str) -> None:
    with pytest.raises((InvalidAdapterIdError, errors.AccessDeniedError)) as caught:
        parse_adapter_id(text, (Allow("https", "host"),))
    assert "swordfish" not in str(caught.value)


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
    with pytest.raises(FrozenInstanceError):
        given.prefix = ""  # type: ignore[misc]
    with pytest.raises(TypeError):
        Allow("hub", "", None, "", True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("words", "more", "text"),
    [
        (("ftp", "host"), {}, "the scheme of Allow must be one of hub, s3, gs, az, https, http"),
        ((None,), {}, "the scheme of Allow must be"),
        (("https", None), {}, "host of Allow must be a str"),
        (("https", "host", None, None), {}, "prefix of Allow must be a str"),
        (("hub", "org"), {}, r"Allow\('hub', …\) has no host"),
        (("hub", "", 443), {}, "has no port"),
        (("s3", "bucket", 443), {}, "has no port"),
        (("s3", "bucket"), {"private": True}, "has no private"),
        (("https", "host"), {"pull_requests": True}, "has no pull_requests"),
        (("https", "host"), {"use_token": True}, "has no use_token"),
        (("hub",), {"use_token": None}, "use_token of Allow must be True or False"),
        (("https", "host"), {"private": 1}, "private of Allow must be True or False"),
        (("hub",), {"pull_requests": None}, "pull_requests of Allow must be True or False"),
        (("s3",), {}, "must name the bucket"),
        (("az",), {}, "must name the container"),
        (("https",), {}, "must name the host"),
        *((("s3", bucket), {}, "bucket's name has letters") for bucket in ("..", "a/b", "a:1", "*")),
        (("az", "a/b"), {}, "container's name has"),
        *((("https", host), {}, "host is a name of") for host in ("*", "*.com", "h/a", "h:80", "a@b")),
        *((("https", host), {}, "host is a name of") for host in ("h.", "é", "a b", "https://h")),
        (("https", "127.1"), {}, "four decimal numbers"),
        (("https", "fe80::1%eth0"), {}, "no IPv6 address"),
        (("http", "::ffff:10.0.0.1"), {}, "IPv4 address is written as such"),
        *((("https", "h", port), {}, "1 to 65535") for port in (0, -1, 65_536)),
        *((("https", "h", port), {}, "an integer or None") for port in (True, "443", 443.0)),
        *(
            (("https", "h"), {"prefix": prefix}, "must end with '/'.*must not begin")
            for prefix in ("a", "/", "/a/", "a/b")
        ),
        *((("https", "h"), {"prefix": prefix}, "no part that is") for prefix in ("../", "a//", "%2e/")),
        *((("https", "h"), {"prefix": prefix}, "a part of the path") for prefix in ("a%2fb/", "%252e/")),
        *((("s3", "bucket"), {"prefix": prefix}, "no part that is") for prefix in ("../", "a//b/")),
        *(
            (("s3", "bucket"), {"prefix": prefix}, "a part of the path")
            for prefix in ("%2e%2e/", "a?b/", "a#b/")
        ),
        *(
            (("hub",), {"prefix": prefix}, "neither 'org/' nor")
            for prefix in ("a--b/", "org/name/x/", "org//", ".x/", "org/na me/")
        ),
        (("https", "localhost"), {"private": True}, "need none"),
        (("https", "fd00::1"), {"private": True}, "need none"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused(words: tuple[Any, ...], more: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ConfigError, match=text) as caught:
        Allow(*words, **more)
    assert len(str(caught.value)) <= 1000


def allowed(text: str, *allow: Allow) -> bool:
    try:
        parse_adapter_id(text, allow)
    except errors.AccessDeniedError as error:
        assert isinstance(error, errors.FetchError)
        assert (error.stage, error.retryable) == ("resolve", False)
        assert len(str(error)) <= MAX_TEXT
        return False
    return True


def test_without_entries_the_hub_and_local_folders_are_allowed() -> None:
    for text in ("org/name", "org/name@main", "./one", "/etc", "file:///x"):
        assert allowed(text)
        assert allowed(text, Allow("s3", "bucket"))


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("s3://bucket/a", "Allow('s3', 'bucket', prefix='a/')"),
        ("gs://bucket/a/b", "Allow('gs', 'bucket', prefix='a/b/')"),
        ("https://host:8443/a", "Allow('https', 'host', port=8443, prefix='a/')"),
        ("http://localhost:80/", "Allow('http', 'localhost')"),
        ("https://host/%C3%BC", "Allow('https', 'host', prefix='%C3%BC/')"),
        ("org/name@refs/pr/1", "Allow('hub', prefix='org/name/', pull_requests=True)"),
    ],
)
def test_all_else_needs_an_entry_which_the_refusal_says(text: str, entry: str) -> None:
    words = "not allowed here; the operator can"
    with pytest.raises(errors.AccessDeniedError, match=words) as caught:
        parse_adapter_id(text, ())
    assert caught.value.problem.endswith(f"the setting allow=({entry}, …)")
    assert allowed(text, eval(entry))


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        (Allow("hub", prefix="org/"), ["org/a", "org/b@v1"], ["org2/a", "or/g", "Org/a", "o/org"]),
        (Allow("hub", prefix="org/name/"), ["org/name", "org/name@x"], ["org/name2", "org/nam"]),
        (
            Allow("s3", "bucket", prefix="a/b/"),
            ["s3://bucket/a/b", "s3://bucket/a/b/c"],
            ["s3://bucket/a/bc", "s3://bucket/a", "s3://bucket", "s3://bucket2/a/b", "gs://bucket/a/b",
             "s3://Bucket/a/b", "s3://bucket./a/b", "s3://bucket/A/b"],
        ),
        (
            Allow("https", "host", prefix="a~/"),
            ["https://HOST/a~", "https://host:443/a%7E/b", "https://host/%61%7e/b/c"],
            ["https://host/a~b", "https://host/", "http://host/a~", "https://host:444/a~",
             "https://host.example/a~", "https://xhost/a~", "https://host/b/a~"],
        ),
        (
            Allow("http", "127.0.0.1", 9000),
            ["http://127.0.0.1:9000/", "http://127.0.0.1:9000/x/y"],
            ["http://127.0.0.1/", "http://localhost:9000/", "https://127.0.0.1:9000/"],
        ),
    ],
)  # fmt: skip
def test_an_entry_is_for_its_folder(entry: Allow, inside: list[str], outside: list[str]) -> None:
    assert [text for text in inside if not allowed(text, entry)] == []
    assert [text for text in outside if allowed(text, entry)] == []


def test_pull_requests_are_for_those_that_were_named() -> None:
    one = Allow("hub", prefix="org/name/", pull_requests=True)
    for revision in ("refs/pr/1", "pr/1", "PR/1"):
        assert allowed(f"org/name@{revision}", one)
        assert not allowed(f"org/name@{revision}", Allow("hub"))
        assert not allowed(f"org/other@{revision}", one, Allow("hub"))
    assert allowed("org/name@main", one)
    assert not allowed("org/other@main", one), "an entry for the hub is all that is allowed of it"
    assert allowed("org/other@main", one, Allow("hub"))
    assert allowed("org/other@refs/pr/7", Allow("hub", pull_requests=True))
    ref = AdapterRef("org/name", revision="refs/pr/1")
    with pytest.raises(errors.AccessDeniedError, match="pull requests of this adapter are not all"):
        parse_allowed_ref(ref, ())
    assert parse_allowed_ref(ref, (one,)).revision == "refs/pr/1"


QUICK = settings(max_examples=120, deadline=None)
SIGNS = "/ // ./ ../ . .. @ : :80 :443 ? # ; - [ ] % %2e %2F %5c %00 %25 %7E %c3%a4 %ff [::1]"
WORDS = "org name main a B ü 0 127 0x7f refs/pr/1 e localhost bucket host.example 169.254.169.254"
SCHEMES = "s3:// gs:// az:// https:// http:// HTTP:// file: hf:// ://"
ODD = ["x" * 97, "\\", " ", "\0", "\n", "\u212a", "ſ", "\ud800"]
PIECES = st.sampled_from([*SIGNS.split(), *WORDS.split(), *SCHEMES.split(), *ODD])
TEXTS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=30)
SOURCES = st.sampled_from([None, "hub", "s3", "gs", "az", "https", "http", "local", "x"])


@pytest.mark.slow
@QUICK
@given(text=TEXTS, source=SOURCES, revision=st.none() | st.text(max_size=5))
@example("httpſ://host/", None, None)
@example("x" * 4096, "local", None)
def test_any_text_is_an_id_or_refused(text: str, source: str | None, revision: str | None) -> None:
    try:
        found = parse_ref(AdapterRef(text, source=source, revision=revision))
    except InvalidAdapterIdError as error:
        assert len(str(error)) <= MAX_TEXT
        return
    assert found.source in {"hub", "s3", "gs", "az", "https", "http", "local"}
    assert source in {None, found.source}
    assert parse_ref(found) == found
    assert parse_ref(AdapterRef(found.id, revision=found.revision)) == found
    if found.source in {"https", "http"}:
        url = parse_url(found.text)
        assert url.text == found.text
        assert url.origin.scheme == found.source


@QUICK
@given(
    org=st.text("ab_-.0é ", max_size=5) | st.text("a", min_size=95, max_size=98),
    name=st.text("ab_-.0é ", max_size=5) | st.sampled_from(["x.git", "x.gi", ".git", "a" * 97]),
)
def test_hub_names_are_what_the_hub_has(org: str, name: str) -> None:
    text = f"{org}/{name}"
    try:
        validate_repo_id(text)
    except HFValidationError:
        with pytest.raises(InvalidAdapterIdError):
            parse_ref(AdapterRef(text, source="hub"))
    else:
        assert parse_ref(AdapterRef(text, source="hub")).id == text


@QUICK
@given(host=st.text("0123456789.xabf", min_size=1, max_size=16))
@example("127.1")
@example("0x7f000001")
@example("017700000001")
def test_no_number_is_an_address_in_disguise(host: str) -> None:
    """The C library reads more texts as addresses than people do."""
    try:
        known = parse_ref(AdapterRef(f"http://{host}/"))
    except InvalidAdapterIdError:
        return
    try:
        read = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        assert re.search("[a-fx]", host.rpartition(".")[2]), "a name, then"
        return
    assert known.text == f"http://{read}/"


PATH_PIECES = st.sampled_from(
    ["a", "b.", "...", ".", "..", "/", "%2e", "%2E", "%2f", "%5C", "%25", "%7e", "~", "%41", "\\"]
)


@QUICK
@given(path=st.lists(PATH_PIECES, max_size=6).map("".join))
def test_a_path_has_one_reading(path: str) -> None:
    try:
        found = parse_ref(AdapterRef(f"https://host/{path}")).text
    except InvalidAdapterIdError:
        return
    once = unquote(urlsplit(found).path)
    assert unquote(once) == once
    assert posixpath.normpath(once) == (once.rstrip("/") or "/")
    assert once.rstrip("/") == unquote(f"/{path}").rstrip("/")
    assert "\\" not in once
