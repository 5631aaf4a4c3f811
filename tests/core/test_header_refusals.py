"""Every header that the contract forbids, by hand: refused as malformed, the offender named."""

import json
import re

import pytest

from lorax_async.core import header
from lorax_async.core.header import Header, HeaderLimits, header_size, parse_header
from lorax_async.errors import AdapterFormatError

INT64_MAX = 2**63 - 1
GOOD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> str:
    members = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps(members, separators=(",", ":"))


def parse(text: bytes | str, data: int = 4, limits: HeaderLimits = HeaderLimits()) -> Header:
    raw = text.encode() if isinstance(text, str) else text
    prefix = len(raw).to_bytes(8, "little") + raw
    return parse_header(prefix, len(prefix) + data, limits)


PLACES = {
    "hole at the start": (f'{{"x":{entry((1,), (4, 8))}}}', 8, "'x': a hole of 4 bytes"),
    "hole between": (f'{{"a":{GOOD},"x":{entry((1,), (8, 12))}}}', 12, "'x': a hole of 4 bytes"),
    "empty tensor in a hole": (f'{{"a":{GOOD},"x":{entry((0,), (8, 8))}}}', 8, "'x': a hole"),
    "empty tensor inside another": (
        f'{{"a":{GOOD},"x":{entry((0,), (2, 2))}}}',
        4,
        "'x': bytes overlap those of 'a'",
    ),
    "overlap": (
        f'{{"a":{entry((2,), (0, 8))},"x":{entry((2,), (4, 12))}}}',
        12,
        "'x': bytes overlap those of 'a'",
    ),
    "nested": (
        f'{{"x":{entry((1,), (4, 8))},"a":{entry((3,), (0, 12))}}}',
        12,
        "'x': bytes overlap those of 'a'",
    ),
    "same start": (f'{{"a":{GOOD},"x":{entry((2,), (0, 8))}}}', 8, "'x': bytes overlap"),
    "one span for two": (f'{{"a":{GOOD},"x":{GOOD}}}', 4, "'x': bytes overlap those of 'a'"),
    "trailing bytes": (f'{{"x":{GOOD}}}', 7, "3 bytes after the last tensor"),
    "trailing bytes and no tensor": ("{}", 1, "1 bytes after the last tensor"),
    "truncated": (f'{{"x":{GOOD}}}', 3, "'x': the file ends 1 bytes before it does"),
    "offsets of another planet": (f'{{"x":{entry((1,), (2**90, 2**90 + 4))}}}', 4, "'x': a hole"),
}

ENTRIES = {
    "too few bytes": (entry((2,)), "needs 8 bytes"),
    "too many bytes": (entry((0,)), "needs 0 bytes"),
    "offsets backwards": (entry((1,), (4, 0)), "needs 4 bytes"),
    "one offset": (entry((1,), (0,)), "needs 4 bytes, not [0]"),
    "three offsets": (entry((1,), (0, 4, 4)), "not [0, 4, 4]"),
    "nine dimensions": (entry((1,) * 9), "9 dimensions, more than the limit of 8"),
    "a dimension beyond int64": (entry((INT64_MAX + 1, 0)), "beyond int64"),
    "a product beyond int64": (entry((2**32, 2**31)), "beyond int64"),
    "a product beyond int64 beside zero": (entry((2**32, 2**31, 0)), "beyond int64"),
    "half a byte": (entry((3,), (0, 1), "F4"), "does not fill whole bytes"),
    "three quarters of a byte": (entry((1,), (0, 1), "F6_E2M3"), "does not fill whole bytes"),
    "an unknown dtype": (entry(dtype="F31"), "unknown dtype 'F31'"),
    "a dtype in lower case": (entry(dtype="f32"), "unknown dtype 'f32'"),
    "a dtype that is no string": (entry(dtype=32), "dtype is not a string"),
    "a float in the shape": (entry((1.0,)), "shape holds something else than integers"),
    "a bool in the shape": (entry((True,)), "shape holds something else than integers"),
    "a null in the shape": (entry((None,)), "shape holds something else than integers"),
    "a string in the shape": (entry(("1",)), "shape holds something else than integers"),
    "a list in the shape": (entry(((1,),)), "shape holds something else than integers"),
    "a negative dimension": (entry((-1,)), "shape holds something else than integers"),
    "minus zero": (entry().replace("[1]", "[-0]"), "shape holds something else than integers"),
    "an exponent": (entry().replace("[1]", "[1e0]"), "shape holds something else than integers"),
    "a shape that is no list": (entry(1), "shape is not a list"),
    "a float offset": (entry(offsets=(0, 4.0)), "data_offsets holds something else"),
    "a bool offset": (entry(offsets=(False, 4)), "data_offsets holds something else"),
    "a negative offset": (entry(offsets=(-4, 0)), "data_offsets holds something else"),
    "offsets that are no list": (entry(offsets="04"), "data_offsets is not a list"),
    "a leading zero": (entry().replace("[1]", "[01]"), "delimiter"),
    "a trailing comma": (entry().replace("[1]", "[1,]"), "at character"),
    "no dtype": ('{"shape":[1],"data_offsets":[0,4]}', "'dtype' is missing"),
    "no shape": ('{"dtype":"F32","data_offsets":[0,4]}', "'shape' is missing"),
    "no offsets": ('{"dtype":"F32","shape":[1]}', "'data_offsets' is missing"),
    "an unknown member": (GOOD.replace("}", ',"strides":[1]}'), "'strides' is unknown"),
    "a member twice": (GOOD.replace("}", ',"shape":[1]}'), "'shape' appears twice"),
    "a member twice by an escape": (
        GOOD.replace("}", r',"sh\u0061pe":[1]}'),
        "'shape' appears twice",
    ),
    "a lone surrogate": (GOOD.replace("F32", r"\ud800"), "lone surrogate"),
    "NaN": (GOOD.replace("[1]", "[NaN]"), "NaN"),
    "Infinity": (GOOD.replace("[1]", "[Infinity]"), "Infinity"),
    "a list for an entry": ('["F32",[1],[0,4]]', "not an object of just"),
    "null for an entry": ("null", "not an object of just"),
    "an object inside": (GOOD.replace("[1]", "{}"), "not an object of just"),
    "a huge entry": (GOOD.replace("{", "{" + " " * 65_536), "not an object of just"),
    "depth of 17": (GOOD.replace("[1]", "[" * 15 + "]" * 15), "nests deeper than 15"),
    "depth of 20,000": (GOOD.replace("[1]", "[" * 20_000 + "]" * 20_000), "nests deeper than"),
    "a number of 5,000 digits": (GOOD.replace("[1]", f"[{'1' * 5_000}]"), "5000 characters"),
    "cut short": (GOOD[:20], "Unterminated string"),
}

