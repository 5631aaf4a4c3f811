"""The header parser against safetensors' own reader, and against every header that it forbids."""

import codecs
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorax_async.core.header import (
    DTYPE_BITS,
    Header,
    HeaderLimits,
    TensorSpan,
    header_size,
    parse_header,
)
from lorax_async.core.strict_json import parse_object
from lorax_async.errors import AdapterFormatError

INT64_MAX = 2**63 - 1
GOOD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def framed(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> str:
    members = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps(members, separators=(",", ":"))


def parse(text: bytes | str, data: int = 4, limits: HeaderLimits = HeaderLimits()) -> Header:
    prefix = framed(text)
    return parse_header(prefix, len(prefix) + data, limits)


def deserialize(file: bytes) -> list[tuple[str, dict[str, Any]]]:
    return cast(list[tuple[str, dict[str, Any]]], safetensors.deserialize(file))  # type: ignore[no-untyped-call]


def agrees_with_safetensors(file: bytes) -> None:
    """Names, dtypes, shapes and bytes are those that safetensors itself finds in the file."""
    header = parse_header(file, len(file))
    ours = {
        span.name: (span.dtype, list(span.shape), file[span.start : span.stop])
        for span in header.tensors
    }
    theirs = {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(file)
    }
    assert ours == theirs
    assert len(header.tensors) == len(theirs)
    order = [(span.start, span.stop, span.name) for span in header.tensors]
    assert order == sorted(order)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 3), max_size=7)


@st.composite
def legal_files(draw: st.DrawFn, canonical: bool = False) -> bytes:
    """Files by hand: any dtype, entries in any order, any legal spelling of the JSON."""
    entries: list[tuple[str, object]] = []
    offset = 0
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(shapes)
        if DTYPE_BITS[dtype] < 8:
            shape = [*shape, 4]
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8
        members = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        order = list(members) if canonical else draw(st.permutations(list(members)))
        entries.append((name, {member: members[member] for member in order}))
        offset += size
    metadata = draw(
        st.none() | st.dictionaries(names, st.text('aé"\\\n\N{GRINNING FACE}', max_size=5))
    )
    if metadata is not None:
        entries.append(("__metadata__", metadata))
    separators = (",", ":") if canonical else draw(st.sampled_from([(",", ":"), (" , ", "\n: ")]))
    ascii_only = not canonical and draw(st.booleans())
    text = json.dumps(
        dict(draw(st.permutations(entries))), separators=separators, ensure_ascii=ascii_only
    )
    padding = draw(st.sampled_from(["", " ", "\n\t\r "]))
    return framed(text + padding) + random.Random(offset).randbytes(offset)


@settings(deadline=None)
@given(legal_files())
def test_what_is_legal_reads_as_safetensors_reads_it(file: bytes) -> None:
    agrees_with_safetensors(file)


@settings(deadline=None)
@given(
    st.dictionaries(
        names, st.tuples(st.sampled_from(["float32", "int8", "bool", "uint16"]), shapes), max_size=8
    ),
    # Not empty: safetensors 0.8.0 then writes a header that it cannot read itself.
    st.none() | st.dictionaries(names, names, min_size=1, max_size=3),
)
def test_what_safetensors_writes_is_read_back(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: dict[str, str] | None
) -> None:
    arrays = {
        name: np.frombuffer(random.Random(name).randbytes(4 * int(np.prod(shape))), np.uint8)[
            : int(np.prod(shape)) * np.dtype(dtype).itemsize
        ]
        for name, (dtype, shape) in tensors.items()
    }
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype,
            shape=shape,
            data_ptr=arrays[name].ctypes.data,
            data_len=arrays[name].nbytes,
        )
        for name, (dtype, shape) in tensors.items()
    }
    file = bytes(safetensors.serialize(specs, metadata))
    agrees_with_safetensors(file)
    header = parse_header(memoryview(file)[: header_size(file, len(file))], len(file))
    assert header.metadata == (metadata or {})
    for span in header.tensors:
        assert file[span.start : span.stop] == arrays[span.name].tobytes()
        assert span.nbytes == arrays[span.name].nbytes


def test_a_file_on_disk_reads_as_safe_open_reads_it(tmp_path: Path) -> None:
    tensors = {
        f"layers.{k}.lora_A.weight": torch.full((k, 3), float(k), dtype=dtype)
        for k, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = parse_header(path.read_bytes(), path.stat().st_size)
    with safetensors.safe_open(path, "pt") as file:
        assert {span.name for span in header.tensors} == set(file.keys())
        assert header.metadata == file.metadata()
        for span in header.tensors:
            view = file.get_slice(span.name)
            assert (span.dtype, list(span.shape)) == (view.get_dtype(), view.get_shape())


def test_the_dtypes_and_their_sizes_are_those_of_safetensors() -> None:
    with pytest.raises(safetensors.SafetensorError) as refusal:
        deserialize(framed(f'{{"a":{entry((), (0, 0), "no such")}}}'))
    variants = str(refusal.value).split("expected one of")[1]
    assert set(re.findall(r"`(\w+)`", variants)) == set(DTYPE_BITS)
    for dtype, bits in DTYPE_BITS.items():
        text = f'{{"a":{entry((8,), (0, bits), dtype)}}}'
        agrees_with_safetensors(framed(text) + bytes(bits))


TOKENS = st.sampled_from([b"0", b"9", b"-", b",", b"]", b'"', b" ", b"\\u0041", b"F4"])


@settings(deadline=None, max_examples=400)
@given(legal_files() | legal_files(canonical=True), st.data())
def test_a_damaged_file_is_refused_or_reads_as_safetensors_reads_it(
    file: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2) | TOKENS)
    if data.draw(st.booleans()):
        # Keep the size right, so that the damage reaches the JSON and the offsets.
        text_size = int.from_bytes(file[:8], "little") + len(damaged) - len(file)
        damaged[:8] = max(text_size, 0).to_bytes(8, "little")
    try:
        parse_header(bytes(damaged), len(damaged))
    except AdapterFormatError:
        return
    agrees_with_safetensors(bytes(damaged))


