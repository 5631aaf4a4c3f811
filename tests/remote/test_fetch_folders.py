"""`loader.fetch`: a verified folder, held for whoever needs an adapter's files and not its tensors."""

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import remote_world
import tiny
import torch
from event_loops import until
from fault_server import Asked, Hangup
from hub_stand_in import HubStandIn, Reply
from huggingface_hub import snapshot_download
from remote_world import RemoteWorld, over
from safetensors.torch import load_file
from tiny_loaders import fails
from user_loads import TOKENIZER, at, contents, has, loader, stored_in, written, written_with_tokens
from web_folder import WEIGHTS

from lorax_async import AdapterLoader, AdapterRef, Allow, Limits, errors
from lorax_async.cli import main
from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.testing import FakeSource

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")
settings, world = remote_world.settings, remote_world.world


def bytes_asked(world: RemoteWorld, size: int) -> int:
    """How many bytes of weights the server was asked for."""
    return sum(min(stop, size) - start for start, stop in world.spans_of("one"))


def is_evictable(world: RemoteWorld) -> bool:
    """Make room in the cache as another process does; whether everything could go."""
    return main(["cache", "gc", "--bytes", "1", "--dir", str(world.folder)]) == 0


async def test_a_call_joins_no_task_whose_last_caller_has_left() -> None:
    """Not even in the turn of the loop in which the task ends: its folder is closed then."""
    gate, unused = asyncio.get_running_loop().create_future(), list[object]()

    async def run(_: str) -> None:
        await gate

    async def call() -> bool:
        with shared.join("one") as task:
            await result_of(task, "fetch", lambda: None)
            return task in unused

    shared = SharedTasks(run, str, unused=unused.append)
    first = asyncio.create_task(call())
    await asyncio.sleep(0.01)
    gate.set_result(None)
    first.cancel()
    assert not await asyncio.create_task(call())
    assert first.cancelled()


async def test_a_folder_that_peft_loads(world: RemoteWorld) -> None:
    """It is checked each time, and comes once."""
    adapter = world.stock()
    size = (adapter / WEIGHTS).stat().st_size
    ref = world.ref("one")
    async with over(world) as there:
        for downloaded in (True, False):
            async with await there.fetch(ref) as folder:
                assert contents(adapter).items() <= contents(folder.path).items()
                loaded = peft.utils.load_peft_weights(str(folder.path), device="cpu")
                saved = load_file(adapter / WEIGHTS)
                assert all(torch.equal(loaded[name], saved[name]) for name in saved | loaded)
                assert folder.downloaded is downloaded
                assert (folder.id, folder.stale) == ("one", False)
                assert folder.version == world.locator.there["one"].version
                digest = sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
                found = folder.verification
                assert (found.kind, found.digest) == ("sha256", digest)
                assert folder.nbytes == sum(map(len, contents(adapter).values()))
            assert folder.released
            folder.release()
        blob = folder.path / WEIGHTS
        blob.write_bytes(bytes(size))
        async with await there.fetch(folder.key) as folder:
            assert folder.downloaded, "wrong bytes are fetched again"
            assert contents(adapter).items() <= contents(folder.path).items()
    assert bytes_asked(world, size) == 2 * size
    assert is_evictable(world)


async def test_what_does_not_fit_the_base_is_fetched(world: RemoteWorld) -> None:
    world.stock()
    stored = world.locator.there["one"]
    stored.weights = stored.weights.replace(b"q_proj", b"x_proj")
    async with over(world) as there:
        error = await fails(there.load(world.ref("one")), errors.LoraxError)
        assert isinstance(error, errors.IncompatibleAdapterError | errors.AdapterFormatError)
        async with await there.fetch(world.ref("one")) as folder:
            assert (folder.path / WEIGHTS).read_bytes() == stored.weights


async def test_fetches_and_loads_share_one_download(world: RemoteWorld) -> None:
    adapter = world.stock()
    size, ref = (adapter / WEIGHTS).stat().st_size, world.ref("one")
    async with over(world) as there:
        fetching = [asyncio.create_task(there.fetch(ref)) for _ in range(3)]
        loading = asyncio.create_task(there.load(ref))
        folders, handle = await asyncio.gather(*fetching), await loading
        tiny.assert_equal_to_file(handle, adapter)
        handle.release()
        assert len({folder.path for folder in folders}) == 1
        folders[0].release()
        folders[1].release()
        assert not is_evictable(world), "the third one holds it"
        folders[2].release()
        assert bytes_asked(world, size) == size
        async with await there.load(ref):
            assert is_evictable(world), "what is on the device needs no files"
            async with await there.fetch(ref) as folder:
                assert folder.downloaded


