"""The strict reader against the standard library's, and against RFC 8259 by hand."""

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.core import strict_json
from lorax_async.core.strict_json import (
    JsonValue,
    enter_object,
    expect_end,
    parse_object,
    read_delimiter,
    read_name,
    read_string,
    read_value,
)
from lorax_async.errors import AdapterFormatError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | texts
numbers = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: str(x) != "-0.0")
values = st.recursive(
    scalars | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(texts, values, max_size=8)
spellings = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 1, "\t"]),
        "separators": st.sampled_from([(",", ":"), (" , ", " : "), (",\r\n", ":\t")]),
    }
)


def read(data: bytes, **limits: int) -> dict[str, JsonValue]:
    return parse_object(data, what="config", **{"max_bytes": 1 << 20, **limits})


def walk(text: str) -> dict[str, JsonValue]:
    members: dict[str, JsonValue] = {}
    more, position = enter_object(text, 0, what="config")
    while more:
        name, position = read_name(text, position, what="config")
        members[name], position = read_value(text, position, what="config")
        more, position = read_delimiter(text, position, what="config")
    expect_end(text, position, what="config")
    return members


@settings(deadline=None)
@given(objects, spellings)
def test_legal_objects_read_as_the_standard_library_reads_them(
    value: dict[str, JsonValue], spelling: dict[str, object]
) -> None:
    text = json.dumps(value, **spelling)  # type: ignore[arg-type]
    assert read(f"\t\r\n {text} \n".encode()) == json.loads(text)
    assert walk(text) == json.loads(text)


@settings(deadline=None)
@given(objects, st.data())
def test_a_damaged_object_is_refused_or_reads_as_the_standard_library_reads_it(
    value: dict[str, JsonValue], data: st.DataObject
) -> None:
    text = bytearray(json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b"{", b"}", b"\\ud800", b"1e999"])
        )
    try:
        accepted = read(bytes(text))
    except AdapterFormatError:
        return
    assert accepted == json.loads(bytes(text))


