"""The strict reader against the standard library's, and against RFC 8259 by hand."""

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusals

from lorax_async.errors import AdapterFormatError
from lorax_async.formats.strict_json import JsonValue, parse_object

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


def read(data: bytes, max_bytes: int = 1 << 20) -> dict[str, JsonValue]:
    return parse_object(data, what="config", max_bytes=max_bytes)


@settings(deadline=None)
@given(objects, spellings)
def test_legal_objects_read_as_the_standard_library_reads_them(
    value: dict[str, JsonValue], spelling: dict[str, object]
) -> None:
    text = json.dumps(value, **spelling)  # type: ignore[arg-type]
    assert read(f"\t\r\n {text} \n".encode()) == json.loads(text)


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


ILLEGAL: dict[str, list[bytes]] = {
    "Expecting value": [b"", b" \n", b'{"a":+1}', b'{"a":.5}', '{"a":\u0661}'.encode()],
    "not a JSON object": [b"[]", b"1"],
    "Extra data": [b"{} {}", b"{}x", b"{}\0"],
    "byte order mark": [b"\xef\xbb\xbf{}"],
    "Expecting": ["{}".encode("utf-16-le")],
    "UTF-8": [b'{"a":"\xff"}', b'{"a":"\xc3', b'{"a":"\xc0\xaf"}', b'{"a":"\xed\xa0\x80"}'],
    "NaN": [b'{"a":NaN}'],
    "Infinity": [b'{"a":[Infinity]}', b'{"a":-Infinity}'],
    "1e999": [b'{"a":1e999}'],
    "lone surrogate": [
        *(rb'{"a":"\ud83d"}', rb'{"a":"\ude00"}', rb'{"a":"\ude00\ud83d"}'),
        *(rb'{"a":{"\ud800":1}}', rb'{"a":["\ud800"]}'),
    ],
    "'rank' appears twice": [
        *(b'{"rank":1,"rank":1}', b'{"a":[{"rank":1,"b":2,"rank":3}]}'),
        rb'{"rank":1,"\u0072ank":1}',
    ],
    "at character": [b'{"a":1,}', b'{"a":[1,]}'],
    "property name": [b"{'a':1}", b'{\x0c"a":1}', '{\N{NO-BREAK SPACE}"a":1}'.encode()],
    "delimiter": [b'{"a":1 /* */}', b'{"a":01}', b'{"a":[1'],
    "control character": [b'{"a":"\x01"}'],
    "escape": [rb'{"a":"\x41"}', rb'{"a":"\u12"}'],
    "nests deeper than 16": [
        b'{"a":' + b"[" * (n - 1) + b"]" * (n - 1) + b"}" for n in (17, 18, 500, 100_000)
    ],
}


def test_what_strict_json_is_not_is_refused() -> None:
    cases = {f"config: .*{re.escape(words)}": all_ for words, all_ in ILLEGAL.items()}
    refusals(read, AdapterFormatError, cases)


LEGAL: list[tuple[bytes, dict[str, JsonValue]]] = [
    (rb'{"\ud83d\ude00":1}', {"\N{GRINNING FACE}": 1}),
    (rb'{"a":"\\ud800"}', {"a": "\\ud800"}),
    (b'{"a":{"x":1},"b":{"x":1}}', {"a": {"x": 1}, "b": {"x": 1}}),
    (b'{"":0}', {"": 0}),
    (b'{"a":"\x7f"}', {"a": "\x7f"}),
    (b'{"a":"' + b"[{" * 50 + b'"}', {"a": "[{" * 50}),
    (b'{"a":' + b"[" * 15 + b"]" * 15 + b"}", {"a": json.loads("[" * 15 + "]" * 15)}),
    (b'{"a":"%s"}' % (b"x" + "é".encode() * (1 << 18)), {"a": "x" + "é" * (1 << 18)}),
]


def test_legal_corners() -> None:
    for data, value in LEGAL:
        assert read(data) == value
    assert isinstance(read(b'{"a":-0}')["a"], float), "as safetensors reads it"


@pytest.mark.parametrize("most", [sys.get_int_max_str_digits(), 0])
def test_endless_numbers_are_refused_whatever_the_interpreter_allows(most: int) -> None:
    before, digits = sys.get_int_max_str_digits(), ("1" * 5_000, "1" * 200_000)
    numbers = [n.format(all_) for n in ("{}", "-{}", "{}.5", "1e{}", "0.{}") for all_ in digits]
    texts = [f'{{"a":{number}}}'.encode() for number in numbers]
    sys.set_int_max_str_digits(most)
    try:
        refusals(read, AdapterFormatError, {"a number of|digits": texts})
    finally:
        sys.set_int_max_str_digits(before)


def test_the_size_limit_is_in_bytes() -> None:
    data = '{"a":"é"}'.encode()
    assert read(data, max_bytes=len(data)) == {"a": "é"}
    with pytest.raises(AdapterFormatError, match="10 bytes, more than the limit of 9"):
        read(data, max_bytes=len(data) - 1)
