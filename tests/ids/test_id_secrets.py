"""Ids stand in errors, events and logs: none holds a secret, and no refusal repeats its text."""

from __future__ import annotations

import pytest

from lorax_async import AdapterRef, Allow, InvalidAdapterIdError, parse_adapter_id
from lorax_async.errors import LoraxError


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("https://user:swordfish@host/a", None),
        (" https://swordfish@host/a", None),
        ("https:/user:swordfish@host/a", None),
        ("https:///user:swordfish@host/a", None),
        ("xhttps://user:swordfish@host/a", None),
        ("#https://user:swordfish@host/a", None),
        ("user:swordfish@host/a", "https"),
        ("s3://AKIA:swordfish@bucket/a", None),
        ("AKIA:swordfish@bucket/a", "s3"),
        ("https://host/a?sig=swordfish", None),
        ("https://host?sig=swordfish", None),
        ("host/a?sig=swordfish", "https"),
        ("az://container/a?sv=1&sig=swordfish", None),
        ("https://host/a#swordfish", None),
        ("s3://bucket/a\n?swordfish", None),
        ("ftp://user:swordfish@host/", None),
    ],
)
def test_a_url_with_a_secret_is_not_even_a_reference(text: str, source: str | None) -> None:
    """References stand in logs and errors; so none with a secret comes about."""
    with pytest.raises(InvalidAdapterIdError, match=r"user name|signatures and keys") as caught:
        AdapterRef(text, source=source)
    assert "swordfish" not in str(caught.value) + repr(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "text",
    ["policy", "lora:v1@step?", "what?", "./a://b@c?d", "/x?y#z", "file:///a", "a@b", "s3@x"],
)
def test_other_texts_may_be_names(text: str) -> None:
    """Of tensors, say, which no grammar binds; and of folders."""
    assert AdapterRef(text).text == text
    assert AdapterRef(f"x://{text}@y?", source="local").source == "local"


@pytest.mark.parametrize("text", ["https://host/swordfish/../x", "gs://swordfish--/", "swordfish"])
def test_no_text_repeats_what_was_given(text: str) -> None:
    with pytest.raises(LoraxError) as caught:
        parse_adapter_id(text, (Allow("https", "host"),))
    assert "swordfish" not in str(caught.value)
