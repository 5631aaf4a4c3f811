"""What traces call adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_async.adapter import AdapterKey, AdapterRef, Merge, Ref, RemoteKey, TensorsKey
from lorax_async.tracing.names import last_part, name_of


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name@main", "name@main"),
        ("https://host/a/b/?sig=secret", "b"),
        ("https://host/a/b#x", "b"),
        ("/home/tenant/sql", "sql"),
        ("C:\\tenant\\sql", "sql"),
        ("a\nb<c>", "a_b_c_"),
        ("x" * 100, "x" * 64),
        ("///", "adapter"),
        ("https://host.example", "adapter"),
        ("https://host.example:8443/", "adapter"),
        ("s3://bucket", "adapter"),
        ("s3://bucket/chat", "chat"),
        ("file:///home/tenant/sql", "sql"),
    ],
)
def test_a_name_is_the_last_part(text: str, name: str) -> None:
    assert last_part(text) == name


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        (AdapterRef("org/name"), "name"),
        (AdapterRef("org/name@main"), "name"),
        (AdapterRef("org/name@refs/pr/1"), "name"),
        (AdapterRef("org/name@feature/x", source="hub"), "name"),
        (AdapterRef("tenant/sql@v/1", source="local"), "1"),
        (AdapterRef(Path("tenant/sql@v/1")), "1"),
        (AdapterRef("./tenant@x/sql"), "sql"),
        (AdapterRef("https://host.example", token="hf_secret"), "adapter"),
        (RemoteKey("org/name", (), version="0123"), "name"),
        (AdapterKey("/home/tenant@x/sql", ()), "sql"),
        (TensorsKey.of("0123456789abcdef" * 4), "tensors 01234567"),
        (Merge("linear", ["org/secret", "org/other"], [1, 1]), "merge"),
    ],
)
def test_a_name_tells_an_adapter_and_nothing_else(ref: Ref, name: str) -> None:
    assert name_of(ref) == name