ILLEGAL = {
    "nothing": (b"", "Expecting value"),
    "white space only": (b" \n", "Expecting value"),
    "a list": (b"[]", "not a JSON object"),
    "a number": (b"1", "not a JSON object"),
    "two values": (b"{} {}", "more than one value"),
    "text after the value": (b"{}x", "more than one value"),
    "a null byte after the value": (b"{}\0", "more than one value"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16-le"), "Expecting"),
    "invalid UTF-8": (b'{"a":"\xff"}', "UTF-8"),
    "UTF-8 cut short": (b'{"a":"\xc3', "UTF-8"),
    "overlong UTF-8": (b'{"a":"\xc0\xaf"}', "UTF-8"),
    "a surrogate in UTF-8": (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
    "NaN": (b'{"a":NaN}', "NaN"),
    "Infinity": (b'{"a":[Infinity]}', "Infinity"),
    "-Infinity": (b'{"a":-Infinity}', "-Infinity"),
    "a float that overflows": (b'{"a":1e999}', "1e999"),
    "a lone high surrogate": (rb'{"a":"\ud83d"}', "lone surrogate"),
    "a lone low surrogate": (rb'{"a":"\ude00"}', "lone surrogate"),
    "surrogates in the wrong order": (rb'{"a":"\ude00\ud83d"}', "lone surrogate"),
    "a lone surrogate in a name": (rb'{"a":{"\ud800":1}}', "lone surrogate"),
    "a lone surrogate in a list": (rb'{"a":["\ud800"]}', "lone surrogate"),
    "a member twice": (b'{"rank":1,"rank":1}', "'rank' appears twice"),
    "a member twice inside": (b'{"a":[{"rank":1,"b":2,"rank":3}]}', "'rank' appears twice"),
    "a member twice by an escape": (rb'{"rank":1,"\u0072ank":1}', "'rank' appears twice"),
    "a trailing comma": (b'{"a":1,}', "at character"),
    "a trailing comma in a list": (b'{"a":[1,]}', "at character"),
    "single quotes": (b"{'a':1}", "property name"),
    "a comment": (b'{"a":1 /* */}', "delimiter"),
    "a control character": (b'{"a":"\x01"}', "control character"),
    "a bad escape": (rb'{"a":"\x41"}', "escape"),
    "a short escape": (rb'{"a":"\u12"}', "escape"),
    "a leading zero": (b'{"a":01}', "delimiter"),
    "a plus sign": (b'{"a":+1}', "Expecting value"),
    "a bare point": (b'{"a":.5}', "Expecting value"),
    "digits of another script": ('{"a":\N{ARABIC-INDIC DIGIT ONE}}'.encode(), "Expecting value"),
    "a form feed as white space": (b'{\x0c"a":1}', "property name"),
    "a no-break space": ('{\N{NO-BREAK SPACE}"a":1}'.encode(), "property name"),
    "no end": (b'{"a":[1', "delimiter"),
}


@pytest.mark.parametrize(("data", "fragment"), ILLEGAL.values(), ids=ILLEGAL.keys())
def test_what_strict_json_is_not_is_refused(data: bytes, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=f"config: .*{re.escape(fragment)}"):
        read(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (rb'{"\ud83d\ude00":1}', {"\N{GRINNING FACE}": 1}),
        (rb'{"a":"\\ud800"}', {"a": "\\ud800"}),
        (b'{"a":{"x":1},"b":{"x":1}}', {"a": {"x": 1}, "b": {"x": 1}}),
        (b'{"":0}', {"": 0}),
        (b'{"a":"\x7f"}', {"a": "\x7f"}),
    ],
    ids=["surrogate pair", "escaped backslash", "same member elsewhere", "empty name", "delete"],
)
def test_legal_corners(data: bytes, value: dict[str, JsonValue]) -> None:
    assert read(data) == value


def test_minus_zero_is_a_float() -> None:
    zero = read(b'{"a":-0}')["a"]
    assert isinstance(zero, float)


def nested(depth: int) -> bytes:
    """An object in which containers stand `depth` deep, the object included."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_sixteen_is_legal_and_seventeen_is_not() -> None:
    assert "a" in read(nested(16))
    for depth in (17, 18, 500, 100_000):
        with pytest.raises(AdapterFormatError, match="nests deeper than 16"):
            read(nested(depth))


def test_brackets_inside_strings_are_not_depth() -> None:
    assert read(b'{"a":"' + b"[{" * 50 + b'"}') == {"a": "[{" * 50}


@pytest.mark.parametrize("digits", [101, 5_000, 200_000])
@pytest.mark.parametrize("number", ["{}", "-{}", "{}.5", "1e{}", "0.{}"])
def test_numbers_nobody_writes_are_refused(number: str, digits: int) -> None:
    with pytest.raises(AdapterFormatError, match="a number of"):
        read(f'{{"a":{number.format("1" * digits)}}}'.encode())


def test_the_digit_limit_does_not_hang_on_the_interpreters() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(AdapterFormatError, match="a number of"):
            read(b'{"a":' + b"9" * 500_000 + b"}")
    finally:
        sys.set_int_max_str_digits(before)


def test_the_size_limit_is_in_bytes() -> None:
    data = '{"a":"é"}'.encode()
    assert read(data, max_bytes=len(data)) == {"a": "é"}
    with pytest.raises(AdapterFormatError, match="10 bytes, more than the limit of 9"):
        read(data, max_bytes=len(data) - 1)


def test_running_out_of_memory_is_the_documents_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(text: str) -> int:
        raise MemoryError

    monkeypatch.setattr(strict_json, "_DECODER", json.JSONDecoder(parse_int=exhausted))
    with pytest.raises(AdapterFormatError, match="too large for the memory"):
        read(b'{"a":1}')


def escaped(text: str, choose: st.DataObject) -> str:
    """A JSON string for `text`, each character spelt in one of its legal ways."""
    spelt = []
    for character in text:
        ways = [json.dumps(character)[1:-1], json.dumps(character, ensure_ascii=False)[1:-1]]
        ways += [json.dumps(character)[1:-1].upper()] if not character.isascii() else []
        way = choose.draw(st.sampled_from(ways))
        spelt.append(way.replace("\\U", "\\u"))
    return f'"{"".join(spelt)}"'


@settings(deadline=None)
@given(texts, st.data())
def test_strings_read_as_the_standard_library_reads_them(text: str, data: st.DataObject) -> None:
    literal = escaped(text, data)
    assert json.loads(literal) == text
    assert read_string(f"{literal},", 0, what="config") == (text, len(literal))


@pytest.mark.parametrize("offset", range(4))
def test_long_strings_are_read_in_pieces_that_split_no_pair(offset: int) -> None:
    literal = '"' + r"\n" * offset + r"a\ud83d\ude00\t" * 10_000 + '"'
    string, end = read_string(literal, 0, what="config")
    assert string == "\n" * offset + "a\N{GRINNING FACE}\t" * 10_000
    assert end == len(literal)


def test_text_longer_than_a_decoding_piece_may_split_a_character() -> None:
    text = "a" + "é" * (1 << 20)
    assert strict_json.decode_text(text.encode(), what="config") == text


@pytest.mark.parametrize(
    ("literal", "at"),
    [
        (r'"\ud800"', 1),
        (r'"ab\ude00\ud83d"', 3),
        (r'"\ud800\u0041"', 1),
        (r'"\x41"', 1),
        (r'"\u00g0"', 1),
        ('"a\\n\x01"', 4),
        (r'"\na', 4),
        (r'"\n\"', 5),
    ],
)
def test_bad_strings_are_refused_where_they_break(literal: str, at: int) -> None:
    with pytest.raises(AdapterFormatError, match=rf"at character {at};"):
        read_string(literal, 0, what="config")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[]", "expected an object at character 0"),
        ("", "expected an object at character 0"),
        ("{1:2}", "expected a string at character 1"),
        ('{"a" 1}', "expected ':' at character 5"),
        ('{"a":1 "b":2}', "expected ',' or '}' at character 7"),
        ('{"a":1', "expected ',' or '}' at character 6"),
        ('{"a":1,}', "expected a string at character 7"),
        ('{"a":}', "Expecting value at character 5"),
        ('{"a":1}}', "text goes on at character 7"),
    ],
)
def test_walking_member_by_member_refuses_what_is_no_object(text: str, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=re.escape(fragment)):
        walk(text)
