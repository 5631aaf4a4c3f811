"""Given tensors that find no room in memory: the oldest go on in the disk cache."""

import asyncio
import errno
import hashlib
import json
import os
import resource
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import pytest
import safetensors.torch
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import open_below

import tiny
from common import until
from given import FILE, FILLERS, assert_means, give, kept, put, roomy, used
from lorax_async import AdapterKey, AdapterLoader, AdapterRef, LoaderConfig, Merge, errors
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.sources.host_copies import HostCopies, HostCopy
from merges import assert_same, weights_of
from sweeping import cancel_at, count_steps, raising, released
from tiny_loaders import fails
from tiny_sources import WEIGHTS, over, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


async def given(there: AdapterLoader, seed: int, **settings: Any) -> AdapterKey:
    """Give the tensors of seed n the name "n"."""
    name, tensors = str(seed), tiny.tensors(seed)
    async with await there.load_tensors(name, tensors, tiny.config(), **settings) as handle:
        return handle.key


def entries(folder: Path) -> list[Path]:
    """The adapters in a disk cache, whole or on their way there; folders may vanish meanwhile."""
    return [Path(place) for place, _, files in os.walk(folder) if WEIGHTS in files]


def in_memory(there: AdapterLoader) -> set[AdapterKey]:
    return {key for key, found in there.placement().adapters.items() if found.host_bytes}


async def off_device(there: AdapterLoader) -> None:
    """Other adapters take the slots of whatever nobody holds."""
    for name in FILLERS:
        (await there.load(name)).release()


async def assert_all_there(there: AdapterLoader, *seeds: int) -> None:
    await off_device(there)
    for seed in seeds:
        await assert_means(there, str(seed), seed)


@asynccontextmanager
async def spilled(
    folder: Path, count: int = 1, **settings: Any
) -> AsyncIterator[tuple[AdapterLoader, list[AdapterKey]]]:
    """A loader with room for one, and the keys of `count + 1`, of which the last is in memory."""
    async with roomy(folder, 1, **settings) as there:
        keys = [await given(there, seed) for seed in range(count + 1)]
        assert in_memory(there) == {keys[-1]}
        assert len(entries(folder)) == count
        yield there, keys
    assert entries(folder) == []
    assert open_below(folder) == []


@pytest.mark.parametrize(("device", "stored"), [("cpu", "float32"), ("simulated", "bfloat16")])
async def test_the_least_recently_read_spill(tmp_path: Path, device: str, stored: str) -> None:
    async with roomy(tmp_path, 2, device=device, dtype=stored) as there:
        keys = [await given(there, seed) for seed in (0, 1)]
        assert entries(tmp_path) == []
        await off_device(there)
        (await there.load("0")).release()  # so that 1 was read longest ago
        keys.append(await given(there, 2))
        assert in_memory(there) == {keys[0], keys[2]}
        assert used(there) <= there.config.memory_bytes
        assert len(entries(tmp_path)) == 1
        await off_device(there)
        found = where(there, keys[1])
        assert (found.tier, found.state, found.host_bytes) == ("disk", "present", 0)
        await there.prefetch("1", tier="host")
        found = where(there, keys[1])
        assert (found.tier, found.state, found.host_bytes) == ("host", "read ahead", 0)
        await assert_all_there(there, 0, 1, 2)
        assert there.statistics().spills == 1


async def test_a_spilled_entry_is_a_private_adapter_with_a_digest(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, keys):
        (folder,) = entries(tmp_path)
        assert_same(safetensors.torch.load_file(folder / WEIGHTS), tiny.tensors(0))
        config = json.loads((folder / "adapter_config.json").read_bytes())
        assert config.items() >= tiny.config().items()
        assert stat.S_IMODE((folder / WEIGHTS).stat().st_mode) == 0o600
        assert {stat.S_IMODE(each.stat().st_mode) for each in folder.parents[:2]} == {0o700}
        await off_device(there)
        found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        right = AdapterRef("0", digest=found)
        for _ in ("on disk", "in memory"):
            async with await there.load(right) as handle:
                tiny.assert_holds(handle, tiny.tensors(0))
                assert (await handle.verified()).digest == found
            await fails(there.load(AdapterRef("0", digest=64 * "0")), errors.IntegrityError)
            await there.unload("0")
            await given(there, 0)
        assert keys[0] in in_memory(there)


