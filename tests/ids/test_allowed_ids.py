"""Which ids the operator's entries allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_async import AccessDeniedError, AdapterRef, Allow, FetchError, parse_adapter_id
from lorax_async.errors import MAX_TEXT
from lorax_async.ids.parsing import as_parsed


def allowed(text: str, *allow: Allow) -> bool:
    try:
        parse_adapter_id(text, allow)
    except AccessDeniedError as error:
        assert (error.stage, error.retryable, isinstance(error, FetchError)) == (
            "resolve",
            False,
            True,
        )
        assert len(str(error)) <= MAX_TEXT
        return False
    return True


@pytest.mark.parametrize("text", ["org/name", "org/name@main", "./one", "/etc", "file:///x"])
def test_without_entries_the_hub_is_allowed(text: str) -> None:
    """And local folders, which `local_roots` decides on."""
    assert allowed(text)
    assert allowed(text, Allow("s3", "bucket"))


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("s3://bucket/a", "Allow('s3', 'bucket', prefix='a/')"),
        ("s3://bucket", "Allow('s3', 'bucket')"),
        ("gs://bucket/a/b", "Allow('gs', 'bucket', prefix='a/b/')"),
        ("az://container/a", "Allow('az', 'container', prefix='a/')"),
        ("https://Host.example/a", "Allow('https', 'host.example', prefix='a/')"),
        ("https://host:8443/a", "Allow('https', 'host', port=8443, prefix='a/')"),
        ("http://localhost:80/", "Allow('http', 'localhost')"),
        ("http://[::1]/a", "Allow('http', '::1', prefix='a/')"),
        ("https://host/ü".replace("ü", "%C3%BC"), "Allow('https', 'host', prefix='%C3%BC/')"),
        ("org/name@refs/pr/1", "Allow('hub', prefix='org/name/', pull_requests=True)"),
        ("org/name@pr/1", "Allow('hub', prefix='org/name/', pull_requests=True)"),
    ],
)
def test_all_else_needs_an_entry_which_the_refusal_says(text: str, entry: str) -> None:
    with pytest.raises(AccessDeniedError, match="not allowed here; the operator can") as caught:
        parse_adapter_id(text, ())
    assert f"LoaderConfig(allow=({entry}, …))" in caught.value.problem
    assert allowed(text, eval(entry))


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        (
            Allow("hub", prefix="org/"),
            ["org/a", "org/b@v1"],
            ["org2/a", "or/g", "Org/a", "other/org"],
        ),
        (Allow("hub", prefix="org/name/"), ["org/name", "org/name@x"], ["org/name2", "org/nam"]),
        (
            Allow("s3", "bucket", prefix="a/b/"),
            ["s3://bucket/a/b", "s3://bucket/a/b/c"],
            ["s3://bucket/a/bc", "s3://bucket/a", "s3://bucket", "s3://bucket2/a/b", "gs://bucket/a/b"],
        ),
        (
            Allow("https", "host", prefix="a~/"),
            ["https://HOST/a~", "https://host:443/a%7E/b", "https://host/%61%7e/b/c"],
            [
                *("https://host/a~b", "https://host/", "http://host/a~", "https://host:444/a~"),
                *("https://host.example/a~", "https://xhost/a~", "https://host/b/a~"),
            ],
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


def test_entries_add_up() -> None:
    entries = (Allow("hub", prefix="org/"), Allow("hub", prefix="other/x/"), Allow("s3", "bucket"))
    for text in ("org/a", "other/x", "s3://bucket/y"):
        assert allowed(text, *entries)
    assert not allowed("other/y", *entries)
    assert allowed("other/y", *entries, Allow("hub"))


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
    with pytest.raises(AccessDeniedError, match="pull requests of this adapter are not allowed"):
        as_parsed(ref, ())
    assert as_parsed(ref, (one,)).revision == "refs/pr/1"


def test_a_path_is_the_programs_own_word() -> None:
    assert as_parsed(AdapterRef(Path("/x")), (Allow("hub", prefix="org/"),)).source == "local"
