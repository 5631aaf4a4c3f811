"""Merges: which there are, that they behave as any adapter does, and how they fail."""

import asyncio
import json
from collections.abc import Sequence
from math import inf, nan
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch

import sharded
import tiny
from common import open_files, until
from given import acquired, give, used
from lorax_async import AdapterLoader, Limits, LoaderConfig, Shard, errors, types
from lorax_async.runtime.fetches import FetchTasks
from lorax_async.testing import FakeReader, Step
from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, PartId, as_ref
from merges import BOTH, DROPPED, HALVES, assert_halves, assert_same, at, part_bytes, weights_of
from scheduling.serving import warm
from sweeping import cancel_at, count_steps, local_bench, released
from tiny_loaders import fails, loader
from tiny_sources import WEIGHTS, over, state, stocked, where

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")


def key(name: str, *numbers: int) -> AdapterKey:
    files = tuple(types.FileIdentity(0, n, 10, n, n) for n in numbers)
    return AdapterKey(f"/adapters/{name}", files)


TWO: list[PartId] = ["one", Path("two")]
MERGED = MergedKey.of(Merge("linear", TWO, [1, 1]), [key("one", 1, 2), key("two", 3, 4)])


HUGE = 10**5000
"""More digits than Python spells out."""
NO_LISTS: list[Any] = [Path("one"), [], {"one"}]
NUMBERS = "one number for each of 2 refs"
DENSITY = "needs a density above 0 and up to 1, not"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("sum", TWO, [1, 1]), "is one of linear, ties, dare_linear, dare_ties, not 'sum'"),
        ((["linear"], TWO, [1, 1]), "strategy is one of"),
        (("linear", "one", [1]), "refs is a list of one adapter or more, not 'one'"),
        *((("linear", refs, [1]), "refs is a list") for refs in NO_LISTS),
        (("linear", ["a"] * 65, [1] * 65), "64 parts at most, not 65"),
        (("linear", ["one", 2], [1, 1]), r"refs\[1\]: an adapter id is a str or .*, not int"),
        (("linear", ["one", Merge("linear", TWO, [1, 1])], [1, 1]), r"refs\[1\] is a merge itself"),
        (("linear", [MERGED], [1]), r"refs\[0\] is a merge itself"),
        (("linear", [None], [1]), r"refs\[0\]: an adapter id"),
        *((("linear", TWO, weights), NUMBERS) for weights in ([1], [1, 1, 1], 1, None)),
        (("linear", TWO, [-inf, 1]), r"weights\[0\] is a finite number"),
        (("linear", TWO, [1, nan]), r"weights\[1\] is a finite number that float32 holds, not nan"),
        *(
            (("linear", TWO, [1, bad]), r"weights\[1\] is a finite number")
            for bad in (1e39, 10**400, HUGE, True, "1")
        ),
        (("linear", TWO, [1, 1], 0.5), "'linear' keeps every weight; leave the density out"),
        (("linear", TWO, [1, 1], None, "frequency"), "'linear' elects no sign"),
        (("dare_linear", TWO, [1, 1], 0.5, "frequency"), "'dare_linear' elects no sign"),
        (("ties", TWO, [1, 1], 0.5, "most"), "is one of total, frequency, not 'most'"),
        (("ties", TWO, [1, 1]), f"'ties' {DENSITY} None"),
        *(
            ((kind, TWO, [1, 1], bad), f"'{kind}' {DENSITY}")
            for kind in ("ties", "dare_linear", "dare_ties")
            for bad in (0, -0.1, 1.01, HUGE, nan, True, "0.5")
        ),
        (("ties", ["one"], [1], 0.5), "'ties' merges two adapters or more; one is for 'linear'"),
        (("linear", TWO, [1, 1], None, "total", 1), "'linear' draws nothing at random"),
        (("ties", TWO, [1, 1], 0.5, "total", 1), "'ties' draws nothing at random"),
        *(
            (("dare_ties", TWO, [1, 1], 0.5, "total", bad), r"a seed is a whole number from 0 to")
            for bad in (-1, 1 << 63, HUGE, 1.0, True)
        ),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value)[:40],
)
def test_a_recipe_that_makes_no_sense_is_refused(given: tuple[Any, ...], problem: str) -> None:
    kind = errors.InvalidAdapterIdError if "0\\]: an" in problem else errors.UsageError
    with pytest.raises(kind, match=problem):
        Merge(*given)


