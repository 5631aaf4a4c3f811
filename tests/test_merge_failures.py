"""Merges that fail or are given up: the error names the part, and nothing is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import pytest
import safetensors.torch
import torch

import tiny
from common import open_files, until
from lorax_async import (
    AccessDeniedError,
    AdapterNotFoundError,
    AdapterTimeoutError,
    FetchError,
    IncompatibleAdapterError,
    Limits,
    LoaderClosedError,
    LoraxError,
    Merge,
    UnsupportedAdapterError,
)
from lorax_async.testing import FakeReader, Step
from merges import BOTH, DROPPED, HALVES, assert_same, at, part_bytes, weights_of
from sweeping import cancel_at, count_steps, local_bench, released
from tiny_loaders import loader
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with pytest.raises(AdapterNotFoundError, match=r"part 2 \('b'\): ") as caught:
            await there.load(HALVES)
        assert caught.value.id == HALVES.text
        assert caught.value.stage == "resolve"
        assert not there.residency()


async def test_the_rules_of_local_roots_hold_for_parts(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name, seed)
    (tmp_path / "root").mkdir()
    async with loader(local_roots=[tmp_path / "root"]) as there:
        merge = Merge("linear", [tmp_path / "a", f"{tmp_path}/b"], [1, 1])
        with pytest.raises(AccessDeniedError, match="part 2 .*local_roots"):
            await there.load(merge)


REFUSED = [
    ({"use_dora": True}, {}, LoraxError, r"part 2 \('.*b'\): .*has no magnitude"),
    ({"bias": "all"}, {}, UnsupportedAdapterError, r"part 2 \('.*b'\): .*trained biases"),
    ({"lora_alpha": None}, {}, LoraxError, r"part 2 \('.*b'\): .*lora_alpha"),
    (
        {},
        {"rank": 3},
        IncompatibleAdapterError,
        "model.layers.0.self_attn.q_proj.*equal ranks.*4 and 3",
    ),
]


@pytest.mark.parametrize(("config", "more", "kind", "problem"), REFUSED)
async def test_a_part_that_is_refused(
    tmp_path: Path,
    config: dict[str, object],
    more: dict[str, int],
    kind: type[LoraxError],
    problem: str,
) -> None:
    source = stocked(tmp_path, "a", "b")
    source.put("b", *tiny.files(tiny.write(tmp_path / "b", 1, **{**more, **config})))  # type: ignore[arg-type]
    async with over(source) as there:
        with pytest.raises(kind, match=problem) as caught:
            await there.load(DROPPED)
        assert caught.value.id == DROPPED.text
        assert caught.value.stage == "verify"
        assert source.counts.open_readers == 0
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")


async def test_what_is_not_plain_lora_is_named(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    tensors = tiny.tensors(1)
    for name in list(tensors):
        module = name.partition(".lora_")[0]
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(2 * tiny.HIDDEN)
    config = json.dumps(tiny.config(use_dora=True)).encode()
    source.put("b", config, safetensors.torch.save(tensors))
    async with over(source) as there:
        problem = r"part 2 \('.*b'\): tensor '.*lora_magnitude_vector' is of more than plain LoRA"
        with pytest.raises(UnsupportedAdapterError, match=problem):
            await there.load(HALVES)
        (await there.load("b")).release()  # which alone is as good as any


async def test_more_ranks_than_are_accepted(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, limits=Limits(max_rank=7)) as there:
        with pytest.raises(UnsupportedAdapterError, match="4 and 4 make 8, above the limit of 7"):
            await there.load(HALVES)
    async with over(source, limits=Limits(max_rank=8)) as there:
        (await there.load(HALVES)).release()


async def test_a_merge_that_is_too_large(tmp_path: Path) -> None:
    """Though each part alone is not."""
    source = stocked(tmp_path, "a", "b")
    nbytes = max(len(tiny.files(tmp_path / name)[1]) for name in "ab")
    async with over(source, limits=Limits(max_adapter_bytes=nbytes)) as there:
        (await there.load("a")).release()
        with pytest.raises(UnsupportedAdapterError, match="over the limit of"):
            await there.load(HALVES)


@pytest.mark.parametrize("step", ["resolve", "open", "bring", "read"])
@pytest.mark.parametrize("merge", BOTH)
async def test_a_part_that_fails(tmp_path: Path, merge: Merge, step: Step) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        end = len(tiny.files(tmp_path / "b")[1]) - 1
        at = {"bring": 2, "read": end}.get(step, 0)
        source.fail(step, FetchError("ordered"), id="b", at=at)
        with pytest.raises(FetchError, match=r"part 2 \('(memory:)?b'\): ordered"):
            await there.load(merge)
        await until(lambda: source.counts.open_readers == 0)
        async with await there.load(merge) as handle:
            assert handle.resident


@pytest.mark.parametrize("merge", BOTH)
async def test_given_up_while_a_part_is_on_its_way(tmp_path: Path, merge: Merge) -> None:
    """By its deadline, by a cancellation, and by the loader's end; another load is not touched."""
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        source.hold("b")
        with pytest.raises(AdapterTimeoutError):
            await there.load(merge, timeout=0.05)
        await until(lambda: source.counts.open_readers == 0)
        task = asyncio.create_task(there.load(merge))
        await until(lambda: source.counts.brings >= 4)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await until(lambda: source.counts.open_readers == 0)
        (await there.load("a")).release()
        last = asyncio.create_task(there.load(merge))
        await until(lambda: source.counts.brings >= 7)
    with pytest.raises(LoraxError):
        await last
    assert source.counts.open_readers == 0


