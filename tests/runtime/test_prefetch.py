"""Prefetches to each tier, behind all loads, by thousands; and the host tier."""

import asyncio
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from event_loops import until
from leaks import mapped_files
from page_cache import cached_pages, drop_pages, map_sizes, may_lock, pages
from tiny_loaders import ONE, fails, loader
from tiny_sources import WEIGHTS, Slowed, granted, is_at, make_source, over, simulated, state, where

from lorax_async import AdapterKey, AdapterLoader, AdapterRef, Event, LocalRoot, errors
from lorax_async.concurrency import FetchControl
from lorax_async.config import Eviction
from lorax_async.files import Reader
from lorax_async.runtime import acquire, host_tier
from lorax_async.runtime.placement import TierName
from lorax_async.sources.base import AdapterFile
from lorax_async.testing import FakeSource

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("ids", ["one", ("one", "two")], ids=["one", "several"])
@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_each_tier(tmp_path: Path, tier: TierName, ids: str | tuple[str, ...]) -> None:
    source = make_source(tmp_path, "one", "two", "three", holdable=True)
    wanted = (ids,) if isinstance(ids, str) else ids
    async with over(source) as there:
        await there.prefetch(ids, tier=tier)
        found = list(there.placement().adapters.values())
        assert [(each.tier, each.leases) for each in found] == [(tier, 0)] * len(wanted)
        assert all(is_at(there, name, tier) for name in wanted)
        moved = len(wanted) if tier == "device" else 0
        held = len(wanted) if tier == "host" else 0
        assert there.statistics().bytes_moved == moved * ONE
        assert (len(mapped_files()), source.counts.opens) == (held, len(wanted))
        async with await there.load("one") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        assert source.counts.opens == len(wanted)
    assert (source.counts.open_readers, mapped_files()) == (0, [])


async def test_a_prefetch_begins_without_being_awaited(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(2)]
    async with loader(local_roots=(tmp_path,)) as there:
        there.prefetch(id for id in (AdapterRef(folders[0]), str(folders[1])))
        await until(lambda: state(there, folders[0]) == "resident")
        await until(lambda: state(there, str(folders[1])) == "resident")
        (key, _) = there.placement().adapters
        await there.prefetch(key, tier="disk")
        nothing = there.prefetch([])
        assert nothing.done
        await nothing


async def test_wrong_arguments_are_told_by_the_call(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with over(source) as there:
        wrong: list[tuple[Any, dict[str, Any], str]] = [
            ("a", {"tier": "gpu"}, "one of disk, host, device, not 'gpu'"),
            (["a", 3], {}, "not int"),
            ("a", {"timeout": -1}, "a timeout is from 0"),
            *(
                ("a", {"priority": odd}, "a priority is a whole number")
                for odd in (None, "high", 0.5, True, 10**400)
            ),
        ]
        for ids, more, words in wrong:
            with pytest.raises(errors.UsageError, match=words):
                there.prefetch(ids, **more)
        call = there.load("a", priority=0.5)  # type: ignore[arg-type]
        await fails(call, errors.UsageError, "a priority is a whole number")
        await asyncio.sleep(0)
        assert source.counts.resolves == 0


async def test_every_load_goes_before_a_prefetch(tmp_path: Path) -> None:
    names = ("held", "hint", "urgent hint", "late", "later")
    async with over(make_source(tmp_path, *names), max_slots=1, starvation_age=60) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        held = await there.load("held")
        hints = [there.prefetch("hint"), there.prefetch("urgent hint", priority=9)]
        await until(lambda: all(state(there, name) == "present" for name in names[1:3]))
        loads = [asyncio.create_task(there.load(n, priority=-9)) for n in names[3:]]
        await until(lambda: all(state(there, name) == "present" for name in names[3:]))
        held.release()
        for load in loads:
            (await load).release()
        for hint in hints:
            await hint
        assert granted(heard) == ["held", "late", "later", "urgent hint", "hint"]


async def test_nobody_waits_for_the_network_of_a_prefetch(tmp_path: Path) -> None:
    source = make_source(tmp_path, "slow", "here")
    async with over(source, max_slots=1, io_threads=1) as there:
        source.hold("slow")
        source.allow("slow", 0)
        hint = there.prefetch("slow")
        await until(lambda: source.counts.fetches == 1)
        (await there.load("here", timeout=20)).release()
        assert not hint.done
        async with there.stream("slow", timeout=20) as handle:
            await handle.layer_ready(0)
            assert not handle.is_ready(1)
            source.allow("slow")
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, tmp_path / "slow")
        await hint
        assert source.counts.fetches == 2