async def test_equal_content_joins_what_is_on_disk(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, keys):
        async with await give(there, 0, "again") as again:
            assert again.key == keys[0]
            tiny.assert_holds(again, tiny.tensors(0))
        await until(lambda: used(there) == 0)  # the other one made room for the copy
        assert len(entries(tmp_path)) == 2
        await there.unload("again")
        await assert_all_there(there, 0)


@pytest.mark.parametrize("held", [False, True])
async def test_unloaded_and_replaced_tensors_leave_the_disk(tmp_path: Path, held: bool) -> None:
    """With the last handle."""
    async with spilled(tmp_path, 2) as (there, keys):
        await off_device(there)
        other = await there.load("0") if held else None
        await there.unload("1")
        await until(lambda: len(entries(tmp_path)) == 1)
        for name in ("1", keys[1]):
            await fails(there.load(name), errors.AdapterNotFoundError)
        assert keys[1] not in there.placement().adapters
        assert await given(there, 1) == keys[1]
        await assert_means(there, "1", 1)
        old = other or await there.load("0")
        await there.pin("0")
        (await put(there, 7, "0")).release()
        assert where(there, "0").pins == 1
        tiny.assert_holds(old, tiny.tensors(0))
        assert len(entries(tmp_path)) == 3
        old.release()
        await until(lambda: len(entries(tmp_path)) == 2)
        await assert_means(there, "0", 7)


async def test_a_training_loop_needs_memory_for_one_version(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1) as there:
        for seed in range(6):
            async with await put(there, seed, "policy") as handle:
                tiny.assert_holds(handle, tiny.tensors(seed))
        assert in_memory(there) == {handle.key}
        await until(lambda: entries(tmp_path) == [])
        assert there.statistics().spills == 5


async def test_tensors_are_parts_of_merges_in_memory_and_on_disk(tmp_path: Path) -> None:
    """In room for one adapter, a merge lets its own parts spill, and makes room for tensors."""
    merge = Merge("ties", ["0", "1"], [0.5, -2], density=0.5)
    source = stocked(tmp_path / "files", "0", "1")
    async with over(source) as there, await there.load(merge) as handle:
        expected = weights_of(handle)
    for room in (9, 1):
        async with roomy(tmp_path / "cache", room) as there:
            for seed in (0, 1):
                await given(there, seed)
            for seed in (5, 6):  # computed anew after 5 took its room
                async with await there.load(merge) as handle:
                    assert_same(weights_of(handle), expected)
                    key = handle.key
                await off_device(there)
                assert where(there, merge).tier == "host"
                await given(there, seed)
                assert (key in in_memory(there)) == (room == 9)
            assert there.statistics().spills == (3 if room == 1 else 0)
            await assert_all_there(there, 0, 1, 5, 6)


async def test_two_loaders_with_equal_tensors_have_an_entry_each(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1) as other, spilled(tmp_path) as (there, keys):
        assert await given(other, 0) == keys[0]
        await given(other, 1)
        assert len(entries(tmp_path)) == 2
        await there.unload("0")
        await until(lambda: len(entries(tmp_path)) == 1)
        await assert_all_there(other, 0, 1)
        await other.close()
    assert entries(tmp_path) == []