@pytest.mark.parametrize("merge", BOTH)
async def test_cancelled_at_every_await(tmp_path: Path, merge: Merge) -> None:
    async with local_bench(tmp_path, dtype="float32") as bench:
        files = open_files()
        bench.adapter = at(tmp_path, merge)
        for seed, name in enumerate("ab"):
            tiny.write(tmp_path / name, seed)
        steps = await count_steps(released(bench.load()))
        assert steps >= 2
        for step in range(1, steps + 1):
            for seed, name in enumerate("ab"):
                tiny.write(tmp_path / name, 10 * step + seed)
            cancelled = await cancel_at(bench.load(), step)
            assert cancelled or step > 2
            await bench.assert_clean()
            assert open_files() <= files
            (await bench.load()).release()


@pytest.mark.parametrize("merge", BOTH)
async def test_cancelled_while_it_is_computed(tmp_path: Path, merge: Merge) -> None:
    """What a thread has begun it ends; no other group is begun, and a reload is whole."""
    source = stocked(tmp_path, "a", "b")
    began, go_on = Event(), Event()
    read = FakeReader.read_into

    def slowly(self: FakeReader, buffers: Sequence[memoryview], offset: int) -> None:
        began.set()
        assert go_on.wait(20)
        read(self, buffers, offset)

    async with over(source) as there:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(FakeReader, "read_into", slowly)
            task = asyncio.create_task(there.load(merge))
            await until(began.is_set)
            task.cancel()
            await asyncio.wait([task])
            assert source.counts.open_readers == 2, "they are read"
            go_on.set()
            await until(lambda: source.counts.open_readers == 0)
        assert 0 < source.counts.bytes_read <= part_bytes() / tiny.LAYERS
        async with await there.load(merge) as handle:
            expected = weights_of(handle)
    async with over(source) as another, await another.load(merge) as handle:
        assert_same(weights_of(handle), expected)


async def test_closed_while_it_is_opened_again(tmp_path: Path) -> None:
    """A reload opens its parts by way of the loop, while an I/O thread waits."""
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=1) as there:
        (await there.load(HALVES)).release()
        (await there.load("c")).release()
        source.hold("b")
        task = asyncio.create_task(there.load(HALVES))
        await until(lambda: source.counts.brings >= 5)
        closing = asyncio.create_task(there.close())
        await asyncio.sleep(0.02)
        assert not closing.done(), "a copy in flight is waited for"
        source.allow("b")
        with pytest.raises(LoaderClosedError):
            await task
        await closing
    assert source.counts.open_readers == 0