async def test_its_errors_are_in_the_order_of_the_ids(tmp_path: Path) -> None:
    source = make_source(tmp_path, "good", "late")
    async with over(source) as there:
        source.hold("late")
        source.fail("fetch_groups", errors.FetchError("the wire broke"), id="late", at=3)
        hint = there.prefetch(["good", "late", "missing"])
        await until(lambda: hint.errors)
        assert list(hint.errors) == ["missing"]
        assert not hint.done
        source.allow("late")
        assert (await fails(hint, errors.FetchError, "the wire broke")).id == "late"
        kinds = [(id, type(error)) for id, error in hint.errors.items()]
        wanted = [("late", errors.FetchError), ("missing", errors.AdapterNotFoundError)]
        assert kinds == wanted
        assert is_at(there, "good", "device")


@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_a_failure_that_nobody_asks_for_is_quiet(tmp_path: Path, tier: TierName) -> None:
    source = make_source(tmp_path, "a")
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
    async with over(source) as there:
        source.fail("open", errors.IntegrityError("torn"))
        hints = [there.prefetch(["a", "missing"], tier=tier)]
        await until(lambda: hints[0].done)
        assert len(hints.pop().errors) == 2
        gc.collect()
        assert not heard
        await there.prefetch("a", tier=tier)


async def test_cancelling_a_prefetch_ends_nothing_of_others(tmp_path: Path) -> None:
    source = make_source(tmp_path, "shared", "alone", "arrived")
    async with over(source) as there:
        for name in ("shared", "alone"):
            source.hold(name)
        hint = there.prefetch(["shared", "alone", "arrived"])
        load = asyncio.create_task(there.load("shared"))
        await until(lambda: state(there, "arrived") == "resident" and source.counts.fetches == 3)
        hint.cancel()
        await until(lambda: state(there, "alone") == "nowhere")
        await hint
        assert not hint.errors
        assert state(there, "arrived") == "resident"
        assert not load.done()
        source.allow("shared")
        async with await load as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "shared")
        assert source.counts.fetches == 3
        hint.cancel()  # what is over stays as it is
        await hint


async def test_a_waiter_that_is_cancelled_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path, "a")
    async with over(source) as there:
        source.hold("a")
        for tier in ("disk", "host", "device"):
            late = there.prefetch("a", tier=tier, timeout=0.02)
            caught = await fails(late, errors.AdapterTimeoutError)
            assert (caught.id, caught.stage) == ("a", "fetch")
            assert "in use" not in caught.problem, "it waited for bytes, not for a slot"
            await until(lambda: state(there, "a") == "nowhere")
        hint = there.prefetch("a", timeout=20)
        await until(lambda: source.counts.fetches == 4)
        await fails(asyncio.wait_for(hint, 0.01), TimeoutError)
        assert not hint.done
        source.allow("a")
        await hint
        assert is_at(there, "a", "device")
        await there.unload("a")
        monkeypatch.setattr(host_tier, "populate", host_tier.populate)  # restored at the end
        Slowed(host_tier, "populate")
        late = there.prefetch("a", tier="host", timeout=0.02)
        caught = await fails(late, errors.AdapterTimeoutError)
        assert caught.stage == "queue"
        assert "in use" not in caught.problem, "it waited for host memory, not for a slot"


async def test_close_ends_a_prefetch_wherever_it_is(tmp_path: Path) -> None:
    source = make_source(tmp_path, "leased", "on the wire", "in the queue", "just begun")
    async with over(source, max_slots=1) as there:
        lease = await there.load("leased")
        source.hold("on the wire")
        hints = [there.prefetch("on the wire"), there.prefetch("in the queue")]
        await until(
            lambda: state(there, "in the queue") == "present" and source.counts.fetches == 3
        )
        hints += [there.prefetch(["just begun", lease.key, "leased"])]
        await asyncio.wait_for(there.close(timeout=0), 20)
        found = [item for hint in hints for item in hint.errors.items()]
        assert dict(found).keys() >= {"on the wire", "in the queue", "just begun"}
        assert {type(error) for _, error in found} == {errors.LoaderClosedError}
        for hint in hints:
            assert hint.done
            await fails(hint, errors.LoaderClosedError)
        with pytest.raises(errors.LoaderClosedError):
            there.prefetch("leased")


