"""Text as it comes: whole characters, nothing of a stop string, and the same as all at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.server.calls.text import Detokenizer, StopStrings
from server.world import tokenizer, tokens_of

BACKEND = tokenizer().backend_tokenizer


@given(st.text(max_size=20), st.text(max_size=6))
def test_a_text_comes_back(text: str, prompt: str) -> None:
    reader = Detokenizer(BACKEND, tokens_of(prompt))
    assert "".join(map(reader.feed, tokens_of(text))) == text


def test_no_half_character_comes() -> None:
    reader = Detokenizer(BACKEND, tokens_of("x"))
    assert [reader.feed(token) for token in tokens_of("a😀b")] == ["a", "", "", "", "😀", "b"]


def test_special_tokens_are_no_text() -> None:
    reader = Detokenizer(BACKEND, ())
    eos = tokenizer().eos_token_id
    assert [reader.feed(token) for token in (*tokens_of("a"), eos, *tokens_of("b"))] == [
        "a",
        "",
        "b",
    ]


@given(st.lists(st.integers(0, 300), max_size=20))
def test_any_tokens_are_read(tokens: list[int]) -> None:
    """Also bytes that are no text, and ids of which the tokenizer knows nothing."""
    reader = Detokenizer(BACKEND, ())
    text = "".join(map(reader.feed, tokens))
    whole = BACKEND.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(text) or "\N{REPLACEMENT CHARACTER}" in whole


def test_the_first_word_keeps_its_space() -> None:
    """Some decoders drop the space of a text's first word, which is not where an answer begins."""
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    made.decoder = decoders.Metaspace()
    assert Detokenizer(made, [0]).feed(1) == " b"


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        ((), ["a", "b"], ["a", "b"]),
        (("STOP",), ["on", "e ST", "O", "P two"], ["on", "e ", "", ""]),
        (("STOP",), ["ST", "ST", "OP"], ["", "ST", ""]),
        (("ab", "b"), ["b"], [""]),
        (("abc", "b"), ["abc"], ["a"]),  # "b" is complete first
        (("xy",), ["x"], [""]),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[str], out: list[str]) -> None:
    reader = StopStrings(stops)
    assert [reader.feed(piece) for piece in pieces] == out


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.text("ab", max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_where_a_text_is_cut_changes_nothing(stops: list[str], text: str, cuts: list[int]) -> None:
    """The oracle takes one character more at a time, until the text so far ends with a stop."""
    expected, hit = text, False
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            expected, hit = text[: end - max(map(len, ended))], True
            break
    reader, out = StopStrings(stops), ""
    bounds = [0, *sorted(cuts), len(text)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        out += reader.feed(text[begin:end])
        assert expected.startswith(out), "nothing of a stop string is let through"
    out += reader.end()
    assert (out, reader.hit) == (expected, hit)