def test_an_empty_file_of_no_tensors() -> None:
    assert parse("{}", data=0) == Header((), {}, data_start=10)
    assert parse('{"__metadata__":{"format":"pt"}} \n', data=0).metadata == {"format": "pt"}


def test_spans_are_absolute_in_file_order_and_empty_ones_by_name() -> None:
    text = (
        f'{{"late":{entry((2,), (4, 12))},"z":{entry((0, 5), (4, 4))},"first":{entry()}'
        f',"a":{entry((0,), (4, 4))},"end":{entry((0,), (12, 12))}}}'
    )
    header = parse(text, data=12)
    base = 8 + len(text)
    assert header.data_start == base
    assert header.tensors == (
        TensorSpan("first", "F32", (1,), base, base + 4),
        TensorSpan("a", "F32", (0,), base + 4, base + 4),
        TensorSpan("z", "F32", (0, 5), base + 4, base + 4),
        TensorSpan("late", "F32", (2,), base + 4, base + 12),
        TensorSpan("end", "F32", (0,), base + 12, base + 12),
    )


LEGAL = {
    "a scalar": entry((), (0, 4)),
    "eight dimensions": entry((1,) * 8),
    "an int64 dimension beside zero": entry((INT64_MAX, 0), (0, 0)),
    "white space everywhere": '\t{\n"dtype" : "F32" , "shape" :[ 1 ] , "data_offsets":[ 0,4]\r}',
    "escapes": r'{"\u0064type":"F\u00332","shape":[1],"data_offsets":[0,4]}',
}


@pytest.mark.parametrize("value", LEGAL.values(), ids=LEGAL.keys())
def test_legal_entries(value: str) -> None:
    data = 0 if "0,0" in value else 4
    agrees_with_safetensors(framed(f'{{"a":{value}}}') + bytes(data))


@pytest.mark.parametrize("name", ["a", "a" * 512, "é" * 256, "\N{GRINNING FACE}" * 128, "\0"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_of_one_to_512_bytes_are_legal(name: str, ascii_only: bool) -> None:
    text = f"{{{json.dumps(name, ensure_ascii=ascii_only)}:{entry()}}}"
    assert [span.name for span in parse(text).tensors] == [name]


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

# Strings of the metadata are read in pieces.
TEXTS |= {
    f"{literal} at {at}": ('{"__metadata__":{"k":' + literal, f"at character {at + 21};")
    for literal, at in [
        (r'"\ud800"', 1),
        (r'"ab\ude00\ud83d"', 3),
        (r'"\ud800\u0041"', 1),
        (r'"\x41"', 1),
        (r'"\u00g0"', 1),
        ('"a\\n\x01"', 4),
        (r'"\na', 4),
        (r'"\n\"', 5),
    ]
}
REFUSED = {
    **PLACES,
    **{
        f"entry: {name}": (f'{{"x":{value}}}', 4, f"'x': {text}")
        for name, (value, text) in ENTRIES.items()
    },
    **{f"text: {name}": (text, 4, fragment) for name, (text, fragment) in TEXTS.items()},
}


@pytest.mark.parametrize(("text", "data", "fragment"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_contract_forbids_is_refused_and_the_offender_named(
    text: bytes | str, data: int, fragment: str
) -> None:
    words = ".*".join(map(re.escape, fragment.split(": ", 1)))
    with pytest.raises(AdapterFormatError, match=words):
        parse(text, data)
    assert parse(f'{{"x":{GOOD}}}').tensors, "what the cases stand on"


@pytest.mark.parametrize("offset", range(4))
def test_long_strings_are_read_in_pieces_that_split_no_pair(offset: int) -> None:
    text = r"\n" * offset + r"a\ud83d\ude00\t" * 10_000
    metadata = parse(f'{{"__metadata__":{{"k":"{text}"}}}}', 0).metadata
    assert metadata["k"] == "\n" * offset + "a\N{GRINNING FACE}\t" * 10_000


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


def test_a_prefix_that_was_read_short() -> None:
    assert header_size(b"\2\0\0\0\0\0\0\0{}", 10) == 10
    with pytest.raises(AdapterFormatError, match="only 9 of its 10 bytes could be read"):
        parse_header(b"\2\0\0\0\0\0\0\0{", 10)


@pytest.mark.parametrize(
    "read", [parse, lambda text: parse_object(text.encode(), what="x", max_bytes=9)]
)
def test_running_out_of_memory_is_the_documents_fault(
    read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted(codecs.IncrementalDecoder):
        def decode(self, *_: object) -> str:
            raise MemoryError

    monkeypatch.setattr(codecs, "getincrementaldecoder", lambda _: Exhausted)
    with pytest.raises(AdapterFormatError, match="too large for the memory"):
        read("{}")