async def test_the_disk_is_not_touched_for_what_would_fit_nowhere(tmp_path: Path) -> None:
    for spill in (True, False):
        async with roomy(tmp_path / "cache", 1, spill=spill) as there:
            key = await given(there, 0)
            large = there.load_tensors("large", tiny.tensors(1, 64), tiny.config(64))
            error = await fails(large, errors.CapacityError, "memory_bytes")
            assert (error.id, error.retryable) == ("large", False)
            if not spill:
                error = await fails(given(there, 1), errors.CapacityError, "memory_bytes")
                assert (error.id, error.retryable) == ("1", True)
                await there.unload("0")
                assert used(there) == 0
                key = await given(there, 1)
            assert in_memory(there) == {key}
            assert os.listdir(tmp_path) == []
    with pytest.raises(errors.ConfigError, match="spill"):
        LoaderConfig(spill=1)  # type: ignore[arg-type]


async def test_a_small_one_spills_where_a_large_one_finds_no_room(tmp_path: Path) -> None:
    async with roomy(tmp_path, 5, cache_bytes=2 * FILE) as there:
        large = await there.load_tensors("large", tiny.tensors(9, 14), tiny.config(14))
        large.release()
        await given(there, 0)
        await given(there, 1)
        assert len(in_memory(there)) == 2
        assert large.key in in_memory(there)
        async with await there.load("large") as handle:
            tiny.assert_holds(handle, tiny.tensors(9, 14))
        await assert_all_there(there, 0, 1)