NAMES = tuple(f"hint-{n}" for n in range(60))


@pytest.mark.parametrize(
    ("settings", "asked", "kept"),
    [
        ({"max_slots": 4}, "01234567", "012"),
        ({"device_bytes": 8 * ONE, "max_slots": 9}, ["0", "1", "large", "2", "3"], "01large2"),
        ({"max_slots": 3}, ["missing", "2", "2", "pinned", "1", "0"], "2pinned1"),
        ({"max_slots": 3}, ["1", "2", "0", "pinned", "2"], "1pinned2"),
        ({"device_bytes": 4 * ONE, "max_slots": 9}, ["huge", *"01234"], "012"),
        *(({"max_slots": 4, "eviction": policy}, "01234567", "012") for policy in ("lfu", "gdsf")),
    ],
)
async def test_the_first_ones_that_fit_stay_on_the_device(
    tmp_path: Path, settings: dict[str, Any], asked: Iterable[str], kept: str
) -> None:
    """In the order in which they are opened. The others are named, and evict nothing."""
    source = make_source(tmp_path, *"01234567", "pinned", "idle")
    for rank, name in ((16, "large"), (64, "huge")):
        source.put(name, *tiny.files(tiny.write(tmp_path / name, rank=rank)))
    async with over(source, **settings) as there:
        await there.pin("pinned")
        for _ in range(9):  # it leaves for them, although it was used more often
            (await there.load("idle")).release()
        hint = there.prefetch([*asked])
        await until(lambda: hint.done)
        assert hint.errors.keys() == {"missing", "huge"} & {*asked}
        wanted = [name for name in asked if name not in hint.errors]
        assert hint.left_out == tuple(name for name in wanted if name not in kept)
        assert [name for name in wanted if is_at(there, name, "device")] == [
            name for name in wanted if name in kept
        ]
        assert f"{len(hint.left_out)} left out" in repr(hint)
        assert not is_at(there, "idle", "device")
        assert is_at(there, "pinned", "device")


async def test_a_prefetch_waits_for_a_lease_rather_than_evict_its_own(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, *"abc"), max_slots=2) as there:
        leased = await there.load("c")
        hint = there.prefetch([*"ab"])
        await until(lambda: is_at(there, "a", "device") and state(there, "b") == "present")
        await asyncio.sleep(0.02)
        assert (hint.done, is_at(there, "a", "device")) == (False, True)
        leased.release()
        await hint
        assert [n for n in "abc" if is_at(there, n, "device")] == ["a", "b"]


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
async def test_the_first_ones_that_fit_stay_in_host_memory(
    tmp_path: Path, eviction: Eviction
) -> None:
    source = make_source(tmp_path, *"abcd", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, host_bytes=2 * nbytes, eviction=eviction) as there:
        await there.prefetch("d", tier="host")
        for _ in range(3):
            (await there.load("d")).release()
        hint = there.prefetch([*"abc"], tier="host")
        await hint
        assert hint.left_out == ("c",)
        assert [where(there, n).host_bytes for n in "abd"] == [nbytes, nbytes, 0]
    async with over(source, host_bytes=0) as there:
        with pytest.raises(errors.UsageError, match=r"host_bytes=0 .* hold nothing; raise Loader"):
            there.prefetch("a", tier="host")


async def test_a_slow_one_does_not_hold_up_those_after_it(tmp_path: Path) -> None:
    source = make_source(tmp_path, *"abc")
    async with over(source, max_slots=2) as there:
        source.hold("a")
        hint = there.prefetch([*"abc"])
        await until(lambda: is_at(there, "b", "device") and is_at(there, "c", "device"))
        assert not hint.done
        source.allow("a")
        await hint
        assert hint.left_out == ("a",), "it came when the room was taken"