TEXTS = {
    "a name twice": (f'{{"x":{entry((0,), (0, 0))},"x":{GOOD}}}', "'x': the name stands there"),
    "a name twice by an escape": (f'{{"x":{entry((0,), (0, 0))},"\\u0078":{GOOD}}}', "'x'"),
    "no name": (f'{{"":{GOOD}}}', "a name of 0 bytes"),
    "a name of 513 bytes": (f'{{"{"x" * 513}":{GOOD}}}', "'xxx"),
    "a name of 513 bytes in 257 characters": (f'{{"{"é" * 256}x":{GOOD}}}', "name of 513 bytes"),
    "a lone surrogate in a name": (rf'{{"\ud800":{GOOD}}}', "lone surrogate"),
    "a control character in a name": (f'{{"a\tb":{GOOD}}}', "control character"),
    "a bad escape in a name": (rf'{{"\x41":{GOOD}}}', "bad escape"),
    "no value": ('{"x"}', "expected ':'"),
    "no comma": (f'{{"a":{GOOD} "x":{GOOD}}}', "expected ',' or '}'"),
    "a trailing comma": (f'{{"x":{GOOD},}}', "expected a string"),
    "no end": (f'{{"x":{GOOD}', "expected ',' or '}'"),
    "two values": (f'{{"x":{GOOD}}}{{}}', "more than one value"),
    "null bytes as padding": (f'{{"x":{GOOD}}}\0\0', "more than one value"),
    "white space first": (f' {{"x":{GOOD}}}', "expected an object at character 0"),
    "a list": ("[]", "expected an object at character 0"),
    "nothing": ("", "expected an object at character 0"),
    "a byte order mark": (f'\ufeff{{"x":{GOOD}}}', "byte order mark"),
    "invalid UTF-8": (b'{"\xff":' + GOOD.encode() + b"}", "not valid UTF-8"),
    "a surrogate in UTF-8": (b'{"\xed\xa0\x80":' + GOOD.encode() + b"}", "not valid UTF-8"),
    "null metadata": (f'{{"__metadata__":null,"x":{GOOD}}}', "__metadata__: expected an object"),
    "a tensor named __metadata__": (f'{{"__metadata__":{GOOD}}}', "'shape' is not a string"),
    "a number in the metadata": ('{"__metadata__":{"k":1}}', "'k' is not a string"),
    "an object in the metadata": ('{"__metadata__":{"k":{}}}', "'k' is not a string"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', "__metadata__: stands there twice"),
    "metadata twice by an escape": (
        r'{"__metadata__":{},"\u005f_metadata__":{}}',
        "__metadata__: stands there twice",
    ),
    "a key of the metadata twice": (
        r'{"__metadata__":{"k":"1","\u006b":"1"}}',
        "'k' appears twice",
    ),
    "a lone surrogate in the metadata": (r'{"__metadata__":{"k":"\udfff"}}', "lone surrogate"),
}


@pytest.mark.parametrize(("text", "data", "fragment"), PLACES.values(), ids=PLACES.keys())
def test_spans_that_do_not_tile_the_file(text: str, data: int, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=re.escape(fragment)):
        parse(text, data)


@pytest.mark.parametrize(("value", "fragment"), ENTRIES.values(), ids=ENTRIES.keys())
def test_entries_that_are_none(value: str, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=rf"tensor 'x': .*{re.escape(fragment)}"):
        parse(f'{{"x":{value}}}')


@pytest.mark.parametrize(("text", "fragment"), TEXTS.values(), ids=TEXTS.keys())
def test_headers_that_are_none(text: bytes | str, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=re.escape(fragment)):
        parse(text)


def test_the_cases_stand_on_a_legal_entry() -> None:
    assert [span.name for span in parse(f'{{"x":{GOOD}}}').tensors] == ["x"]


@pytest.mark.parametrize("spelling", [GOOD, GOOD.replace(",", ", ")], ids=["canonical", "spaced"])
def test_limits_are_limits(spelling: str) -> None:
    empty = spelling.replace("[1]", "[0]").replace("4]", "0]")
    text = f'{{"x1":{empty},"x2":{spelling}}}'
    size = len(text)
    assert len(parse(text, limits=HeaderLimits(size, 2, 2, 1, 3)).tensors) == 2
    for limits, fragment in [
        (HeaderLimits(max_header_bytes=size - 1), f"over the limit of {size - 1}"),
        (HeaderLimits(max_tensors=1), "'x2': more than the limit of 1 tensors"),
        (HeaderLimits(max_name_bytes=1), "'x1': a name of 2 bytes"),
        (HeaderLimits(max_dimensions=0), "'x1': 1 dimensions"),
    ]:
        with pytest.raises(AdapterFormatError, match=re.escape(fragment)):
            parse(text, limits=limits)


def test_the_metadata_has_a_limit_of_its_own() -> None:
    text = '{"__metadata__":{"a":"","b":""}}'
    assert parse(text, 0, HeaderLimits(max_metadata_members=2)).metadata == {"a": "", "b": ""}
    with pytest.raises(AdapterFormatError, match="more than the limit of 1 members"):
        parse(text, 0, HeaderLimits(max_metadata_members=1))


def test_the_default_number_of_tensors_is_65_536() -> None:
    empty = entry((0,), (0, 0))
    text = ",".join(f'"{k}":{empty}' for k in range(65_536))
    tensors = parse(f"{{{text}}}", 0).tensors
    assert [span.name for span in tensors] == sorted(map(str, range(65_536)))
    with pytest.raises(AdapterFormatError, match="'x': more than the limit of 65,536 tensors"):
        parse(f'{{{text},"x":{empty}}}', 0)


@pytest.mark.parametrize(
    ("first", "file_size", "fragment"),
    [
        (b"", 0, "0 bytes and cannot be"),
        (b"\2\0\0\0\0\0\0", 7, "7 bytes and cannot be"),
        (b"\3\0\0\0\0\0\0\0", 10, "10 bytes and ends inside its header of 3"),
        ((2**24 + 1).to_bytes(8, "little"), 2**30, "a header of 16,777,217 bytes is over"),
        (b"\xff" * 8, 2**63, "or this is no safetensors file"),
        (b"PK\3\4\0\0\0\0", 2**40, "or this is no safetensors file"),
    ],
)
def test_sizes_that_cannot_be(first: bytes, file_size: int, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=fragment):
        header_size(first, file_size)


def test_header_size_counts_the_eight_bytes() -> None:
    assert header_size(b"\2\0\0\0\0\0\0\0{}", 10) == 10


def test_a_prefix_that_was_read_short() -> None:
    with pytest.raises(AdapterFormatError, match="only 9 of its 10 bytes could be read"):
        parse_header(b"\2\0\0\0\0\0\0\0{", 10)


def test_running_out_of_memory_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(header, "_in_file_order", exhausted)
    with pytest.raises(AdapterFormatError, match="too large for the memory"):
        parse("{}", 0)


def test_a_checked_header_cannot_be_changed() -> None:
    metadata = parse('{"__metadata__":{"k":"v"}}', 0).metadata
    with pytest.raises(TypeError, match="does not support item assignment"):
        metadata["k"] = "w"  # type: ignore[index]