NO_DISK = "others cannot be spilled to the disk: "
REFUSALS: dict[str, tuple[str, int, dict[str, int]]] = {
    "small cache": ("into the disk cache's 7,250", 1, {"cache_bytes": FILE // 2}),
    "full cache": ("into the disk cache's", 3, {"cache_bytes": FILE * 5 // 2}),
    "file size limit": ("RLIMIT_FSIZE", 1, {}),
    "open files": ("of the 8 files that this process may open", 3, {}),
    "no folder": (NO_DISK, 1, {}),
    "unsafe folder": (NO_DISK, 1, {}),
}
"""Why one more finds no room beside so many others, and in which settings."""


@contextmanager
def obstacle(name: str, folder: Path) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        if name == "file size limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        elif name == "open files":
            patch.setattr(resource, "getrlimit", lambda _: (8, 1024))
        elif name == "no folder":
            folder.write_text("")
        elif name == "unsafe folder":
            folder.mkdir()
            folder.chmod(0o777)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if name == "no folder":
                folder.unlink()
            elif name == "unsafe folder":
                folder.chmod(0o700)


@pytest.mark.parametrize("name", REFUSALS)
async def test_without_room_on_disk_a_call_is_refused(tmp_path: Path, name: str) -> None:
    (why, count, settings), folder = REFUSALS[name], tmp_path / "cache"
    seeds, unloading_helps = list(range(count)), name in {"small cache", "full cache", "open files"}
    async with roomy(folder, 1, **settings) as there:
        with obstacle(name, folder):
            for seed in seeds:
                await given(there, seed)
            before = in_memory(there)
            one_more, words = given(there, count), "beside .* in memory_bytes"
            error = await fails(one_more, errors.CapacityError, words)
            assert why in error.problem
            assert (error.id, error.stage, error.retryable) == (str(count), "fetch", True)
            assert in_memory(there) == before
            assert used(there) == kept(there)
            await assert_all_there(there, *seeds)
            if unloading_helps:
                await there.unload(str(seeds.pop(0)))
                await until(lambda: len(entries(folder)) == max(0, count - 2))
                await given(there, count)
        if not unloading_helps:
            assert entries(folder) == []
            await given(there, count)
        await assert_all_there(there, *seeds, count)
    assert entries(folder) == []


async def test_a_damaged_entry_says_to_give_the_tensors_again(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, _):
        await off_device(there)
        os.truncate(entries(tmp_path)[0] / WEIGHTS, 100)
        words = "pass its tensors to load_tensors again"
        error = await fails(there.load("0"), errors.IntegrityError, words)
        assert (error.id, error.retryable) == ("0", False)
        await there.unload("0")
        await given(there, 0)
        await assert_all_there(there, 0, 1)


FIRST_CALLS = ("mkdir", "pwritev", "posix_fallocate", "rename")


@pytest.mark.parametrize(
    ("code", "names"),
    [
        pytest.param(errno.EIO, CHANGES + LOOKS, marks=pytest.mark.slow, id="EIO"),
        pytest.param(errno.ENOSPC, FIRST_CALLS, id="ENOSPC"),
    ],
)
def test_failing_calls_lose_no_adapter(tmp_path: Path, code: int, names: tuple[str, ...]) -> None:
    async def spill(folder: Path, calls: Calls) -> None:
        """The call that needs the room is let through, or refused."""
        async with roomy(folder, 1, max_slots=1) as there:
            key = await given(there, 0)
            with calls.counted():
                try:
                    await given(there, 1)
                except errors.CapacityError as error:
                    assert NO_DISK in error.problem
                    assert in_memory(there) == {key}
                else:
                    assert key not in in_memory(there)
            assert used(there) == kept(there)
            await assert_all_there(there, 0)
            await given(there, 1)
            await assert_all_there(there, 0, 1)
        assert open_below(folder) == []

    calls = Calls(names)
    asyncio.run(spill(tmp_path / "counted", calls))
    assert "rename" in calls.made
    for at in range(1, len(calls.made) + 1):
        asyncio.run(spill(tmp_path / str(at), failing(names, at, code)))


async def test_spilling_cancelled_at_every_await(tmp_path: Path) -> None:
    async def cancelled(folder: Path, step: int) -> bool:
        """Each is somewhere; whether the call was cancelled."""
        async with roomy(folder, 1) as there:
            key = await given(there, 0)
            if not await cancel_at(give(there, 1, "1"), step):
                return False
            await until(lambda: (key in in_memory(there)) != bool(entries(folder)))
            await assert_all_there(there, 0)
            await until(lambda: used(there) == kept(there))
            await given(there, 1)
            await assert_all_there(there, 0, 1)
        assert entries(folder) == []
        assert open_below(folder) == []
        return True

    async with roomy(tmp_path / "counted", 1) as there:
        await given(there, 0)
        steps = await count_steps(released(give(there, 1, "1")))
    assert steps >= 4, "the spill is waited for, too"
    ends = [await cancelled(tmp_path / str(step), step) for step in range(1, steps)]
    assert ends[:3] == [True] * 3
    assert ends == sorted(ends, reverse=True)


STEPS: dict[str, tuple[Any, str]] = {
    "begin": (DiskCache, "try_begin"),
    "file": (DiskDownload, "file"),
    "publish": (DiskDownload, "publish"),
    "switch": (HostCopy, "move"),
}
"""Of a spill, in their order."""
AT_EACH_STEP = pytest.mark.parametrize("step", STEPS)


@dataclass
class Midway:
    """Adapter 0 is being spilled for the sake of 1, and waits at a step until `go_on` is set."""

    loader: AdapterLoader
    key: AdapterKey
    began: Event = field(default_factory=Event)
    go_on: Event = field(default_factory=Event)
    tensor_adapters: Any = None

    def slowly(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any) -> Any:
            self.began.set()
            assert self.go_on.wait(20)
            return real(*given)

        return wait

    async def end(self) -> None:
        """Let it go on; 1 is there."""
        assert not self.tensor_adapters.done()
        self.go_on.set()
        await self.tensor_adapters
        await assert_all_there(self.loader, 1)


@contextmanager
def replaced(
    step: str, instead: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While it is entered, something else stands for a step of every spill."""
    owner, name = STEPS[step]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, instead(getattr(owner, name)))
        yield


@asynccontextmanager
async def midway(
    folder: Path, step: str, device: str = "cpu", **settings: Any
) -> AsyncIterator[Midway]:
    async with roomy(folder, 1, device=device) as there:
        now = Midway(there, await given(there, 0))
        await off_device(there)
        with replaced(step, now.slowly):
            now.tensor_adapters = asyncio.create_task(given(there, 1, **settings))
            try:
                assert await asyncio.to_thread(now.began.wait, 20)
                yield now
            finally:
                now.go_on.set()
        await until(lambda: there.closed or used(there) == kept(there))
    assert used(there) == 0
    assert entries(folder) == []
    assert open_below(folder) == []


@pytest.mark.parametrize("step", [*STEPS, "switch simulated"])
async def test_a_load_meanwhile_reads_from_memory(tmp_path: Path, step: str) -> None:
    async with midway(tmp_path, *step.split()) as now:
        await assert_means(now.loader, "0", 0)
        assert in_memory(now.loader) == {now.key}
        await now.end()
        assert len(entries(tmp_path)) == 1
        await assert_all_there(now.loader, 0)


@AT_EACH_STEP
@pytest.mark.parametrize("again", [False, True])
async def test_unloaded_during_the_spill_it_is_gone(tmp_path: Path, step: str, again: bool) -> None:
    async with midway(tmp_path, step) as now:
        await now.loader.unload("0")
        await fails(now.loader.load("0"), errors.AdapterNotFoundError)
        if again:
            tensor_adapters = asyncio.create_task(given(now.loader, 0))
            await asyncio.sleep(0.01)
            await now.end()
            assert await tensor_adapters == now.key
            await assert_all_there(now.loader, 0, 1)
        else:
            await now.end()
            await fails(now.loader.load(now.key), errors.AdapterNotFoundError)
        await until(lambda: len(entries(tmp_path)) == again)


@AT_EACH_STEP
async def test_what_is_unloaded_is_not_spilled_again(tmp_path: Path, step: str) -> None:
    """The call that spilled it was cancelled, and another one waits for the room."""
    async with midway(tmp_path, step) as now:
        other = asyncio.create_task(given(now.loader, 2))
        now.tensor_adapters.cancel()
        await now.loader.unload("0")
        await asyncio.sleep(0.01)
        now.go_on.set()
        await other
        assert now.loader.statistics().spills == (step in {"publish", "switch"})


@AT_EACH_STEP
async def test_calls_wait_for_room_in_their_order(tmp_path: Path, step: str) -> None:
    async with midway(tmp_path, step) as now:
        order: list[int] = []

        async def one(seed: int) -> None:
            await given(now.loader, seed)
            assert used(now.loader) <= now.loader.config.memory_bytes
            order.append(seed)

        tasks = []
        for seed in range(2, 6):
            tasks.append(asyncio.create_task(one(seed)))
            await asyncio.sleep(0.05)  # its tensors are measured in a thread first
        for task in (tasks[0], now.tensor_adapters):
            task.cancel()
        await asyncio.wait([tasks[0], now.tensor_adapters])
        assert (tasks[0].cancelled(), now.tensor_adapters.cancelled()) == (True, True)
        now.go_on.set()
        await asyncio.gather(*tasks[1:])
        assert order == [3, 4, 5]
        assert len(entries(tmp_path)) == now.loader.statistics().spills == 3
        await assert_all_there(now.loader, 0, *order)


@AT_EACH_STEP
async def test_a_deadline_or_cancellation_ends_the_spill(tmp_path: Path, step: str) -> None:
    """Before it is published the adapter stays in memory, and afterwards it is on disk."""
    on_disk = step in {"publish", "switch"}
    async with midway(tmp_path / "late", step, timeout=0.2) as now:
        error = await fails(now.tensor_adapters, errors.AdapterTimeoutError)
        assert (error.id, error.stage) == ("1", "fetch")
        assert in_memory(now.loader) == {now.key}
        await assert_all_there(now.loader, 0)
        now.go_on.set()
        await given(now.loader, 1)
        await assert_all_there(now.loader, 0, 1)
        assert len(entries(tmp_path / "late")) == 1
    async with midway(tmp_path / "cancelled", step) as now:
        now.tensor_adapters.cancel()
        await asyncio.wait([now.tensor_adapters])
        assert now.tensor_adapters.cancelled()
        assert in_memory(now.loader) == {now.key}
        now.go_on.set()
        await until(lambda: now.loader.statistics().spills == on_disk)
        await until(lambda: len(entries(tmp_path / "cancelled")) == on_disk)
        left = set() if on_disk else {now.key}
        await until(lambda: in_memory(now.loader) == left)
        await assert_all_there(now.loader, 0)


@AT_EACH_STEP
async def test_a_loader_that_closes_during_the_spill(tmp_path: Path, step: str) -> None:
    async with midway(tmp_path, step) as now:
        closing = asyncio.create_task(now.loader.close(timeout=0.01))
        await asyncio.sleep(0.02)
        now.go_on.set()
        await closing
        await fails(now.tensor_adapters, errors.LoaderClosedError)


@pytest.mark.parametrize("step", ["begin", "publish"])
async def test_a_fault_of_ours_during_the_spill_is_told(tmp_path: Path, step: str) -> None:
    async with roomy(tmp_path, 1) as there:
        await given(there, 0)
        with replaced(step, lambda _: raising(RuntimeError("ordered"))):
            error = await fails(given(there, 1), errors.InternalError, "ordered")
            assert error.id == "1"
        await assert_all_there(there, 0)
        await given(there, 1)
        await assert_all_there(there, 0, 1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
async def test_many_calls_at_once_keep_the_budgets(tmp_path: Path, seed: int) -> None:
    """Tensors, and merges of two that stay; some calls are cancelled."""
    draw, peaks = Random(seed), [0, 0]
    async with roomy(tmp_path, 2.5, cache_bytes=int(6.5 * FILE)) as there:
        for number in range(7):
            (await put(there, 100 + number, str(number))).release()

        async def call(name: str, number: int) -> None:
            verb = draw.choice(["put", "put", "load", "load", "unload", "merge"])
            if verb == "put":
                async with await put(there, number, name) as handle:
                    tiny.assert_holds(handle, tiny.tensors(number))
            elif verb == "unload":
                await there.unload(name, timeout=20)
            else:
                merge = Merge("linear", ["5", "6"], [1, number])
                (await there.load(name if verb == "load" else merge)).release()

        tasks = []
        for number in range(40):
            tasks.append(asyncio.create_task(call(str(draw.randrange(5)), number)))
            if draw.random() < 0.2:
                draw.choice(tasks).cancel()
            await asyncio.sleep(draw.random() / 300)
            usage = there.placement().usage
            on_disk = usage.cache_bytes.used if usage.cache_bytes else 0
            peaks = [max(peaks[0], usage.memory_bytes.used), max(peaks[1], on_disk)]
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, errors.LoraxError | asyncio.CancelledError), end
            assert not isinstance(end, errors.InternalError | errors.AdapterTimeoutError), end
        await until(lambda: used(there) == kept(there))
        assert there.statistics().spills >= 3
    assert 0 < peaks[0] <= there.config.memory_bytes
    assert peaks[1] <= there.config.cache_bytes
    assert entries(tmp_path) == []


async def test_a_merge_does_not_wait_for_bytes_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a part that is unloaded meanwhile are spilled like others."""
    async with roomy(tmp_path, 2.5, cache_bytes=8 * FILE) as there:
        for number in range(3):
            (await put(there, 100 + number, str(number))).release()
        reserve = HostCopies.reserve

        async def reserve_later(copies: HostCopies, *given: Any) -> Any:
            monkeypatch.undo()
            await there.unload("1")
            return await reserve(copies, *given)

        monkeypatch.setattr(HostCopies, "reserve", reserve_later)
        (await there.load(Merge("linear", ["0", "1"], [1, 1]), timeout=20)).release()
        assert there.placement().usage.memory_bytes.used <= int(2.5 * FILE)