def test_a_merge_is_a_value_and_an_id() -> None:
    merge = Merge("dare_ties", TWO, [1, -2], density=1, majority_sign="frequency", seed=3)
    assert merge.parts == (AdapterRef("one"), AdapterRef(Path("two")))
    assert merge.weights == (1.0, -2.0)
    assert merge.density == 1.0
    given = "density=1.0, majority_sign=frequency, seed=3"
    assert merge.text == f"dare_ties(1.0 * one, -2.0 * two, {given})"
    again = Merge("dare_ties", tuple(TWO), (1.0, -2.0), 1.0, "frequency", 3)
    assert merge == again
    assert hash(merge) == hash(again)
    assert as_ref(merge) is merge
    assert types.text_of(merge) == merge.text
    with pytest.raises(errors.UsageError, match="a Merge has source"):
        as_ref(merge, token="mine")
    secret = Merge("linear", [AdapterRef("one", token="secret")], [1])
    assert "secret" not in repr(secret) + secret.text
    assert (
        len(Merge("linear", ["a"] * types.MAX_PARTS, [0.5] * types.MAX_PARTS).parts)
        == types.MAX_PARTS
    )


def test_keys_of_merges_are_equal_where_the_bytes_would_be() -> None:
    """Whatever the parts were called, and not by their texts alone."""
    one, two = parts = [key("one", 1, 2), key("two", 3, 4)]
    merge = Merge("linear", ["one", "two"], [1, 0.5])
    first = MergedKey.of(merge, parts)
    by_path = Merge("linear", [Path("somewhere/one"), AdapterRef("two", token="t")], [1, 0.5])
    assert MergedKey.of(by_path, parts) == first
    assert hash(MergedKey.of(by_path, parts)) == hash(first)
    assert first != AdapterKey(first.location, first.files)
    saved_again = MergedKey.of(merge, [one, key("two", 3, 5)])
    assert (saved_again.location, saved_again != first) == (first.location, True)
    recipes: list[tuple[Any, ...]] = [
        ("linear", [1, 0.25]),
        ("ties", [1, 0.5], 0.5),
        ("ties", [1, 0.5], 0.25),
        ("ties", [1, 0.5], 0.5, "frequency"),
        ("dare_ties", [1, 0.5], 0.5),
        ("dare_ties", [1, 0.5], 0.5, "total", 1),
    ]
    others = {MergedKey.of(Merge(kind, ["one", "two"], *rest), parts) for kind, *rest in recipes}
    assert len(others | {first, MergedKey.of(merge, [two, one])}) == len(recipes) + 2
    assert str(MERGED) == "linear(1.0 * /adapters/one, 1.0 * /adapters/two)"
    assert MERGED.files == key("one", 1, 2, 3, 4).files


