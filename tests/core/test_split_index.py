"""The index of weights in several files: read as other tools write it, refused where it is odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards

from lorax_async.config import Limits
from lorax_async.core.split_index import MAX_FILES, parse_index, split_name
from lorax_async.errors import AdapterFormatError
from split_files import INDEX, name_of

LIMITS = Limits()


def index(weight_map: object, **others: object) -> bytes:
    return json.dumps({"weight_map": weight_map, **others}).encode()


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        parse_index(data, limits)
    assert INDEX in caught.value.problem
    return caught.value.problem


def test_what_huggingface_hub_writes_is_read(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.ü": torch.ones(4, n + 1) for n in range(9)}
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(tensors, tmp_path, filename_pattern=pattern, max_shard_size=200)
    told = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=200)
    found = parse_index((tmp_path / INDEX).read_bytes(), LIMITS)
    names = found.file_names
    assert {name: names[n - 1] for name, n in found.numbers.items()} == told.tensor_to_filename
    assert set(names) == set(told.filename_to_tensors)
    assert dict(zip(names, found.tensors_in, strict=True)) == {
        name: len(tensors) for name, tensors in told.filename_to_tensors.items()
    }
    assert found.count > 3


def test_one_file_may_have_an_index_too() -> None:
    found = parse_index(index({"a": name_of(1, 1)}), LIMITS)
    assert (found.count, found.tensors_in, dict(found.numbers)) == (1, (1,), {"a": 1})


def test_names_of_files() -> None:
    assert split_name(3, 12) == "adapter_model-00003-of-00012.safetensors"


@pytest.mark.parametrize(
    "file",
    [
        "../x",
        "../adapter_model-00001-of-00001.safetensors",
        "/adapter_model-00001-of-00001.safetensors",
        "a/adapter_model-00001-of-00001.safetensors",
        "adapter_model-00001-of-00001.safetensors/",
        "adapter_model-00001-of-00001.safetensors\n",
        "adapter_model-00001-of-00001.safetensors\0",
        "adapter_model-00000-of-00001.safetensors",
        "adapter_model-00002-of-00001.safetensors",
        "adapter_model-1-of-1.safetensors",
        "adapter_model-000001-of-000001.safetensors",
        "adapter_model-٠٠٠٠١-of-٠٠٠٠١.safetensors",
        "adapter_model-+0001-of-00001.safetensors",
        "adapter_model-00001-of-00001.bin",
        "Adapter_model-00001-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
        "adapter_model.safetensors",
        "",
    ],
)
def test_other_names_of_files_are_refused(file: str) -> None:
    problem = refusal(index({"the.tensor": file}))
    assert "'the.tensor'" in problem
    assert "of-00003" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting|expected"),
        (b"[]", "expected an object"),
        (b"{}", "names no tensors"),
        (index({}), "names no tensors"),
        (b'{"metadata": {}}', "names no tensors"),
        (index([]), "expected an object"),
        (index({"a": 1}), "'a' has no name of a file"),
        (index({"a": None}), "'a' has no name of a file"),
        (index({"a": [name_of(1, 1)]}), "'a' has no name of a file"),
        (index({"a": name_of(1, 1)}, weights={}), "member 'weights' is unknown"),
        (index({"a": name_of(1, 1)}) + b"{}", "more than one value"),
        (b"\xef\xbb\xbf" + index({"a": name_of(1, 1)}), "byte order mark"),
        (index({"a": name_of(1, 1)})[:-1], "expected"),
        (index({"a": name_of(1, 2), "b": name_of(2, 3)}), "'b' is in one of 3 files"),
        (index({"a": name_of(1, 3), "b": name_of(3, 3)}), "no tensor is in .*-00002-of-00003"),
        (index({"a": name_of(2, 2)}), "no tensor is in .*-00001-of-00002"),
        (index({"a": name_of(1, MAX_FILES + 1)}), "one of 257 files, over the limit of 256"),
        (index({"a": name_of(1, 99_999)}), "one of 99,999 files"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' stands there twice"),
        (b'{"weight_map": {}, "weight_m\\u0061p": {}}', "'weight_map' stands there twice"),
        (index({"a": name_of(1, 1)}, metadata="x" * 70_000), "metadata .of 65,536 characters"),
        (index({"a": name_of(1, 1)}, metadata=[[]] * 3 + [[[[[]]]]] * 40), None),
        (index({"a": name_of(1, 1)}, metadata=json.loads("[" * 16 + "]" * 16)), "metadata.*deeper"),
    ],
)
def test_what_is_odd_is_refused(data: bytes, words: str | None) -> None:
    if words is None:
        assert parse_index(data, LIMITS).count == 1
    else:
        with pytest.raises(AdapterFormatError, match=words):
            parse_index(data, LIMITS)


@pytest.mark.parametrize("again", ["a", "\\u0061"])
def test_a_tensor_twice_is_refused(again: str) -> None:
    file = name_of(1, 1)
    problem = refusal(f'{{"weight_map": {{"a": "{file}", "{again}": "{file}"}}}}'.encode())
    assert "'a' stands there twice" in problem


def test_limits_are_the_last_that_pass() -> None:
    data = index({f"t{n}": name_of(1, 1) for n in range(5)})
    assert parse_index(data, Limits(max_header_bytes=len(data), max_tensors=5)).tensors_in == (5,)
    assert "over the limit" in refusal(data, Limits(max_header_bytes=len(data) - 1))
    assert "'t4' is more than the limit of 4" in refusal(data, Limits(max_tensors=4))


def test_all_of_the_most_files_are_read() -> None:
    weight_map: Any = {f"t{n}": name_of(n, MAX_FILES) for n in range(1, MAX_FILES + 1)}
    assert parse_index(index(weight_map), LIMITS).count == MAX_FILES


def test_long_names_of_strangers_are_cut() -> None:
    problem = refusal(index({"n" * 100_000: "f" * 100_000}))
    assert len(problem) <= 1000
