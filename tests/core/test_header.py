"""The header parser against safetensors' own reader, and against every header that it forbids."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError
from lorax_async.formats.safetensors import DTYPE_BITS, Header, header_size, parse_header
from lorax_async.formats.strict_json import parse_object

INT64_MAX = 2**63 - 1
GOOD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def framed(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> str:
    members = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps(members, separators=(",", ":"))


def parse(text: bytes | str, data: int = 4, limits: Limits = Limits()) -> Header:
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
    random = np.random.default_rng(0)
    arrays = {
        name: random.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in tensors.items()
    }
    file = safetensors.numpy.save(arrays, metadata)
    agrees_with_safetensors(file)
    header = parse_header(memoryview(file)[: header_size(file, len(file))], len(file))
    assert header.metadata == (metadata or {})
    for span in header.tensors:
        assert file[span.start : span.stop] == arrays[span.name].tobytes()
        assert span.nbytes == arrays[span.name].nbytes


def test_the_dtypes_and_their_sizes_are_those_of_safetensors() -> None:
    with pytest.raises(safetensors.SafetensorError) as refusal:
        deserialize(framed(f'{{"a":{entry((), (0, 0), "no such")}}}'))
    variants = str(refusal.value).split("expected one of")[1]
    assert set(re.findall(r"`(\w+)`", variants)) == set(DTYPE_BITS)
    for dtype, bits in DTYPE_BITS.items():
        text = f'{{"a":{entry((8,), (0, bits), dtype)}}}'
        agrees_with_safetensors(framed(text) + bytes(bits))


TOKENS = st.sampled_from([b"0", b"9", b"-", b",", b"]", b'"', b" ", b"\\u0041", b"F4"])


@settings(deadline=None, max_examples=200)
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


@pytest.mark.parametrize(
    "value",
    [
        entry((), (0, 4)),
        entry((1,) * 8),
        entry((INT64_MAX, 0), (0, 0)),
        '\t{\n"dtype" : "F32" , "shape" :[ 1 ] , "data_offsets":[ 0,4]\r}',
        r'{"\u0064type":"F\u00332","shape":[1],"data_offsets":[0,4]}',
    ],
)
def test_legal_entries(value: str) -> None:
    agrees_with_safetensors(framed(f'{{"a":{value}}}') + bytes(0 if "0,0" in value else 4))


@pytest.mark.parametrize("name", ["a", "a" * 512, "é" * 256, "\N{GRINNING FACE}" * 128, "\0"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_of_one_to_512_bytes_are_legal(name: str, ascii_only: bool) -> None:
    text = f"{{{json.dumps(name, ensure_ascii=ascii_only)}:{entry()}}}"
    assert [span.name for span in parse(text).tensors] == [name]


def placed(**tensors: tuple[int, int, int]) -> str:
    """A header of tensors of so many F32, from one offset to another."""
    entries = (f'"{name}":{entry((n,), (at, to))}' for name, (n, at, to) in tensors.items())
    return f"{{{','.join(entries)}}}"


OVERLAP = "'x': bytes overlap those of 'a'"
PLACES = {
    "hole at the start": (placed(x=(1, 4, 8)), 8, "'x': a hole of 4 bytes"),
    "hole between": (placed(a=(1, 0, 4), x=(1, 8, 12)), 12, "'x': a hole of 4 bytes"),
    "empty tensor in a hole": (placed(a=(1, 0, 4), x=(0, 8, 8)), 8, "'x': a hole"),
    "empty tensor inside another": (placed(a=(1, 0, 4), x=(0, 2, 2)), 4, OVERLAP),
    "overlap": (placed(a=(2, 0, 8), x=(2, 4, 12)), 12, OVERLAP),
    "nested": (placed(x=(1, 4, 8), a=(3, 0, 12)), 12, OVERLAP),
    "same start": (placed(a=(1, 0, 4), x=(2, 0, 8)), 8, "'x': bytes overlap"),
    "one span for two": (placed(a=(1, 0, 4), x=(1, 0, 4)), 4, OVERLAP),
    "trailing bytes": (placed(x=(1, 0, 4)), 7, "3 bytes after the last tensor"),
    "trailing bytes and no tensor": ("{}", 1, "1 bytes after the last tensor"),
    "truncated": (placed(x=(1, 0, 4)), 3, "'x': the file ends 1 bytes before it does"),
    "offsets of another planet": (placed(x=(1, 2**90, 2**90 + 4)), 4, "'x': a hole"),
}

NO_INTEGERS: list[object] = [(1.0,), (True,), (None,), ("1",), ((1,),), 1, "04"]
ENTRIES: dict[str, list[str]] = {
    "needs 8 bytes": [entry((2,))],
    "needs 0 bytes": [entry((0,))],
    "needs 4 bytes": [entry((1,), (4, 0)), entry((1,), (-4, 0))],
    "data_offsets has": [entry((1,), (0,)), entry((1,), (0, 4, 4))],
    "9 dimensions, more than the limit of 8": [entry((1,) * 9)],
    "beyond int64": [
        *(entry((n, 0)) for n in (INT64_MAX + 1, -1)),
        *(entry((2**32, 2**31, *more)) for more in ((), (0,))),
    ],
    "does not fill whole bytes": [entry((3,), (0, 1), "F4"), entry((1,), (0, 1), "F6_E2M3")],
    "unknown dtype 'F31'": [entry(dtype="F31")],
    "unknown dtype 'f32'": [entry(dtype="f32")],
    "dtype is not a string": [entry(dtype=32)],
    "shape is not a list of integers": [
        *(entry(shape) for shape in NO_INTEGERS),
        *(entry().replace("[1]", other) for other in ("[-0]", "[1e0]")),
    ],
    "data_offsets is not a list of integers": [entry(offsets=other) for other in NO_INTEGERS],
    "'dtype' is missing": ['{"shape":[1],"data_offsets":[0,4]}'],
    "'shape' is missing": ['{"dtype":"F32","data_offsets":[0,4]}'],
    "'data_offsets' is missing": ['{"dtype":"F32","shape":[1]}'],
    "'strides' is unknown": [GOOD.replace("}", ',"strides":[1]}')],
    "not an object of just": ['["F32",[1],[0,4]]', "null"],
}
EMPTY = entry((0,), (0, 0))
TEXTS: dict[str, list[str | bytes]] = {
    "'x' appears twice": [f'{{"x":{EMPTY},"{x}":{GOOD}}}' for x in ("x", "\\u0078")],
    "'shape' appears twice": [
        f'{{"x":{GOOD[:-1]},"{name}":[1]}}}}' for name in ("shape", r"sh\u0061pe")
    ],
    "a name of 0 bytes": [f'{{"":{GOOD}}}'],
    "name of 513 bytes": [f'{{"{"x" * 513}":{GOOD}}}', f'{{"{"é" * 256}x":{GOOD}}}'],
    "lone surrogate": [rf'{{"\ud800":{GOOD}}}', r'{"__metadata__":{"k":"\udfff"}}'],
    "nests deeper than": [f'{{"x":{GOOD.replace("[1]", "[" * 20_000)}}}'],
    "Expecting ',' delimiter": [f'{{"__metadata__":{{}}"x":{GOOD}}}', f'{{"a":{GOOD} "x":{GOOD}}}'],
    "Expecting": [f'{{"x":{GOOD},}}', f'{{"x":{GOOD},,"y":{GOOD}}}', f'{{"x":{GOOD}'],
    "Extra data": [f'{{"x":{GOOD}}}{{}}', f'{{"x":{GOOD}}}\0\0'],
    "does not begin with '{'": [f' {{"x":{GOOD}}}', "[]", ""],
    "__metadata__: not an object": [f'{{"__metadata__":null,"x":{GOOD}}}'],
    "'shape' is not a string": [f'{{"__metadata__":{GOOD}}}'],  # a tensor of that name
    "'k' is not a string": ['{"__metadata__":{"k":1}}', '{"__metadata__":{"k":{}}}'],
    "'__metadata__' appears twice": [
        f'{{"__metadata__":{{}},"{name}":{{}}}}' for name in ("__metadata__", r"\u005f_metadata__")
    ],
    "'k' appears twice": [r'{"__metadata__":{"k":"1","\u006b":"1"}}'],
}
REFUSED: list[tuple[str | bytes, int, str]] = [
    *PLACES.values(),
    *((f'{{"x":{each}}}', 4, f"'x': {words}") for words, all_ in ENTRIES.items() for each in all_),
    *((each, 4, words) for words, all_ in TEXTS.items() for each in all_),
]


@pytest.mark.parametrize(
    ("text", "data", "fragment"),
    REFUSED,
    ids=[f"{n}: {words}" for n, (*_, words) in enumerate(REFUSED)],
)
def test_what_the_contract_forbids_is_refused_and_the_offender_named(
    text: bytes | str, data: int, fragment: str
) -> None:
    words = ".*".join(map(re.escape, fragment.split(": ", 1)))
    with pytest.raises(AdapterFormatError, match=words):
        parse(text, data)
    assert parse(f'{{"x":{GOOD}}}').tensors, "what the cases stand on"


def test_limits_are_limits() -> None:
    text = f'{{"x1":{EMPTY},"x2":{GOOD}}}'
    exact = Limits(max_header_bytes=len(text), max_tensors=2, max_name_bytes=2, max_dimensions=1)
    assert len(parse(text, limits=exact).tensors) == 2
    for name, words in {
        "max_header_bytes": f"over the limit of {len(text) - 1}.*raise Limits.max_header_bytes",
        "max_tensors": "2 tensors, more than the limit of 1",
        "max_name_bytes": "'x1': a name of 2 bytes",
    }.items():
        with pytest.raises(AdapterFormatError, match=words):
            parse(text, limits=replace(exact, **{name: getattr(exact, name) - 1}))


def test_by_default_a_header_may_have_2_mib_and_65_536_tensors() -> None:
    entries = [f'"{k:x}":{EMPTY}' for k in range(65_537)]
    text, fewer = ",".join(entries), ",".join(entries[:-1])
    with pytest.raises(AdapterFormatError, match="is over the limit of 2,097,152"):
        parse(f"{{{text}}}", 0)
    roomy = Limits(max_header_bytes=1 << 23)
    tensors = parse(f"{{{fewer}}}", 0, roomy).tensors
    assert [span.name for span in tensors] == sorted(f"{k:x}" for k in range(65_536))
    with pytest.raises(AdapterFormatError, match="65,537 tensors, more than the limit of 65,536"):
        parse(f"{{{text}}}", 0, roomy)


@pytest.mark.parametrize(
    ("first", "file_size", "fragment"),
    [
        (b"", 0, "0 bytes and cannot be"),
        (b"\2\0\0\0\0\0\0", 7, "7 bytes and cannot be"),
        (b"\3\0\0\0\0\0\0\0", 10, "10 bytes and ends inside its header of 3"),
        ((2**21 + 1).to_bytes(8, "little"), 2**30, "a header of 2,097,153 bytes is over"),
        (b"\xff" * 8, 2**63, "or this is no safetensors file"),
        (b"PK\3\4\0\0\0\0", 2**40, "or this is no safetensors file"),
        (b"\2\0\0\0\0\0\0\0{", 10, "only 9 of its 10 bytes could be read"),
    ],
)
def test_sizes_that_cannot_be(first: bytes, file_size: int, fragment: str) -> None:
    with pytest.raises(AdapterFormatError, match=fragment):
        parse_header(first, file_size)


@pytest.mark.parametrize(
    "read", [parse, lambda text: parse_object(text.encode(), what="x", max_bytes=9)]
)
def test_running_out_of_memory_is_the_documents_fault(
    read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(json.JSONDecoder, "decode", exhausted)
    with pytest.raises(AdapterFormatError, match="too large for the memory"):
        read("{}")