@pytest.mark.parametrize(("merge", "device"), [(HALVES, "simulated"), (DROPPED, "cpu")])
async def test_a_merge_is_computed_once_for_all(
    tmp_path: Path, merge: Merge, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory, or computed anew where tensors took its room."""

    async def check_late(self: FetchTasks, key: AdapterKey) -> None:
        reader = self.reader(key)
        await until(lambda: where(there, merge).state == "resident")
        assert reader.nbytes  # closed by now: all copies have ended

    source = stocked(tmp_path, "a", "b", "c")
    settings = {"max_slots": 1, "device": device, "memory_bytes": 2 * part_bytes()}
    async with over(source, cache_dir=tmp_path / "cache", **settings) as there:
        handles = await asyncio.gather(*(there.load(merge) for _ in range(20)))
        assert len({handle.slot for handle in handles}) == 1
        counts, before = source.counts, weights_of(handles[0])
        assert counts.bytes_read == part_bytes()
        assert (counts.resolves, counts.opens, there.statistics().fetches) == (2, 2, 1)
        for handle in handles:
            handle.release()
        assert source.counts.open_readers == 0
        (await there.load("c")).release()
        assert (where(there, merge).tier, where(there, merge).state) == ("host", "held")
        async with await there.load(merge) as handle, there.stream(merge) as streamed:
            assert_same(weights_of(handle), before)
            assert streamed.slot == handle.slot
        assert (there.statistics().fetches, source.counts.opens) == (2, 3)
        for number in range(3):
            (await give(there, number, str(number))).release()
        for number in range(2):
            await there.unload(str(number))
        monkeypatch.setattr(FetchTasks, "require_readable", check_late)
        async with there.stream(merge) as handle:
            assert_same(weights_of(handle), before)
        assert source.counts.bytes_read > 2 * part_bytes(), "it was computed anew"
        assert source.counts.open_readers == 0


async def test_equal_recipes_are_one_adapter(tmp_path: Path) -> None:
    """Whatever their parts are called."""
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name, seed)
    async with loader(local_roots=[tmp_path]) as there:
        async with await there.load("./a") as first, await there.load("./b") as second:
            by_key = Merge("linear", [first.key, second.key], [0.5, -2])
        async with await there.load(at(tmp_path)) as found:
            assert found.id == f"linear(0.5 * {tmp_path}/a, -2.0 * {tmp_path}/b)"
            for same in (Merge("linear", ["./a", "./b"], [0.5, -2]), by_key, found.key):
                async with await there.load(same) as handle:
                    assert (handle.slot, handle.key) == (found.slot, found.key)
            key = found.key
        await there.unload(at(tmp_path))
        async with await there.load(key) as handle:
            assert_halves(handle, tmp_path)


async def test_a_merge_is_prefetched_pinned_tried_and_unloaded(tmp_path: Path) -> None:
    async with over(stocked(tmp_path, "a", "b", "c"), max_slots=2) as there:
        assert there.try_acquire(HALVES) is None
        await there.prefetch(HALVES, tier="host")
        found = where(there, HALVES)
        assert (found.tier, found.host_bytes) == ("host", used(there))
        assert used(there) > part_bytes()
        await there.pin(HALVES)
        await warm(there, *"abc")
        async with acquired(there, HALVES) as handle:
            assert_halves(handle, tmp_path)
        assert there.placement().story(HALVES)[-1].slot == handle.slot
        assert there.unpin(HALVES)
        assert not there.unpin(HALVES)
        await there.unload(HALVES)
        assert (state(there, HALVES), used(there)) == ("nowhere", 0)
        assert there.try_acquire(HALVES) is None


@pytest.mark.parametrize("file", ["adapter_config.json", WEIGHTS])
async def test_a_part_that_changed_before_recomputing_is_named(tmp_path: Path, file: str) -> None:
    for seed, name in enumerate("abc"):
        tiny.write(tmp_path / name, seed)
    async with loader(max_slots=1) as there:
        async with await there.load(at(tmp_path)) as handle:
            key = handle.key
        await there.unload(key)
        changed = tmp_path / "b" / file
        changed.write_bytes(changed.read_bytes())
        await fails(there.load(key), errors.IntegrityError, r"part 2 \('b'\): .* was changed")
        async with await there.load(at(tmp_path)) as handle:
            assert handle.key != key
            assert_halves(handle, tmp_path)


TRIMMED = Merge("ties", ["a", "b"], [0.5, -2], density=0.5)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("merge", [*BOTH, pytest.param(TRIMMED, id="ties")])
async def test_a_rank_holds_its_share_of_a_merge(tmp_path: Path, merge: Merge, world: int) -> None:
    for seed, name in enumerate("ab"):
        sharded.write(tmp_path / name, seed=seed)

    async def load(shard: Shard | None) -> dict[str, torch.Tensor]:
        there = AdapterLoader(sharded.layout(), LoaderConfig(shard=shard))
        async with there, await there.load(at(tmp_path, merge)) as handle:
            return weights_of(handle)

    whole = await load(None)
    for rank in range(world):
        shard, expected = Shard(rank, world), dict[str, torch.Tensor]()
        for name, tensor in whole.items():
            module, _, factor = name.partition(" ")
            columns, rows = sharded.columns_of(module, shard), sharded.rows_of(module, shard)
            expected[name] = tensor[:, columns] if factor == "a" else tensor[rows]
        assert_same(await load(shard), expected)


async def test_a_part_that_is_missing_or_not_allowed_is_named(tmp_path: Path) -> None:
    async with over(stocked(tmp_path, "a")) as there:
        error = await fails(there.load(HALVES), errors.AdapterNotFoundError, r"part 2 \('b'\): ")
        assert (error.id, error.stage) == (HALVES.text, "resolve")
        assert not there.placement().adapters
    (tmp_path / "root").mkdir()
    async with loader(local_roots=[tmp_path / "root"]) as there:
        merge = Merge("linear", [tmp_path / "a", f"{tmp_path}/b"], [1, 1])
        await fails(there.load(merge), errors.AccessDeniedError, "part 2 .*local_roots")


async def test_a_part_that_is_refused_is_named(tmp_path: Path) -> None:
    """A part with magnitudes, which alone is as good as any."""
    source, tensors = stocked(tmp_path, "a", "b"), tiny.tensors(1)
    for module in {name.partition(".lora_")[0] for name in tensors}:
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(2 * tiny.HIDDEN)
    config = json.dumps(tiny.config(use_dora=True)).encode()
    source.put("b", config, safetensors.torch.save(tensors))
    async with over(source) as there:
        words = r"part 2 \('.*b'\): tensor '.*lora_magnitude_vector' is not plain LoRA"
        error = await fails(there.load(DROPPED), errors.UnsupportedAdapterError, words)
        assert (error.id, error.stage) == (DROPPED.text, "verify")
        assert source.counts.open_readers == 0
        await warm(there, *"ab")


async def test_a_part_of_another_rank_is_refused_where_ranks_must_be_equal(tmp_path: Path) -> None:
    source, weights = stocked(tmp_path, "a"), safetensors.torch.save(tiny.tensors(1, 3))
    source.put("b", json.dumps(tiny.config(3)).encode(), weights)
    async with over(source) as there:
        words = "layers.0.self_attn.q_proj.*equal ranks.*4 and 3"
        error = await fails(there.load(DROPPED), errors.IncompatibleAdapterError, words)
        assert (error.id, error.stage) == (DROPPED.text, "verify")
        await warm(there, "a", "b")


async def test_the_limits_hold_for_the_whole_merge(tmp_path: Path) -> None:
    """Though each part alone is within them."""
    source = stocked(tmp_path, "a", "b")
    nbytes = max(len(tiny.files(tmp_path / name)[1]) for name in "ab")
    for limits, problem in (
        (Limits(max_rank=7), "4 and 4 make 8, above the limit of 7"),
        (Limits(max_adapter_bytes=nbytes), "over the limit of"),
        (Limits(max_rank=8), None),
    ):
        async with over(source, limits=limits) as there:
            (await there.load("a")).release()
            if problem is None:
                (await there.load(HALVES)).release()
            else:
                await fails(there.load(HALVES), errors.UnsupportedAdapterError, problem)


@pytest.mark.parametrize("step", ["resolve", "open", "bring", "read"])
@pytest.mark.parametrize("merge", BOTH)
async def test_a_part_that_fails_is_named(tmp_path: Path, merge: Merge, step: Step) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        end = len(tiny.files(tmp_path / "b")[1]) - 1
        at = end if step == "read" else 0
        source.fail(step, errors.FetchError("ordered"), id="b", at=at)
        await fails(there.load(merge), errors.FetchError, r"part 2 \('(memory:)?b'\): ordered")
        await until(lambda: source.counts.open_readers == 0)
        async with await there.load(merge) as handle:
            assert handle.resident


@pytest.mark.parametrize("merge", BOTH)
async def test_a_merge_cancelled_at_every_await(tmp_path: Path, merge: Merge) -> None:
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
            assert (await cancel_at(bench.load(), step)) or step > 2
            await bench.assert_clean()
            await until(lambda: open_files() <= files)  # a thread may be looking at a folder
            (await bench.load()).release()


async def test_a_loader_that_closes_while_merges_wait_for_parts_and_room(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, memory_bytes=part_bytes() + 2000) as there:
        source.hold("b")
        tasks = [asyncio.create_task(there.load(merge)) for merge in (HALVES, DROPPED)]
        await until(lambda: (source.counts.brings, source.counts.opens) == (2, 4))
        await there.close()
        for task in tasks:
            await fails(task, errors.LoaderClosedError)
        assert used(there) == 0
    assert source.counts.open_readers == 0


async def test_computing_a_merge_holds_up_no_load(tmp_path: Path, monkeypatch: Patch) -> None:
    source, read = stocked(tmp_path, "a", "b", "c"), FakeReader.read_into
    began, go_on = Event(), Event()

    def slowly(self: FakeReader, buffers: Sequence[memoryview], offset: int, *rows: int) -> None:
        if self.version.id != "c":
            began.set()
            assert go_on.wait(20)
        read(self, buffers, offset, *rows)

    monkeypatch.setattr(FakeReader, "read_into", slowly)
    async with over(source, io_threads=1) as there:
        merging = asyncio.create_task(there.load(HALVES))
        await until(began.is_set)
        async with await there.load("c") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "c")
        closing = asyncio.create_task(there.close())
        await fails(merging, errors.LoaderClosedError)
        assert used(there) > 0, "the thread has its memory"
        go_on.set()
        await closing
        assert used(there) == 0
    assert source.counts.open_readers == 0


async def test_merges_wait_for_the_room_of_others(tmp_path: Path) -> None:
    """And one that has no room at all says what to raise."""
    async with over(stocked(tmp_path, "a", "b"), memory_bytes=part_bytes() + 2000) as there:
        merges = [Merge("linear", ["a", "b"], [n, 1]) for n in range(6)]
        for handle in await asyncio.gather(*(there.load(merge) for merge in merges[:4])):
            assert handle.resident
            handle.release()
        (await there.load(merges[4])).release()
    async with over(stocked(tmp_path, "a", "b"), memory_bytes=part_bytes()) as there:
        error = await fails(there.load(HALVES), errors.CapacityError, "memory_bytes")
        assert (error.id, error.retryable) == (HALVES.text, False)


def test_a_merge_is_as_stale_as_its_parts() -> None:
    fresh, stale = types.RemoteKey("a", (), "1"), types.RemoteKey("b", (), "1", stale=True)
    merge = Merge("linear", ["a", "b"], [1, 1])
    assert not types.is_stale(MergedKey.of(merge, [fresh, fresh]))
    assert types.is_stale(MergedKey.of(merge, [fresh, stale]))
    assert not types.is_stale(AdapterKey("here", ()))
