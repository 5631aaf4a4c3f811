"""Rows that lie apart in a merged file: a tensor is computed once for all of them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import safetensors.torch
import torch
from rows_conformance import read_rows, rows_of
from source_inputs import read

import tiny
from lorax_async import Merge
from lorax_async.adapter import AdapterRef, MergedKey
from lorax_async.config import Limits
from lorax_async.core.merge_plan import MergedTensor
from lorax_async.core.runs import Span
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.ports import Demand
from lorax_async.io.sources import merged_reader
from lorax_async.io.sources.merged import MergedSource
from lorax_async.io.sources.merged_reader import MergedReader
from lorax_async.testing import FakeSource

MERGES = [
    pytest.param(Merge("linear", ["a", "b"], [1, -0.5]), id="linear"),
    pytest.param(Merge("dare_linear", ["a", "b"], [1, -0.5], density=0.3, seed=4), id="drawn"),
]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each tensor was computed, by where it starts."""
    counts, real = Counter[int](), merged_reader._merged

    def counted(
        key: MergedKey,
        opened: merged_reader.Opened,
        tensor: MergedTensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        counts[tensor.start] += 1
        return real(key, opened, tensor, generator)

    monkeypatch.setattr(merged_reader, "_merged", counted)
    return counts


@pytest.fixture
def source() -> Iterator[MergedSource]:
    inner = FakeSource()
    config = json.dumps(tiny.config()).encode()
    for seed, name in enumerate("ab"):
        inner.put(name, config, safetensors.torch.save(tiny.tensors(seed)))
    with ThreadPoolExecutor(2) as threads:
        yield MergedSource(inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads)
    assert inner.counts.open_readers == 0


def cut_in(reader: MergedReader) -> int:
    """Tensors that threads keep between their reads."""
    assert reader._shared.opened is not None
    return len(reader._shared.opened._cut)


async def opened(source: MergedSource, merge: Merge) -> tuple[MergedReader, bytes]:
    """A reader, and all that it reads."""
    keys = [await source.resolve(AdapterRef(name)) for name in "ab"]
    file = await source.open(MergedKey.of(merge, keys), Demand())
    reader = file.reader
    assert isinstance(reader, MergedReader)
    await source.bring(file, [[Span(0, reader.nbytes)]], lambda _: None, Demand())
    return reader, read(reader, 0, reader.nbytes)


def columns(tensor: MergedTensor, part: int, parts: int) -> Span:
    """A part of a tensor's columns."""
    rows = tensor.shape[0]
    pitch = (tensor.stop - tensor.start) // rows
    start = tensor.start + part * pitch // parts
    return Span(start, start + pitch // parts, rows, pitch)


def tensors_of(reader: MergedReader) -> tuple[MergedTensor, ...]:
    assert reader.opened is not None
    return reader.opened.plan.tensors


@pytest.mark.parametrize("merge", MERGES)
async def test_columns_of_every_tensor_are_the_files(
    source: MergedSource, merge: Merge, computed: Counter[int]
) -> None:
    reader, content = await opened(source, merge)
    computed.clear()
    for tensor in tensors_of(reader):
        for part in (1, 0):
            span = columns(tensor, part, 2)
            assert read_rows(reader, span) == rows_of(content, span)
    # The second half of the columns reaches the tensor's end, after which it is not kept.
    assert set(computed.values()) == {2}
    computed.clear()
    for tensor in tensors_of(reader):
        for part in (0, 1):
            span = columns(tensor, part, 2)
            assert read_rows(reader, span) == rows_of(content, span)
    assert set(computed.values()) == {1}
    reader.close()


async def test_a_thread_keeps_one_tensor(
    source: MergedSource, computed: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is given up for the second, before that is computed."""
    kept, counted = list[int](), merged_reader._merged
    reader, content = await opened(source, Merge("linear", ["a", "b"], [1, -0.5]))

    def watched(*given: Any) -> torch.Tensor:
        kept.append(cut_in(reader))
        return counted(*given)

    monkeypatch.setattr(merged_reader, "_merged", watched)
    first, second, *_ = tensors_of(reader)
    computed.clear()
    for tensor in (first, second, first):
        span = columns(tensor, 0, 2)
        assert read_rows(reader, span) == rows_of(content, span)
    assert computed == {first.start: 2, second.start: 1}
    assert (kept, cut_in(reader)) == ([0, 0, 0], 1)
    reader.close()


async def test_rows_of_several_tensors_and_of_the_header(source: MergedSource) -> None:
    reader, content = await opened(source, Merge("linear", ["a", "b"], [1, -0.5]))
    for start in (0, 5, len(content) - 3000):
        span = Span(start, start + 70, 10, 300)
        assert read_rows(reader, span) == rows_of(content, span)
    with pytest.raises(IntegrityError, match="ends before byte"):
        read_rows(reader, Span(len(content) - 30, len(content) - 20, 3, 11))
    reader.close()
    with pytest.raises(FetchError, match="closed"):
        read_rows(reader, Span(0, 2, 2, 4))


@pytest.mark.parametrize("merge", MERGES)
async def test_threads_that_take_turns_compute_their_tensors_once(
    source: MergedSource, merge: Merge, computed: Counter[int]
) -> None:
    """Each reads a tensor of its own, some rows at a time, as small windows do."""
    turns = Barrier(2)

    def rows_at_a_time(reader: MergedReader, content: bytes, tensor: MergedTensor) -> bool:
        whole = columns(tensor, 0, 2)
        size = whole.nbytes // whole.rows
        good = True
        for row in range(whole.rows):
            turns.wait(20)
            for span in whole.cut(row * size, (row + 1) * size):
                good &= read_rows(reader, span) == rows_of(content, span)
        return good

    reader, content = await opened(source, merge)
    computed.clear()
    mine = tensors_of(reader)[0:3:2]  # of two modules' A
    assert mine[0].shape == mine[1].shape
    assert await asyncio.gather(
        *(asyncio.to_thread(rows_at_a_time, reader, content, tensor) for tensor in mine)
    ) == [True, True]
    assert computed == {tensor.start: 1 for tensor in mine}
    reader.close()
