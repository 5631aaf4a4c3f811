"""The header parser against safetensors' own reader, and against the contract by hand."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorax_async.core import header_entries
from lorax_async.core.header import (
    DTYPE_BITS,
    Header,
    HeaderLimits,
    TensorSpan,
    header_size,
    parse_header,
)
from lorax_async.errors import AdapterFormatError

INT64_MAX = 2**63 - 1


def framed(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> str:
    members = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps(members, separators=(",", ":"))


def parsed(text: bytes | str, data: int = 4, limits: HeaderLimits = HeaderLimits()) -> Header:
    prefix = framed(text)
    return parse_header(prefix, len(prefix) + data, limits)


def outcome(text: bytes, file_size: int) -> Header | str:
    try:
        return parse_header(framed(text), file_size)
    except AdapterFormatError as error:
        return error.problem


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
    metadata = draw(st.none() | st.dictionaries(names, st.text('aé"\\', max_size=5)))
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


def test_the_dtypes_are_those_of_safetensors() -> None:
    with pytest.raises(safetensors.SafetensorError) as refusal:
        deserialize(framed(f'{{"a":{entry((), (0, 0), "no such")}}}'))
    variants = str(refusal.value).split("expected one of")[1]
    assert set(re.findall(r"`(\w+)`", variants)) == set(DTYPE_BITS)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype: str) -> None:
    text = f'{{"a":{entry((8,), (0, DTYPE_BITS[dtype]), dtype)}}}'
    agrees_with_safetensors(framed(text) + bytes(DTYPE_BITS[dtype]))


@settings(deadline=None, max_examples=300)
@given(legal_files() | legal_files(canonical=True), st.data())
def test_a_damaged_file_is_refused_or_reads_as_safetensors_reads_it(
    file: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    if data.draw(st.booleans()):
        # Keep the size right, so that the damage reaches the JSON and the offsets.
        text_size = int.from_bytes(file[:8], "little") + len(damaged) - len(file)
        damaged[:8] = max(text_size, 0).to_bytes(8, "little")
    try:
        parse_header(bytes(damaged), len(damaged))
    except AdapterFormatError:
        return
    agrees_with_safetensors(bytes(damaged))


@settings(deadline=None, max_examples=300)
@given(legal_files(canonical=True), st.data())
def test_the_canonical_pattern_changes_nothing(file: bytes, data: st.DataObject) -> None:
    size = int.from_bytes(file[:8], "little")
    text = bytearray(file[8 : 8 + size])
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        junk = st.sampled_from([b"", b"0", b"9", b"-", b",", b"]", b'"', b" ", b"\\u0041", b"F4"])
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(junk)
    file_size = len(file) - size + len(text)
    with_pattern = outcome(bytes(text), file_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(header_entries, "_CANONICAL", re.compile("(?!)"))
        assert outcome(bytes(text), file_size) == with_pattern


def test_an_empty_file_of_no_tensors() -> None:
    assert parsed("{}", data=0) == Header((), {}, data_start=10)
    assert parsed('{"__metadata__":{"format":"pt"}} \n', data=0).metadata == {"format": "pt"}


def test_spans_are_absolute_in_file_order_and_empty_ones_by_name() -> None:
    text = (
        f'{{"late":{entry((2,), (4, 12))},"z":{entry((0, 5), (4, 4))},"first":{entry()}'
        f',"a":{entry((0,), (4, 4))},"end":{entry((0,), (12, 12))}}}'
    )
    header = parsed(text, data=12)
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
    assert [span.name for span in parsed(text).tensors] == [name]