async def test_two_openings_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, *NAMES, "urgent")
    opened, opening, at_once = list[str](), set[str](), list[int]()
    plain_open = source.open

    async def slow(key: AdapterKey, control: FetchControl) -> AdapterFile:
        opened.append(key.location.removeprefix("memory:"))
        if opened[-1] != "urgent":
            opening.add(key.location)
            at_once.append(len(opening))
            await asyncio.sleep(0.001)
            opening.remove(key.location)
        return await plain_open(key, control)

    monkeypatch.setattr(source, "open", slow)
    monkeypatch.setattr(acquire, "BACKGROUND_SECONDS", 1e6)  # so that no turn is lent
    async with over(source) as there:
        for name in NAMES[:4]:
            source.hold(name)
        hints = there.prefetch(NAMES, tier="disk")
        await until(lambda: opened)
        before = len(opened)
        (await there.load("urgent")).release()
        assert opened.index("urgent") < before + 10
        await until(lambda: all(is_at(there, name, "disk") for name in NAMES[4:]))
        assert max(at_once) == 2
        assert not hints.done
        source.allow(NAMES[0])
        hints.cancel()
        await hints


async def test_one_that_waits_for_its_turn_is_cancelled(tmp_path: Path) -> None:
    source = make_source(tmp_path, *"abcd")
    opening = Slowed(source, "open")
    async with over(source) as there:
        hints = [there.prefetch(name, tier="disk") for name in "abcd"]
        await until(lambda: opening.asked == 2)
        hints[2].cancel()
        opening.may_go_on.set()
        for hint in hints:
            await hint
        assert [state(there, name) for name in "abcd"] == ["present"] * 2 + ["nowhere", "present"]


async def test_many_are_cancelled_before_they_began(tmp_path: Path) -> None:
    source = make_source(tmp_path, *NAMES)
    async with over(source) as there:
        for turns in range(2):
            hints = there.prefetch(NAMES, tier="disk")
            for _ in range(turns):
                await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) < len(NAMES) // 2
            hints.cancel()
            await hints
            assert hints.done
            assert source.counts.resolves < len(NAMES) // 2 * turns + 1


PADDED = 2 * ONE  # Rank 4 as rank 8, the least on the simulated device


def bytes_from_disk() -> int:
    """What this process made the kernel fetch from storage so far."""
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def dropped(folder: Path) -> Path:
    for name in ("adapter_config.json", WEIGHTS):
        drop_pages(folder / name)
    assert cached_pages(folder / WEIGHTS) == 0
    return folder / WEIGHTS