async def test_a_refused_fetch_holds_nothing_and_is_refused_again(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path, limits=Limits(max_adapter_bytes=1 << 20)) as world:
        world.stock()
        world.put("large", world.locator.there["one"].config, bytes(1 << 21))
        async with over(world) as there:
            for id, kind, words in (
                *[("none", errors.AdapterNotFoundError, "no such")] * 2,
                *[("large", errors.AdapterFormatError, "max_adapter_byte")] * 2,
            ):
                assert (await fails(there.fetch(world.ref(id)), kind, words)).id == id
        assert is_evictable(world)


async def test_tensors_and_stand_ins_are_in_no_folder(tmp_path: Path) -> None:
    adapter = tiny.write(tmp_path / "adapter")
    source = FakeSource()
    source.put("fake", *tiny.files(adapter))
    async with AdapterLoader(tiny.layout(), source=source) as there:
        given = load_file(adapter / WEIGHTS)
        (await there.load_tensors("given", given, tiny.config())).release()
        for id in ("fake", "given"):
            await fails(there.fetch(id), errors.UsageError, "has no folder")


async def test_a_folder_that_is_never_released_is_told(world: RemoteWorld) -> None:
    world.stock()
    async with over(world) as there:
        folder = await there.fetch(world.ref("one"))
        folders = [folder]
        del folder
        assert not is_evictable(world)
        with pytest.warns(ResourceWarning, match="'one' was not released"):
            folders.clear()
        await until(lambda: is_evictable(world))


