"""docs/sources.md says what is there: its example is a config, its settings are the config's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lorax_async import AccessDeniedError, Allow, LoaderConfig, parse_adapter_id

PAGE = Path(__file__).parent.parent / "docs" / "sources.md"


def allowed(text: str, allow: tuple[Allow, ...]) -> bool:
    try:
        parse_adapter_id(text, allow)
    except AccessDeniedError:
        return False
    return True


def test_the_example_allows_what_it_says() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    config = eval(block, {"LoaderConfig": LoaderConfig, "Allow": Allow})
    for text in (
        *("my-org/sql", "s3://my-bucket/loras/sql", "https://files.example.com/adapters/sql"),
        *("http://localhost:8080/sql", "https://files.internal/sql"),
    ):
        assert allowed(text, config.allow)
    for text in (
        "org/sql",
        "s3://my-bucket/sql",
        "http://files.internal/sql",
        "http://localhost/x",
    ):
        assert not allowed(text, config.allow)


def test_pull_requests_are_allowed_as_it_says() -> None:
    (entries,) = re.findall(r"`allow=(\(.*?\))`", PAGE.read_text())
    allow = eval(entries, {"Allow": Allow})
    for text in ("org/name@refs/pr/1", "org/name", "other/name"):
        assert allowed(text, allow)
    assert not allowed("other/name@refs/pr/1", allow)


def test_settings_have_the_defaults_that_it_says() -> None:
    section = PAGE.read_text().partition("\n## Settings\n")[2]
    rows = re.findall(r"^\| `([a-z_]+)` \| `?(.+?)`? \|", section, re.MULTILINE)
    assert {name for name, _ in rows} <= {entry.name for entry in fields(LoaderConfig)}
    config = LoaderConfig()
    for name, text in rows:
        value = 16 << 30 if text == "16 GiB" else eval(text)
        assert getattr(config, name) == value, name
    assert len(rows) == 11
