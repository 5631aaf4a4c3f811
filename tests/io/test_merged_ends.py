"""A merge that is opened once more, for who reads it in a thread, while its loop ends."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NoReturn

import pytest
import safetensors.torch
from source_inputs import read

import tiny
from common import until
from lorax_async import Merge
from lorax_async.adapter import AdapterKey, MergedKey
from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, FetchError, IntegrityError, LoraxError
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.io.sources.merged import MergedSource
from lorax_async.testing import FakeSource


async def test_who_reads_in_a_thread_hears_that_the_loop_has_ended() -> None:
    """Whoever ends a loop cancels its tasks."""
    others = asyncio.all_tasks()
    inner = FakeSource()
    config = json.dumps(tiny.config()).encode()
    parts = [inner.put(id, config, safetensors.torch.save(tiny.tensors(0))) for id in "ab"]
    key = MergedKey.of(Merge("linear", ["a", "b"], [1, -0.5]), parts)
    inner.hold("b")
    with ThreadPoolExecutor(2) as threads:
        source = MergedSource(inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads)
        reader = source.reopen(key)
        reading = threads.submit(read, reader, 0, 8)
        await until(lambda: inner.counts.brings == 2)
        for task in asyncio.all_tasks() - others:
            task.cancel()
        await until(reading.done)
        with pytest.raises(FetchError, match="the loader was closed"):
            reading.result()
        reader.close()
    assert inner.counts.open_readers == 0


class _BrokenSource(FakeSource):
    """Its files cannot be refused: the source has another version by now."""

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        file = await super().open(key, demand)

        async def refuse(error: LoraxError, *, weights: bool) -> NoReturn:
            file.reader.close()
            raise IntegrityError("it is another version by now; load it again")

        return replace(file, refuse=refuse)


async def test_a_refusal_that_fails_closes_the_other_parts() -> None:
    inner = _BrokenSource()
    config = json.dumps(tiny.config()).encode()
    parts = [inner.put(id, config, safetensors.torch.save(tiny.tensors(0))) for id in "ab"]
    key = MergedKey.of(Merge("linear", ["a", "b"], [1, -0.5]), parts)
    with ThreadPoolExecutor(2) as threads:
        source = MergedSource(inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads)
        file = await source.open(key, Demand())
        with pytest.raises(IntegrityError, match="another version"):
            await file.refused(AdapterFormatError("a merge that does not fit"))
    assert inner.counts.open_readers == 0
