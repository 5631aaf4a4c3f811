"""Weights in several files: their index, the one file that they are, and what is refused."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.refusals import refusals
from lorax_async import AdapterFormatError, InternalError, Limits
from lorax_async.formats.safetensors import parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.split_weights import (
    MAX_FILES,
    FileHead,
    SplitPlan,
    parse_index,
    plan_split,
    split_name,
)
from split_files import INDEX, contents_of, index_of, name_of

LIMITS = Limits()


def index(weight_map: object, **others: object) -> bytes:
    return json.dumps({"weight_map": weight_map, **others}).encode()


def test_what_huggingface_hub_writes_is_read(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.ü": torch.ones(4, n + 1) for n in range(9)}
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(tensors, tmp_path, filename_pattern=pattern, max_shard_size=200)
    told = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=200)
    found = parse_index((tmp_path / INDEX).read_bytes(), LIMITS)
    names = found.file_names
    assert {name: names[n - 1] for name, n in found.numbers.items()} == told.tensor_to_filename
    counts = {name: len(tensors) for name, tensors in told.filename_to_tensors.items()}
    assert dict(zip(names, found.tensors_in, strict=True)) == counts
    assert found.count > 3


def test_one_file_may_have_an_index_too_and_256() -> None:
    found = parse_index(index({"a": name_of(1, 1)}), LIMITS)
    assert (found.count, found.tensors_in, dict(found.numbers)) == (1, (1,), {"a": 1})
    weight_map = {f"t{n}": name_of(n, MAX_FILES) for n in range(1, MAX_FILES + 1)}
    assert parse_index(index(weight_map), LIMITS).count == MAX_FILES == 256
    assert split_name(3, 12) == "adapter_model-00003-of-00012.safetensors"


NUMBERS = "00000-of-00001 00002-of-00001 1-of-1 000001-of-000001 +0001-of-00001 ٠٠٠٠١-of-٠٠٠٠١"
NO_FILES = [
    *(f"adapter_model-{numbers}.safetensors" for numbers in NUMBERS.split()),
    *(f"{folder}{name_of(1, 1)}" for folder in ("../", "/", "a/")),
    *(f"{name_of(1, 1)}{end}" for end in ("/", "\n", "\0")),
    *("", "../x", "adapter_model.safetensors", "model-00001-of-00001.safetensors", "f" * 100_000),
    *("Adapter_model-00001-of-00001.safetensors", "adapter_model-00001-of-00001.bin"),
]


def test_other_names_of_files_are_refused() -> None:
    for name in ("the.tensor", "n" * 100_000):
        cases = {f"{INDEX}.*{name[:10]}.*of-00003": [index({name: file}) for file in NO_FILES]}
        for text in refusals(lambda data: parse_index(data, LIMITS), AdapterFormatError, cases):
            assert "\n" not in text
            assert len(text) <= 1000


FILE = name_of(1, 1)
ODD: dict[str, list[bytes]] = {
    "names no tensors": [b"{}", index({}), index([]), b'{"metadata": {}}'],
    "'a' has no file name": [index({"a": value}) for value in (1, None, [FILE])],
    "member 'weights' is unknown": [index({"a": FILE}, weights={})],
    "'b' is in one of 3 files": [index({"a": name_of(1, 2), "b": name_of(2, 3)})],
    "no tensor is in .*-00002-of-00003": [index({"a": name_of(1, 3), "b": name_of(3, 3)})],
    "no tensor is in .*-00001-of-00002": [index({"a": name_of(2, 2)})],
    "one of 257 files, over the limit of 256": [index({"a": name_of(1, MAX_FILES + 1)})],
    "one of 99,999 files": [index({"a": name_of(1, 99_999)})],
    "'a' appears twice": [
        f'{{"weight_map": {{"a": "{FILE}", "{name}": "{FILE}"}}}}'.encode()
        for name in ("a", "\\u0061")
    ],
}


def test_what_is_odd_is_refused() -> None:
    refusals(lambda data: parse_index(data, LIMITS), AdapterFormatError, ODD)


def test_limits_of_the_index_are_the_last_that_pass() -> None:
    data = index({f"t{n}": FILE for n in range(5)})
    assert parse_index(data, Limits(max_header_bytes=len(data), max_tensors=5)).tensors_in == (5,)
    assert "than the limit" in refused([], data, Limits(max_header_bytes=len(data) - 1))
    assert "5 tensors, over the limit of 4" in refused([], data, Limits(max_tensors=4))


Parts = Sequence[Mapping[str, torch.Tensor]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def parts_of_files(draw: st.DrawFn) -> Parts:
    """Tensors of all kinds, some without bytes, in one to four files."""
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=12))
    assume("__metadata__" not in names)
    count = draw(st.integers(1, min(4, len(names))))
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for n, name in enumerate(names):
        number = n if n < count else draw(st.integers(0, count - 1))
        values = torch.randint(0, 100, draw(SHAPES))
        parts[number][name] = values.to(draw(st.sampled_from(DTYPES)))
    return parts


def plan_of(contents: Sequence[bytes], index: bytes, limits: Limits = LIMITS) -> SplitPlan:
    heads = (FileHead(content, len(content)) for content in contents)
    return plan_split(parse_index(index, limits), heads, limits)


def header_nbytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def whole(plan: SplitPlan, contents: Sequence[bytes]) -> bytes:
    """The one file, put together by what the files say of themselves."""
    return plan.prefix + b"".join(content[header_nbytes(content) :] for content in contents)


@settings(max_examples=100, deadline=None)
@given(parts_of_files())
def test_safetensors_reads_the_one_file(parts: Parts) -> None:
    contents = contents_of(parts)
    plan = plan_of(contents, index_of(parts))
    content = whole(plan, contents)
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    told = {name: (t.dtype, t.tolist()) for name, t in safetensors.torch.load(content).items()}
    assert told == {name: (t.dtype, t.tolist()) for name, t in expected.items()}
    assert {span.name for span in parse_header(plan.prefix, plan.nbytes).tensors} == set(expected)
    assert len(content) == plan.nbytes >= sum(map(len, contents))
    assert plan_of(contents, index_of(parts)) == plan


def test_every_file_has_its_part_of_the_groups() -> None:
    parts: Parts = [{"a": torch.ones(4)}, {"b": torch.ones(4)}, {"c": torch.ones(4)}]
    plan = plan_of(contents_of(parts), index_of(parts))
    a, b, c = (ByteSpan(place.start, place.stop) for place in plan.places[1:])
    files = plan.by_file([[], [a, b], [b._replace(stop=b.stop - 8)], [], [a, c]])
    assert [file.groups for file in files] == [(1, 4), (1, 2), (4,)]
    with pytest.raises(InternalError):  # bytes beyond the end
        list(plan.pieces(ByteSpan(plan.nbytes - 1, plan.nbytes + 1)))


THREE: Parts = [
    {"a": torch.ones(2, 2), "b": torch.ones(3)},
    {"c": torch.ones(5)},
    {"d": torch.ones(1), "e": torch.ones(0, 4)},
]


def refused(contents: Sequence[bytes], index: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        plan_of(contents, index, limits)
    return caught.value.problem


def hostile(content: bytes) -> Iterator[tuple[bytes, str]]:
    yield content[:-1], "the file ends 1 bytes before"
    yield content + b"x", "1 bytes after the last tensor"
    yield content[:20], "ends inside its header"
    yield content[:5], "cannot be a safetensors file"
    yield b"PK\3\4" + b"x" * 400, "no safetensors file"
    yield content.replace(b'"b"', b'"a"'), "appears twice"
    yield content.replace(b"[16,28]", b"[17,29]"), "a hole of 1 bytes"


@pytest.mark.parametrize("number", [1, 2])
def test_each_file_is_held_to_the_format(number: int) -> None:
    other = {"z": torch.ones(1)}
    parts: Parts = [THREE[0], other] if number == 1 else [other, THREE[0]]
    good = contents_of(parts)
    assert plan_of(good, index_of(parts)).nbytes
    for bad, words in hostile(good[number - 1]):
        contents = [bad if n == number else good[n - 1] for n in (1, 2)]
        problem = refused(contents, index_of(parts))
        assert problem.startswith(f"{name_of(number, 2)}: ")
        assert words in problem


def test_limits_hold_for_all_files_together() -> None:
    """And for the one header, written in ASCII, where a letter of three bytes takes six."""
    parts: Parts = [{"あ" * 150: torch.ones(1)}]
    contents, index = contents_of(parts), index_of(parts)
    plan = plan_of(contents, index)
    limit = len(plan.prefix) - 8
    assert plan_of(contents, index, Limits(max_header_bytes=limit)) == plan
    problem = refused(contents, index, Limits(max_header_bytes=limit - 1))
    assert "one header of all files" in problem
    files, index = contents_of(THREE), index_of(THREE)
    headers = sum(map(header_nbytes, files))
    limits = Limits(max_header_bytes=headers - 1)
    assert f"{headers:,} header bytes" in refused(files, index, limits)
    nbytes = sum(map(len, files))
    limits = Limits(max_adapter_bytes=nbytes - 1)
    assert f"{nbytes:,} bytes, over" in refused(files, index, limits)
    assert safetensors.torch.load(whole(plan, contents)).keys() == parts[0].keys()


def test_a_file_is_let_go_before_the_next_is_asked_for() -> None:
    contents = contents_of(THREE)
    alive = 0

    class Content(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def heads() -> Iterator[FileHead]:
        nonlocal alive
        for content in contents:
            assert alive <= 1
            alive += 1
            yield FileHead(Content(content), len(content))

    plan_split(parse_index(index_of(THREE), LIMITS), heads(), LIMITS)
    assert alive == 0