@pytest.mark.parametrize("stored_by", ["this loader", "other tools"])
async def test_offline_it_is_in_its_place(tmp_path: Path, stored_by: str) -> None:
    adapter = written(tmp_path / "whole", layers=4, rank=16)
    with HubStandIn() as hub:
        settings: dict[str, Any] = {"allow": (at(hub.store_netloc),), "hub_endpoint": hub.endpoint}
        commit = hub.put("org/name", contents(adapter))
        if stored_by == "other tools":
            where = snapshot_download("org/name", cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
        else:
            async with loader(tmp_path, layers=4, **settings) as there:
                with await there.fetch("org/name") as folder:
                    where = str(folder.path)
                assert (folder.downloaded, folder.version) == (True, commit)
                assert folder.path.parent == tmp_path / "cache" / "entries"
        asked = len(hub.asked)
        async with loader(tmp_path, layers=4, offline=True, **settings) as there:
            await fails(there.fetch("org/other"), errors.FetchError, "offline")
            with await there.fetch("org/name") as folder:
                assert (str(folder.path), folder.downloaded) == (where, False)
                assert folder.verification.vouched
                assert contents(adapter).items() <= contents(folder.path).items()
                async with await there.load(folder.path) as handle:
                    tiny.assert_equal_to_file(handle, adapter)
            assert await has(there, "org/name", adapter) == commit
        async with loader(tmp_path, layers=4, **settings) as there:
            assert await has(there, f"org/name@{commit}", adapter) == commit
        assert len(hub.asked) == asked, "what is pinned needs no answer"
        async with loader(tmp_path, layers=4, **settings) as there:
            assert await has(there, "org/name", adapter) == commit
        assert {each.method for each in hub.asked[asked:]} == {"HEAD"}
    assert stored_in(tmp_path) == (stored_by == "this loader", 0)


async def test_a_damaged_copy_in_the_hub_cache_beside_a_good_one_of_ours(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=16)
    with HubStandIn() as hub:
        settings: dict[str, Any] = {"allow": (at(hub.store_netloc),), "hub_endpoint": hub.endpoint}
        hub.put("org/name", contents(adapter))
        async with loader(tmp_path, layers=4, **settings) as there:
            (await there.fetch("org/name")).release()
        snapshot_download("org/name", cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
        blob = max((tmp_path / "hub").rglob("blobs/*"), key=lambda path: path.stat().st_size)
        blob.write_bytes(blob.read_bytes()[:-4] + b"true")
        async with loader(tmp_path, layers=4, **settings) as there:
            await fails(there.fetch("org/name"), errors.IntegrityError, "load it again")
            with await there.fetch("org/name") as folder:
                assert contents(adapter).items() <= contents(folder.path).items()


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as running:
        yield running


def on_hub(folder: Path, hub: HubStandIn, **changes: Any) -> AdapterLoader:
    allow = (Allow("hub"), at(hub.store_netloc))
    return loader(folder, layers=4, allow=allow, hub_endpoint=hub.endpoint, **changes)


def tokenizer_in(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name in TOKENIZER}


async def test_a_plain_adapter_s_fetch_asks_for_no_tokenizer(
    tmp_path: Path, hub: HubStandIn
) -> None:
    """Trainers save one beside every adapter, and it is the base's."""
    adapter = written(tmp_path / "plain", layers=4, rank=4)
    hub.put("org/name", contents(adapter) | dict.fromkeys(TOKENIZER, b"the base's"))
    async with on_hub(tmp_path, hub) as there:
        (await there.load("org/name")).release()
        with await there.fetch("org/name") as folder:
            assert not tokenizer_in(folder.path)
    assert {each.target.rpartition("/")[2] for each in hub.asked if "store" not in each.target} == {
        "adapter_config.json",
        WEIGHTS,
    }


async def test_a_tokenizer_is_that_of_the_commit(tmp_path: Path, hub: HubStandIn) -> None:
    adapter = written_with_tokens(tmp_path / "saved", layers=4)
    first = hub.put("org/name", contents(adapter))
    hub.put("org/name", contents(adapter) | {"tokenizer.json": b"another one"})
    async with on_hub(tmp_path, hub) as there:
        with await there.fetch(f"org/name@{first}") as old, await there.fetch("org/name") as new:
            assert tokenizer_in(old.path) == tokenizer_in(adapter)
            assert tokenizer_in(new.path)["tokenizer.json"] == b"another one"
        asked = len(hub.asked)
        (old.path / "tokenizer.json").write_bytes(
            b"x" * len(tokenizer_in(adapter)["chat_template.jinja"])
        )
        with await there.fetch(old.key) as again:
            assert tokenizer_in(again.path) == tokenizer_in(adapter), "wrong bytes are replaced"
            assert len(hub.asked) > asked
            assert not again.downloaded


async def test_a_tokenizer_over_the_limit_is_not_stored(tmp_path: Path, hub: HubStandIn) -> None:
    adapter = written_with_tokens(tmp_path / "saved", layers=4)
    hub.put("org/name", contents(adapter))
    size = sum(map(len, tokenizer_in(adapter).values()))
    for limit, fits in ((size - 1, False), (size, True)):
        async with on_hub(tmp_path, hub, limits=Limits(max_tokenizer_bytes=limit)) as there:
            if not fits:
                await fails(there.fetch("org/name"), errors.AdapterFormatError, "max_tokenizer_b")
                (entry,) = (tmp_path / "cache" / "entries").iterdir()
                assert not tokenizer_in(entry)
                continue
            with await there.fetch("org/name") as folder:
                assert tokenizer_in(folder.path) == tokenizer_in(adapter)


async def test_half_a_tokenizer_leaves_nothing(tmp_path: Path, hub: HubStandIn) -> None:
    adapter = written_with_tokens(tmp_path / "saved", layers=4)
    hub.put("org/name", contents(adapter))

    def tear(asked: Asked) -> Reply | None:
        if asked.method == "GET" and asked.target.endswith("chat_template.jinja"):
            raise Hangup
        return None

    hub.behave = tear
    async with on_hub(tmp_path, hub) as there:
        await fails(there.fetch("org/name"), errors.FetchError)
        (entry,) = (tmp_path / "cache" / "entries").iterdir()
        assert not tokenizer_in(entry)
        with await there.fetch("org/name") as folder:  # the entry was here before: usable
            assert (folder.downloaded, tokenizer_in(folder.path)) == (False, {})
        hub.behave = None
        with await there.fetch("org/name") as folder:
            assert tokenizer_in(folder.path) == tokenizer_in(adapter)


async def test_a_local_adapter_is_its_own_folder(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", layers=4, rank=4)
    digest = sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
    async with loader(tmp_path, layers=4, local_roots=(tmp_path,)) as there:
        for id in (adapter, "./adapter", AdapterRef(adapter, digest=digest)):
            with await there.fetch(id) as folder:
                assert (folder.path, folder.version, folder.downloaded) == (adapter, None, False)
        await fails(there.fetch(adapter, digest="0" * 64), errors.IntegrityError, "digest")
        (adapter / WEIGHTS).write_bytes(b"")
        await fails(there.fetch(folder.key), errors.LoraxError)
    assert not (tmp_path / "cache").exists()