async def test_what_was_prefetched_to_the_host_is_read_without_a_disk(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    weights = dropped(folder)
    async with loader(local_roots=[LocalRoot(tmp_path, immutable=True)]) as there:
        await there.prefetch(folder, tier="disk")
        assert (where(there, folder).state, where(there, folder).host_bytes) == ("present", 0)
        dropped(folder)
        before = bytes_from_disk()
        (await there.load(folder)).release()
        assert bytes_from_disk() - before >= weights.stat().st_size // 2, "as it should be told"
        await there.unload(folder)
        dropped(folder)
        await there.prefetch(folder, tier="host")
        assert cached_pages(weights) == pages(weights.stat().st_size)
        held = where(there, folder)
        assert (held.tier, held.state, held.slot) == ("host", "held", None)
        assert (held.host_bytes, held.device_bytes) == (weights.stat().st_size, 0)
        assert held.locked is may_lock(held.host_bytes)
        before = bytes_from_disk()
        async with await there.load(folder) as handle:
            assert bytes_from_disk() == before
            tiny.assert_equal_to_file(handle, folder)
            found = where(there, folder)
            assert (found.tier, found.device_bytes) == ("device", handle.nbytes)
            assert found.host_bytes == held.host_bytes
        await there.unload(folder)
        assert not map_sizes(weights)
        dropped(folder)


async def test_what_may_change_is_read_ahead_each_time(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    weights = folder / WEIGHTS
    async with loader() as there:
        for _ in range(2):
            dropped(folder)
            await there.prefetch(folder, tier="host")
            await until(lambda: cached_pages(weights) == pages(weights.stat().st_size))
            found = where(there, folder)
            assert (found.state, found.host_bytes, found.locked) == ("read ahead", 0, False)
        assert not map_sizes(weights)


async def test_the_coldest_makes_room_within_the_budget(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", "c", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, host_bytes=2 * nbytes) as there:
        await there.prefetch("a", tier="host")
        await there.prefetch("b", tier="host")
        (await there.load("a")).release()  # b is the colder one
        await there.prefetch("c", tier="host")
        held = {name: where(there, name).host_bytes for name in "abc"}
        assert held == {"a": nbytes, "b": 0, "c": nbytes}
        assert len(mapped_files()) == 2


@pytest.fixture
def populated(monkeypatch: pytest.MonkeyPatch) -> list[Reader]:
    """The readers whose files the host tier has populated, or tried to."""
    populate, readers = host_tier.populate, list[Reader]()

    async def counted(reader: Reader, *args: Any, **options: Any) -> Any:
        readers.append(reader)
        return await populate(reader, *args, **options)

    monkeypatch.setattr(host_tier, "populate", counted)
    return readers


async def test_what_is_larger_than_the_budget_is_refused(
    tmp_path: Path, populated: list[Reader]
) -> None:
    source = make_source(tmp_path, "a", holdable=True)
    async with over(source, host_bytes=(tmp_path / "a" / WEIGHTS).stat().st_size - 1) as there:
        hint = there.prefetch("a", tier="host")
        error = await fails(hint, errors.CapacityError, "raise host_bytes")
        assert (error.retryable, error.id) == (False, "a")
        await there.prefetch("a")
        await there.unload("a")
        assert not populated


async def test_who_was_pushed_off_the_device_goes_on_in_host_memory(
    tmp_path: Path, populated: list[Reader]
) -> None:
    source = make_source(tmp_path, "a", "b", "c", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, max_slots=1, host_bytes=nbytes) as there:
        for name in "ab":
            (await there.load(name)).release()
        await until(lambda: state(there, "a") == "held")
        assert where(there, "a").host_bytes == nbytes
        (await there.load("c")).release()
        await until(lambda: state(there, "b") == "held")
        assert where(there, "a").tier == "disk"
        await there.unload("c")
        assert where(there, "c").tier == "disk"
        assert (len(populated), len(mapped_files())) == (2, 1)


async def read_for(loader: AdapterLoader, source: FakeSource, base: Path, name: str) -> int:
    """Bytes of its file that loading it takes."""
    before = source.counts.bytes_read
    async with await loader.load(name) as handle:
        tiny.assert_equal_to_file(handle, base / name)
    return source.counts.bytes_read - before


async def test_a_reload_reads_no_byte_of_the_file(tmp_path: Path, populated: list[Reader]) -> None:
    source = make_source(tmp_path, "a", "b")
    async with over(source, device="simulated", max_slots=1, pinned_bytes=1 << 20) as there:
        assert await read_for(there, source, tmp_path, "a") == ONE
        assert where(there, "a").pinned_bytes == PADDED
        assert await read_for(there, source, tmp_path, "b") == ONE
        found = where(there, "a")
        assert (found.tier, found.device_bytes, found.pinned_bytes) == ("host", 0, PADDED)
        assert (found.host_bytes, found.locked) == (0, True)
        await there.prefetch("a", tier="host")
        assert not populated, "it is there already"
        for name in "abab":
            assert await read_for(there, source, tmp_path, name) == 0
        assert there.statistics().bytes_moved == 6 * PADDED


async def test_the_budget_of_images_is_kept_and_the_coldest_goes(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", "c")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 2 * PADDED}
    async with over(source, **settings) as there:
        read = []
        for name in "abcbcab":
            read.append(await read_for(there, source, tmp_path, name))
            assert there.placement().usage.pinned_bytes.used <= 2 * PADDED
        # c takes the image of a, b and c come back warm, a takes that of b, b that of c
        assert read == [ONE, ONE, ONE, 0, 0, ONE, ONE]


async def test_half_an_image_is_completed_from_the_file(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with over(source, device="simulated", pinned_bytes=1 << 20, io_threads=1) as there:
        simulated(there).failing = {2}
        await fails(there.load("a"), errors.TransferError)
        await until(lambda: state(there, "a") == "present")
        assert where(there, "a").tier == "disk"
        assert await read_for(there, source, tmp_path, "a") == ONE // tiny.LAYERS
        assert simulated(there).copies == 2 * tiny.LAYERS


@pytest.mark.parametrize(
    ("device", "pinned_bytes"), [("cpu", 1 << 20), ("simulated", 0), ("simulated", PADDED - 64)]
)
async def test_no_image_without_room(tmp_path: Path, device: str, pinned_bytes: int) -> None:
    source = make_source(tmp_path, "a", "b")
    async with over(source, device=device, max_slots=1, pinned_bytes=pinned_bytes) as there:
        for name in "aba":
            assert await read_for(there, source, tmp_path, name) == ONE
        assert there.placement().usage.pinned_bytes.used == 0
        assert is_at(there, "b", "disk")
