"""`AdapterStore`: leased folders of verified files, without a base model or a device."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import remote_world
import tiny
from event_loops import until
from fault_server import Asked, Client, FaultServer
from hub_stand_in import HubStandIn
from remote_world import RemoteWorld, Steps, over
from safetensors.torch import load_file
from tiny_loaders import fails
from user_loads import at, contents, loader, written
from web_folder import hold, refuse

from lorax_async import (
    AdapterLoader,
    AdapterRef,
    AdapterStore,
    StoreConfig,
    StoredAdapter,
    StoreStatistics,
    errors,
)
from lorax_async.cli import main

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")

settings, world = remote_world.settings, remote_world.world


def store_of(hub: HubStandIn, folder: Path, **settings: Any) -> AdapterStore:
    given: dict[str, Any] = {"hub_endpoint": hub.endpoint, "hub_cache": "off", "timeout": 5}
    given |= {"allow": (at(hub.store_netloc),)}
    return AdapterStore(StoreConfig(cache_dir=folder / "cache", **given | settings))


def is_evictable(folder: Path) -> bool:
    return main(["cache", "gc", "--bytes", "1", "--dir", str(folder / "cache")]) == 0


async def test_a_checkout_is_a_lease_and_its_id_is_in_the_placement(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=16)
    with HubStandIn() as hub:
        commit = hub.put("org/name", contents(adapter))
        async with store_of(hub, tmp_path) as store:
            assert not store.placement()
            async with store.checkout("org/name") as folder:
                assert contents(adapter).items() <= contents(folder.path).items()
                assert (folder.version, folder.downloaded) == (commit, True)
                assert folder.verification.vouched
                other = await store.checkout(f"org/name@{commit}")
                assert (other.path, other.downloaded) == (folder.path, False)
                size = folder.nbytes
                found = store.placement()["org/name"]
                assert found == StoredAdapter("present", folder.key, size, size, 2, None)
                assert found.version == commit
                asking = asyncio.ensure_future(store.checkout("org/name"))
                await asyncio.sleep(0)
                assert store.placement()["org/name"] == found, "it is here while it is asked for"
                asking.cancel()
                await asyncio.wait([asking])
                assert store.placement()["org/name"] == found
            assert not is_evictable(tmp_path), "the other one holds it"
            other.release()
            assert store.placement()["org/name"].leases == 0
            assert is_evictable(tmp_path)
            await fails(store.checkout("org/none"), errors.AccessDeniedError)
            failed = store.placement()["org/none"]
            assert (failed.state, failed.key) == ("failed", None)
            assert isinstance(failed.error, errors.AccessDeniedError)
            async with store.checkout("org/name", digest=folder.verification.digest) as folder:
                assert folder.downloaded
            await fails(store.checkout("org/name", digest="0" * 64), errors.IntegrityError)
        await fails(store.checkout("org/name"), errors.LoaderClosedError, "the store is closed")


async def test_statistics_count_each_download_once(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=16)
    with HubStandIn() as hub:
        hub.put("org/name", contents(adapter))
        with pytest.raises(errors.UsageError, match="enter the store first"):
            store_of(hub, tmp_path).statistics()
        async with store_of(hub, tmp_path) as store:
            assert store.statistics() == StoreStatistics(0, 0)
            both = [asyncio.ensure_future(store.checkout("org/name")) for _ in range(2)]
            folders = await asyncio.gather(*both)
            size = sum(file.stat().st_size for file in adapter.iterdir())
            assert await asyncio.to_thread(store.statistics) == StoreStatistics(1, size)
            await store.prefetch("org/name")
            async with store.checkout(adapter):
                await fails(store.checkout("org/none"), errors.AccessDeniedError)
            assert store.statistics() == StoreStatistics(1, size)
            for folder in folders:
                folder.release()
        assert store.statistics() == StoreStatistics(1, size)


async def test_a_checkout_is_a_coroutine(world: RemoteWorld) -> None:
    world.stock()
    async with AdapterStore(source=world.source) as store, asyncio.TaskGroup() as group:
        call = store.checkout(world.ref("one"))
        async with call as folder:
            with pytest.raises(RuntimeError, match="already awaited"):
                await call
            assert not folder.released
        (await group.create_task(store.checkout(world.ref("one")))).release()
        loop = asyncio.get_running_loop()

        def elsewhere() -> None:
            call = asyncio.run_coroutine_threadsafe(store.checkout(world.ref("one")), loop)
            loop.call_soon_threadsafe(call.result(10).release)

        await asyncio.to_thread(elsewhere)
        await fails(asyncio.to_thread(store.prefetch, "a/b"), errors.UsageError, "event loop")


async def test_a_digest_is_its_callers_own(world: RemoteWorld) -> None:
    """Also of calls that share the first download, from a source that promises none."""
    adapter, wrong = world.stock(), AdapterRef("one", source="hub", digest="0" * 64)
    weights = contents(adapter)["adapter_model.safetensors"]
    right = AdapterRef("one", source="hub", digest=sha256(weights).hexdigest())
    world.locator.promises = False
    async with AdapterStore(source=world.source) as store:
        refs = [wrong, world.ref("one"), right, wrong]
        calls = await asyncio.gather(*map(store.checkout, refs), return_exceptions=True)
        assert [isinstance(call, errors.IntegrityError) for call in calls] == [1, 0, 0, 1]
        folders = [call for call in calls if not isinstance(call, BaseException)]
        for folder in folders:
            assert contents(adapter).items() <= contents(folder.path).items()
        assert [folder.verification.kind for folder in folders] == ["transport", "sha256"]
        spans = world.spans_of("one")
        assert sum(min(stop, len(weights)) - start for start, stop in spans) == len(weights)
        await fails(store.checkout(wrong), errors.IntegrityError, "not 0000")
        for folder in folders:
            assert contents(adapter).items() <= contents(folder.path).items()
            folder.release()
        world.locator.error = errors.FetchError("it is down")
        pinned = AdapterRef("one", "hub", world.locator.there["one"].version)
        async with store.checkout(pinned) as folder:  # in use: a wrong digest does not remove it
            refuted = store.checkout(replace(pinned, digest=wrong.digest))
            await fails(refuted, errors.IntegrityError)
            assert contents(adapter).items() <= contents(folder.path).items()
        world.locator.error = None
        await fails(store.checkout(wrong), errors.IntegrityError, "not 0000")
        assert len(world.spans_of("one")) > len(spans), "now it was fetched again"


async def test_calls_with_one_id_keep_their_own_versions(world: RemoteWorld) -> None:
    world.stock()
    other = AdapterRef("one", source="hub", revision="0" * 40)
    world.locator.silent = True
    async with AdapterStore(source=world.source) as store:
        late = asyncio.ensure_future(store.checkout(other, timeout=0.3))
        await until(lambda: world.locator.unanswered)
        world.locator.silent = False
        async with store.checkout(world.ref("one")) as folder:
            await asyncio.wait([late])
            error = late.exception()
            assert isinstance(error, errors.AdapterTimeoutError)
            assert (error.stage, error.key) == ("resolve", None), folder.key


async def test_a_leased_folder_is_not_evicted_for_another(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        for seed in range(3):
            hub.put(f"org/{seed}", contents(written(tmp_path / str(seed), seed, layers=4, rank=16)))
        size = sum(map(len, contents(tmp_path / "0").values()))
        async with store_of(hub, tmp_path, cache_bytes=int(2.5 * size)) as store:
            zero = await store.checkout("org/0")
            (await store.checkout("org/1")).release()
            two = await store.checkout("org/2")
            assert contents(tmp_path / "0").items() <= contents(zero.path).items()
            waiting = asyncio.ensure_future(store.checkout("org/1"))
            await asyncio.sleep(0.3)
            assert not waiting.done(), "there is no room"
            assert zero.path.exists()
            zero.release()
            async with await waiting as one:
                assert not zero.path.exists()
                assert one.path.exists()
            two.release()


async def test_a_prefetch_is_joined_and_reports_what_arrives(world: RemoteWorld) -> None:
    adapter, gate = world.stock(), threading.Event()

    def late(asked: Asked, client: Client) -> None:
        assert gate.wait(20)
        world.serve(asked, client)

    world.server.behave = late
    async with AdapterStore(source=world.source) as store:
        hint = store.prefetch([world.ref("one"), world.ref("none")])
        await until(lambda: "one" in store.placement())
        assert store.placement()["one"].state in {"resolving", "fetching"}
        calls = [asyncio.create_task(files_of(store, world)) for _ in range(2)]
        await asyncio.sleep(0.01)
        calls[0].cancel()
        gate.set()
        assert contents(adapter).items() <= (await calls[1]).items()
        await asyncio.wait([hint.task])
        assert hint.errors.keys() == {"none"}
        assert store.placement()["one"].state == "present"
        assert store.placement()["none"].state == "failed"
        weights = len(contents(adapter)["adapter_model.safetensors"])
        asked = sum(min(stop, weights) - start for start, stop in world.spans_of("one"))
        assert asked == weights, "it came once"
    assert calls[0].cancelled()


async def test_prefetches_from_a_stalled_origin_do_not_delay_others(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=16)
    with HubStandIn() as hub, FaultServer(b"", lambda _, client: hold(client)) as stalled:
        hub.put("org/name", contents(adapter))
        allow = (at(hub.store_netloc), at(stalled.netloc))
        async with store_of(hub, tmp_path, allow=allow, timeout=60) as store:
            store.prefetch([f"http://{stalled.netloc}/{n}/" for n in range(3)])
            hint = store.prefetch("org/name")
            await asyncio.wait([hint.task], timeout=20)
            assert store.placement()["org/name"].state == "present"


async def files_of(store: AdapterStore, world: RemoteWorld) -> dict[str, bytes]:
    async with store.checkout(world.ref("one")) as folder:
        return contents(folder.path)


async def test_cancelled_at_every_step_it_leaves_nothing(
    world: RemoteWorld, tmp_path: Path
) -> None:
    steps, files = Steps(world.source), tiny.files(tiny.write(tmp_path / "a", rank=256))
    async with AdapterStore(source=world.source) as store:
        for step in itertools.count(1):
            ref = world.put(f"n{step}", *files)
            checkout = asyncio.ensure_future(store.checkout(ref))
            steps.expect(step, checkout.cancel)
            await asyncio.wait([checkout])
            if not checkout.cancelled():
                checkout.result().release()
                break
            assert f"n{step}" not in store.placement()
            await until(lambda: is_evictable(world.folder.parent))
            async with store.checkout(ref) as folder:
                assert (folder.path / "adapter_model.safetensors").read_bytes() == files[1]
        assert f"n{step}" in store.placement()
    assert step > 6, "every await was met"
    assert is_evictable(world.folder.parent)


@pytest.mark.parametrize("make", [lambda world: AdapterStore(source=world.source), over])
async def test_closing_fails_calls_before_it_waits_for_leases(
    world: RemoteWorld, make: Callable[[RemoteWorld], AdapterStore | AdapterLoader]
) -> None:
    world.stock()
    async with make(world) as there:
        call = there.checkout if isinstance(there, AdapterStore) else there.load
        held = await call(world.ref("one"))
        world.locator.silent = True
        waiting = asyncio.ensure_future(call(world.ref("two")))
        await until(lambda: world.locator.unanswered)
        closing = asyncio.create_task(there.close(timeout=20))
        await asyncio.wait([waiting], timeout=10)
        assert isinstance(waiting.exception(), errors.LoaderClosedError)
        assert not closing.done()
        held.release()


async def test_deadlines_and_the_end_of_hints_and_leases(world: RemoteWorld) -> None:
    world.stock()
    world.stock("two", 1)
    store, two = await AdapterStore(source=world.source).__aenter__(), world.ref("two")
    held, gate = await store.checkout(world.ref("one")), threading.Event()

    def late(asked: Asked, client: Client) -> None:
        gate.wait(20)
        refuse("503 No")(asked, client)

    world.server.behave = late
    late_error = await fails(
        store.checkout(two, timeout=0.1), errors.AdapterTimeoutError, r"0\.1 s"
    )
    assert (late_error.stage, late_error.id) == ("fetch", "two")
    hint, before = store.prefetch(two), len(world.server.asked)
    waiting = asyncio.ensure_future(store.checkout(two))
    await until(lambda: len(world.server.asked) > before)
    closing = asyncio.create_task(store.close(timeout=0.5))
    error = await fails(waiting, errors.LoaderClosedError, "the store is closed")
    assert (error.stage, hint.done) == ("fetch", True)
    assert not is_evictable(world.folder.parent), "leases are waited for"
    gate.set()
    await closing
    assert is_evictable(world.folder.parent), "and are ended then"
    assert held.released
    held.release()
    with pytest.raises(errors.UsageError, match="entered once"):
        await store.__aenter__()


async def test_a_loader_knows_where_ids_are(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=16)
    given = load_file(adapter / "adapter_model.safetensors")
    async with loader(tmp_path, layers=4, local_roots=(tmp_path,)) as there:
        async with await there.load("./adapter") as handle:
            (await there.load_tensors("given", given, tiny.config(16))).release()
            await there.prefetch(adapter, tier="disk")
            found = there.placement().by_id
            assert found.keys() == {"./adapter", str(adapter), "given"}
            assert found["./adapter"] == there.placement().adapters[handle.key]
            assert (found["./adapter"].leases, found["given"].tier) == (1, "device")
        await there.unload("given")
        assert "given" not in there.placement().by_id


async def test_an_id_is_in_the_placement_when_its_next_version_fails(world: RemoteWorld) -> None:
    world.stock()
    async with over(world) as there, await there.load(world.ref("one")):
        world.put("one", *tiny.files(tiny.write(world.adapters / "new", 1, remote_world.RANK)))
        world.faults["one"] = lambda _, asked, client: refuse("404 No")(asked, client)
        await fails(there.load(AdapterRef("one", "hub", "next")), errors.AdapterNotFoundError)
        assert there.placement().by_id["one"].leases == 1
