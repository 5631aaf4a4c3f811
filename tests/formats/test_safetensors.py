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
from refusals import refusals

from lorax_async import AdapterFormatError, Limits
from lorax_async.formats.safetensors import (
    ALIGNMENT,
    DTYPE_BITS,
    Header,
    TensorDescription,
    header_size,
    parse_header,
    write_header,
)
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


deserialize = cast(Callable[[bytes], list[tuple[str, dict[str, Any]]]], safetensors.deserialize)


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
def legal_files(draw: st.DrawFn) -> bytes:
    """Files by hand: any dtype, entries in any order, any legal spelling of the JSON."""
    entries: dict[str, object] = {}
    offset = 0
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(shapes), *([4] if DTYPE_BITS[dtype] < 8 else [])]
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8
        members = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        entries[name] = dict(draw(st.permutations(list(members.items()))))
        offset += size
    texts = st.text('aé"\\\n\N{GRINNING FACE}', max_size=5)
    metadata = draw(st.none() | st.dictionaries(names, texts))
    if metadata is not None:
        entries["__metadata__"] = metadata
    text = json.dumps(
        dict(draw(st.permutations(list(entries.items())))),
        separators=draw(st.sampled_from([(",", ":"), (" , ", "\n: ")])),
        ensure_ascii=draw(st.booleans()),
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


NUMPY = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "BOOL": np.bool_}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(deadline=None)
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=9,
    )
)
def test_safetensors_reads_what_is_written(tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Of any names, some without bytes, in this order."""
    descriptions = [
        TensorDescription(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()
    ]
    prefix, bounds = write_header(descriptions)
    data = bytearray(prefix)
    for (start, stop), tensor in zip(bounds, descriptions, strict=True):
        assert (start, stop - start) == (len(data), tensor.nbytes)
        data += bytes([1]) * tensor.nbytes
    assert len(prefix) % ALIGNMENT == 0
    found = safetensors.numpy.load(bytes(data))
    assert {name: (array.dtype, list(array.shape)) for name, array in found.items()} == {
        name: (np.dtype(NUMPY[dtype]), shape) for name, (dtype, shape) in tensors.items()
    }


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
@given(legal_files(), st.data())
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


def test_legal_corners() -> None:
    assert parse("{}", data=0) == Header((), {}, data_start=10)
    assert parse('{"__metadata__":{"format":"pt"}} \n', data=0).metadata == {"format": "pt"}
    entries = [entry((), (0, 4)), entry((1,) * 8), entry((INT64_MAX, 0), (0, 0))]
    entries.append('\t{\n"dtype" : "F32" , "shape" :[ 1 ] , "data_offsets":[ 0,4]\r}')
    entries.append(r'{"\u0064type":"F\u00332","shape":[1],"data_offsets":[0,4]}')
    for value in entries:
        agrees_with_safetensors(framed(f'{{"a":{value}}}') + bytes(0 if "0,0" in value else 4))
    for name in ("a", "a" * 512, "é" * 256, "\N{GRINNING FACE}" * 128, "\0"):
        for ascii_only in (True, False):
            text = f"{{{json.dumps(name, ensure_ascii=ascii_only)}:{GOOD}}}"
            assert [span.name for span in parse(text).tensors] == [name]


def placed(**tensors: tuple[int, int, int]) -> str:
    """A header of tensors of so many F32, from one offset to another."""
    entries = (f'"{name}":{entry((n,), (at, to))}' for name, (n, at, to) in tensors.items())
    return f"{{{','.join(entries)}}}"


OVERLAP = "'x': bytes overlap those of 'a'"
PLACES = [
    (placed(x=(1, 4, 8)), 8, "'x': a hole of 4 bytes"),
    (placed(a=(1, 0, 4), x=(1, 8, 12)), 12, "'x': a hole of 4 bytes"),
    (placed(a=(1, 0, 4), x=(0, 8, 8)), 8, "'x': a hole"),
    (placed(a=(1, 0, 4), x=(0, 2, 2)), 4, OVERLAP),
    (placed(a=(2, 0, 8), x=(2, 4, 12)), 12, OVERLAP),
    (placed(x=(1, 4, 8), a=(3, 0, 12)), 12, OVERLAP),
    (placed(a=(1, 0, 4), x=(2, 0, 8)), 8, "'x': bytes overlap"),
    (placed(a=(1, 0, 4), x=(1, 0, 4)), 4, OVERLAP),
    (placed(x=(1, 0, 4)), 7, "3 bytes after the last tensor"),
    ("{}", 1, "1 bytes after the last tensor"),
    (placed(x=(1, 0, 4)), 3, "'x': the file ends 1 bytes before it does"),
    (placed(x=(1, 2**90, 2**90 + 4)), 4, "'x': a hole"),
]

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
    **{f"unknown dtype '{dtype}'": [entry(dtype=dtype)] for dtype in ("F31", "f32")},
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
TEXTS: dict[str, list[str]] = {
    "'x' appears twice": [f'{{"x":{EMPTY},"{x}":{GOOD}}}' for x in ("x", "\\u0078")],
    "'shape' appears twice": [
        f'{{"x":{GOOD[:-1]},"{name}":[1]}}}}' for name in ("shape", r"sh\u0061pe")
    ],
    "a name of 0 bytes": [f'{{"":{GOOD}}}'],
    "name of 513 bytes": [f'{{"{"x" * 513}":{GOOD}}}', f'{{"{"é" * 256}x":{GOOD}}}'],
    "lone surrogate": [rf'{{"\ud800":{GOOD}}}', r'{"__metadata__":{"k":"\udfff"}}'],
    "nests deeper than": [f'{{"x":{GOOD.replace("[1]", "[" * 20_000)}}}'],
    "Expecting ',' delimiter": [f'{{"__metadata__":{{}}"x":{GOOD}}}', f'{{"a":{GOOD} "x":{GOOD}}}'],
    "Expecting": [f'{{,"x":{GOOD}}}', f'{{"x":{GOOD},,"y":{GOOD}}}', f'{{"x":{GOOD}'],
    "write it again as standard JSON": [f'{{"x":{GOOD},}}'],  # Python 3.13 has its own words
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


def test_what_the_contract_forbids_is_refused_and_the_offender_named() -> None:
    entries = {f"'x': {words}": [f'{{"x":{e}}}' for e in all_] for words, all_ in ENTRIES.items()}
    cases = [(words, (text, 4)) for words, all_ in (entries | TEXTS).items() for text in all_]
    for fragment, case in [*cases, *((words, (text, data)) for text, data, words in PLACES)]:
        words = ".*".join(map(re.escape, fragment.split(": ", 1)))
        refusals(lambda case: parse(*case), AdapterFormatError, {words: [case]})
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
    assert (Limits().max_header_bytes, Limits().max_tensors) == (10 << 20, 65_536)
    for limits, header in (
        (Limits(max_tensors=100_000), 16_000_000),
        (Limits(max_tensors=100), 10 << 20),
        (Limits(max_tensors=100_000, max_header_bytes="1MiB"), 1 << 20),
        (replace(Limits(), max_tensors=100_000), 16_000_000),
    ):
        assert limits.max_header_bytes == header


def test_a_linear_for_each_expert_is_within_the_limits() -> None:
    """As transformers 4 saved Qwen3-30B-A3B."""
    module = "base_model.model.model.layers.{}.mlp.experts.{}.{}_proj.lora_{}.weight"
    parts = [(kind, factor) for kind in ("gate", "up", "down") for factor in "AB"]
    names = [module.format(n, e, *part) for n in range(48) for e in range(128) for part in parts]
    text = ",".join([*(f'"{name}":{EMPTY}' for name in names), f'"x":{GOOD}'])
    assert len(parse(f"{{{text}}}").tensors) == 36_865


SIZES = {
    "0 bytes and cannot be": [(b"", 0)],
    "7 bytes and cannot be": [(b"\2\0\0\0\0\0\0", 7)],
    "10 bytes and ends inside its header of 3": [(b"\3\0\0\0\0\0\0\0", 10)],
    "a header of 10,485,761 bytes is over": [((10 * 2**20 + 1).to_bytes(8, "little"), 2**30)],
    "is a Git LFS pointer, not the weights; run `git lfs pull`": [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", 132),
        (b"version https", 132),
    ],
    "this is not a safetensors file, as its first bytes show": [
        (b"version 1.0 of my weights", 25),
        (b"\xff" * 8, 2**63),
    ],
    "or this is not a safetensors file; raise": [(b"PK\3\4\0\0\0\0", 2**40)],
    "only 9 of its 10 bytes could be read": [(b"\2\0\0\0\0\0\0\0{", 10)],
}


def test_sizes_that_cannot_be() -> None:
    refusals(lambda case: parse_header(*case), AdapterFormatError, SIZES)


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
