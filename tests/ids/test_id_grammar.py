"""The grammar of ids under any text, and beside those who read the same texts: oracles."""

from __future__ import annotations

import posixpath
import re
import socket
from urllib.parse import unquote, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_async import (
    AccessDeniedError,
    AdapterRef,
    Allow,
    InvalidAdapterIdError,
    parse_adapter_id,
)
from lorax_async.errors import MAX_TEXT
from lorax_async.ids.parsing import parsed
from lorax_async.io.http.urls import parse_url

QUICK = settings(max_examples=400, deadline=None)
PIECES = st.sampled_from(
    [
        *("org", "name", "main", "a", "B", "ü", "0", "127", "0x7f", "x" * 97, "refs/pr/1", "e"),
        *("s3://", "gs://", "az://", "https://", "http://", "HTTP://", "file:", "hf://", "://"),
        *(
            "/",
            "//",
            "./",
            "../",
            ".",
            "..",
            "@",
            ":",
            ":80",
            ":443",
            "?",
            "#",
            ";",
            "\\",
            " ",
            "-",
        ),
        *("%2e", "%2F", "%5c", "%00", "%25", "%7E", "%c3%a4", "%ff", "%", "[::1]", "[", "]", "\0"),
        *("localhost", "bucket", "host.example", "169.254.169.254", "\u212a", "ſ", "\ud800", "\n"),
    ]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=30)
SOURCES = st.sampled_from([None, "hub", "s3", "gs", "az", "https", "http", "local", "x"])


@QUICK
@given(text=TEXTS, source=SOURCES, revision=st.none() | st.text(max_size=5))
@example("httpſ://host/", None, None)
@example("x" * 4096, "local", None)
def test_any_text_is_an_id_or_is_said_to_be_none(
    text: str, source: str | None, revision: str | None
) -> None:
    try:
        found = parsed(AdapterRef(text, source=source, revision=revision))
    except InvalidAdapterIdError as error:
        assert len(str(error)) <= MAX_TEXT
        return
    assert found.source in {"hub", "s3", "gs", "az", "https", "http", "local"}
    assert source in {None, found.source}
    assert parsed(found) == found
    assert parsed(AdapterRef(found.id, revision=found.revision)) == found
    if found.source in {"https", "http"}:
        url = parse_url(found.text)
        assert url.text == found.text
        assert url.origin.scheme == found.source


@QUICK
@given(text=TEXTS)
def test_what_is_parsed_is_allowed_or_denied(text: str) -> None:
    """By default only the hub is."""
    try:
        found = parse_adapter_id(text, (Allow("s3", "bucket"),))
    except InvalidAdapterIdError:
        return
    except AccessDeniedError as error:
        assert len(str(error)) <= MAX_TEXT
        return
    assert found.source in {"hub", "local"} or found.text.startswith("s3://bucket/")


@QUICK
@given(
    org=st.text("ab_-.0é ", max_size=5) | st.text("a", min_size=95, max_size=98),
    name=st.text("ab_-.0é ", max_size=5) | st.sampled_from(["x.git", "x.gi", ".git", "a" * 97]),
)
def test_hub_names_are_what_the_hub_has(org: str, name: str) -> None:
    text = f"{org}/{name}"
    try:
        validate_repo_id(text)
        accepted = True
    except HFValidationError:
        accepted = False
    try:
        assert parsed(AdapterRef(text, source="hub")).id == text
        assert accepted
    except InvalidAdapterIdError:
        assert not accepted


@QUICK
@given(host=st.text("0123456789.xabf", min_size=1, max_size=16))
@example("127.1")
@example("0x7f000001")
@example("017700000001")
def test_no_number_is_an_address_in_disguise(host: str) -> None:
    """The C library reads more texts as addresses than people do."""
    try:
        known = parsed(AdapterRef(f"http://{host}/"))
    except InvalidAdapterIdError:
        return
    try:
        read = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        assert re.search("[a-fx]", host.rpartition(".")[2]), "a name, then"
        return
    assert known.text == f"http://{read}/"


PATH_PIECES = st.sampled_from(
    [
        "a",
        "b.",
        "...",
        ".",
        "..",
        "/",
        "%2e",
        "%2E",
        "%2f",
        "%5C",
        "%25",
        "%7e",
        "~",
        "%41",
        "\\",
        ";",
    ]
)


@QUICK
@given(path=st.lists(PATH_PIECES, max_size=6).map("".join))
def test_a_path_has_one_reading(path: str) -> None:
    """However often a server decodes and tidies it, it is below the same folders."""
    try:
        found = parsed(AdapterRef(f"https://host/{path}")).text
    except InvalidAdapterIdError:
        return
    once = unquote(urlsplit(found).path)
    assert unquote(once) == once
    assert posixpath.normpath(once) == (once.rstrip("/") or "/")
    assert once.rstrip("/") == unquote(f"/{path}").rstrip("/")
    assert "\\" not in once
