"""A server changes a file under the same validator: no wrong byte is lent, and no refusal stays."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from changing_origin import CONFIG, WEIGHTS, World, changing
from user_loads import contents, has, until, written

from lorax_async import (
    AdapterError,
    AdapterFormatError,
    AdapterLoader,
    FetchError,
    IncompatibleAdapterError,
    IntegrityError,
)
from lorax_async.adapter import AdapterRef
from lorax_async.commands.fetching import Fetched
from lorax_async.io.remote.elsewhere import elsewhere_of

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LAYERS = 4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape that differ in every tensor; some 2.4 MB each."""
    folder = tmp_path_factory.mktemp("saved")
    return [written(folder / str(n), n, layers=LAYERS, rank=256) for n in range(2)]


@pytest.fixture
def world(tmp_path: Path, adapters: list[Path]) -> Iterator[World]:
    with changing(tmp_path, adapters[0]) as made:
        yield made


def zeros_of(adapter: Path) -> dict[str, bytes]:
    """The files as a server has them whose upload has reserved its room and sent nothing yet."""
    files = contents(adapter)
    return files | {WEIGHTS: bytes(len(files[WEIGHTS]))}


def unknown_dtype_in(adapter: Path) -> dict[str, bytes]:
    """The length of the header is right, and its text is not: planning refuses it."""
    files = contents(adapter)
    return files | {WEIGHTS: files[WEIGHTS].replace(b'"F32"', b'"F33"')}


async def refused(
    there: AdapterLoader, id: str | AdapterRef, error: type[AdapterError]
) -> AdapterError:
    with pytest.raises(error) as caught:
        async with await there.load(id):
            pass
    return caught.value


async def interrupted(world: World, there: AdapterLoader, at: int) -> None:
    """A load that ends after `at` bytes of weights, and leaves them to the next one."""
    world.origin.stop_at = at
    with pytest.raises(FetchError):
        async with await there.load(world.id, timeout=20):
            pass
    world.origin.stop_at = None
    await until(lambda: world.stored() == (0, 1))


async def published(world: World) -> None:
    """Store what the origin has now, unchecked by any layout: as `lorax-async fetch` does."""
    async with world.loader() as there:
        config = there.config
    with elsewhere_of(config) as source:
        row = Fetched(AdapterRef(world.id, source="http"))
        await row.run(source, lambda _: "")
    assert row.error is None, row.error


@pytest.mark.parametrize("make", [zeros_of, unknown_dtype_in], ids=["zeros", "a wrong header"])
async def test_a_refused_download_leaves_nothing_behind(
    world: World, adapters: list[Path], make: Callable[[Path], dict[str, bytes]]
) -> None:
    world.origin.files = make(adapters[0])
    async with world.loader() as there:
        await refused(there, world.id, AdapterFormatError)
        await until(lambda: world.stored() == (0, 0))
        world.origin.files = contents(adapters[0])
        await has(there, world.id, adapters[0])
    async with world.loader() as there:
        await has(there, world.id, adapters[0])


@pytest.mark.parametrize("again", ["the same loader", "another loader"])
@pytest.mark.parametrize("promises", [False, True], ids=["no digest", "digest"])
async def test_an_interrupted_download_of_other_bytes_is_discarded(
    world: World, adapters: list[Path], again: str, promises: bool
) -> None:
    world.origin.promises = promises
    async with world.loader() as there:
        await interrupted(world, there, 1_500_000)
        world.origin.files = contents(adapters[1])
        if again == "the same loader":
            await has(there, world.id, adapters[1])
    if again != "the same loader":
        async with world.loader() as there:
            await has(there, world.id, adapters[1])
    async with world.loader() as there:
        await has(there, world.id, adapters[1])


async def test_an_interrupted_download_that_is_zero_at_its_end_is_not_published(
    world: World, adapters: list[Path]
) -> None:
    """The server had the file's beginning then, and room for the rest: the first bytes agree."""
    right = contents(adapters[0])
    half = len(right[WEIGHTS]) // 2
    world.origin.files = right | {WEIGHTS: right[WEIGHTS][:half].ljust(2 * half, b"\0")}
    assert len(world.origin.files[WEIGHTS]) == len(right[WEIGHTS])
    async with world.loader() as there:
        await interrupted(world, there, 3 * half // 2)
        world.origin.files = right
        await has(there, world.id, adapters[0])
    async with world.loader() as there:
        await has(there, world.id, adapters[0])


async def test_the_config_of_an_interrupted_download_is_compared(
    world: World, adapters: list[Path]
) -> None:
    """Another alpha of as many digits: the scale of the adapter that is served is the new one."""
    right = contents(adapters[0])
    config = json.loads(right[CONFIG])
    old, new = (json.dumps(config | {"lora_alpha": alpha}).encode() for alpha in (8, 9))
    assert len(old) == len(new)

    async def scale(there: AdapterLoader) -> float:
        async with await there.load(world.id) as handle:
            (scale,) = {module.scale for module in handle.modules.values()}
            return scale

    world.origin.files = right | {CONFIG: old}
    async with world.loader() as there:
        await interrupted(world, there, 1_500_000)
        world.origin.files = right | {CONFIG: new}
        assert await scale(there) == 9 / 256
    async with world.loader() as there:
        assert await scale(there) == 9 / 256


async def test_what_agrees_is_gone_on_with(world: World, adapters: list[Path]) -> None:
    """The source's word is a fixed ETag alone; of what is here only samples come again."""
    async with world.loader(connections=4) as there:
        await interrupted(world, there, 1_800_000)
        before = len(world.origin.asked)
        await has(there, world.id, adapters[0])
    size = len(world.origin.files[WEIGHTS])
    assert world.origin.bytes_asked(before) < 0.7 * size


@pytest.mark.parametrize("wrong", ["header", "config", "rank"])
async def test_a_stored_adapter_that_is_refused_is_fetched_once_more(
    world: World, adapters: list[Path], wrong: str, tmp_path: Path
) -> None:
    right = contents(adapters[0])
    stored = {
        "header": unknown_dtype_in(adapters[0]),
        "config": right | {CONFIG: right[CONFIG].replace(b'"LORA"', b'"LOHA"')},
        "rank": contents(written(tmp_path / "other", 3, layers=LAYERS - 1, rank=256)),
    }
    world.origin.files = stored[wrong]
    if wrong == "rank":  # of a base with fewer layers, and so with other modules
        world.origin.files = {
            name: data.replace(b"q_proj", b"x_proj") for name, data in stored[wrong].items()
        }
    await published(world)
    assert world.stored() == (1, 0)
    async with world.loader() as there:
        await refused(there, world.id, AdapterError)
        world.origin.files = right
        await has(there, world.id, adapters[0])
    async with world.loader() as there:
        await has(there, world.id, adapters[0])


async def test_a_stored_adapter_that_is_refused_for_good_is_kept(
    world: World, adapters: list[Path]
) -> None:
    """It is for another base; its source still has the same: other loaders go on using it."""
    async with world.loader() as there:
        await has(there, world.id, adapters[0])
    async with world.loader(layers=2) as there:
        await refused(there, world.id, IncompatibleAdapterError)
    assert world.stored() == (1, 0)
    before = world.origin.bytes_asked()
    async with world.loader() as there:
        await has(there, world.id, adapters[0])
    assert world.origin.bytes_asked() - before <= 256 << 10  # the beginning, for its version


async def test_the_refusal_stands_where_the_source_cannot_be_asked(
    world: World, adapters: list[Path]
) -> None:
    async def version(there: AdapterLoader) -> str:
        error = await refused(there, world.id, AdapterFormatError)
        return str(error.key.version)  # type: ignore[attr-defined]

    world.origin.files = unknown_dtype_in(adapters[0])
    await published(world)
    async with world.loader() as there:
        ref = AdapterRef(world.id, revision=await version(there))
    world.origin.status = "503 Service Unavailable"
    async with world.loader(revalidate=60) as there:
        await refused(there, ref, AdapterFormatError)
    assert world.stored() == (1, 0)


async def test_what_comes_back_from_the_cache_is_what_was_planned(
    world: World, adapters: list[Path], tmp_path: Path
) -> None:
    """Evicted, and fetched anew by another loader as other bytes of the same version meanwhile."""
    local, swapped = written(tmp_path / "local", 9, layers=LAYERS, rank=8), tmp_path / "swapped"
    swapped.mkdir()
    files = contents(adapters[0])
    # The first layer's tensors lie where the last one's were, and the other way round.
    files[WEIGHTS] = (
        files[WEIGHTS]
        .replace(b"layers.0.", b"layers.#.")
        .replace(b"layers.3.", b"layers.0.")
        .replace(b"layers.#.", b"layers.3.")
    )
    for name, data in files.items():
        (swapped / name).write_bytes(data)
    async with world.loader(max_slots=1, host_bytes=0) as there:
        async with await there.load(world.id) as handle:
            key = handle.key
        async with await there.load(local):
            pass  # it has the one slot now
        idle = {"present", "read ahead"}
        await until(lambda: key in there.residency() and there.residency()[key].state in idle)
        world.origin.files = files
        for entry in (world.folder / "cache" / "entries").iterdir():
            shutil.rmtree(entry)
        await published(world)
        await has(there, world.id, swapped)


@pytest.mark.parametrize("stored", [False, True], ids=["downloaded", "stored"])
async def test_weights_that_are_refused_are_not_kept(
    world: World, adapters: list[Path], stored: bool
) -> None:
    """Their header is right: only the bytes, once they are copied, show that they are not."""
    right = contents(adapters[0])
    wrong = bytearray(right[WEIGHTS])
    wrong[-400_000:-399_996] = b"\x00\x00\xc0\x7f"  # NaN, as F32
    world.origin.files = right | {WEIGHTS: bytes(wrong)}
    if stored:
        await published(world)
    async with world.loader(check_finite=True) as there:
        error = await refused(there, world.id, AdapterFormatError)
        assert "NaN" in str(error)
        await until(lambda: world.stored() == (0, 0))
        world.origin.files = right
        await has(there, world.id, adapters[0])
    async with world.loader(check_finite=True) as there:
        await has(there, world.id, adapters[0])


@pytest.mark.parametrize("promised", [False, True], ids=["nobody vouched", "the server vouched"])
async def test_a_digest_of_the_caller_is_a_reason_to_fetch_again(
    world: World, adapters: list[Path], promised: bool
) -> None:
    """Stored bytes that only we have hashed are others: the source may have the right ones by now."""
    right = contents(adapters[0])
    digest = hashlib.sha256(right[WEIGHTS]).hexdigest()
    world.origin.promises = promised
    world.origin.files = contents(adapters[1])
    async with world.loader() as there:
        await has(there, world.id, adapters[1])
    world.origin.files = right
    async with world.loader() as there:
        if promised:  # then the version is what was stored, and the digest another one's
            await refused(there, AdapterRef(world.id, digest=digest), IntegrityError)
            await has(there, world.id, adapters[1])
        else:
            await has(there, AdapterRef(world.id, digest=digest), adapters[0])
    assert world.stored() == (1, 0)


async def test_verified_says_whether_anybody_vouched(world: World, adapters: list[Path]) -> None:
    async with world.loader() as there, await there.load(world.id) as handle:
        found = await handle.verified()
        assert found.kind == "transport"
        assert not found.vouched
    world.origin.promises, world.origin.etag = True, '"another"'
    async with world.loader() as there, await there.load(world.id) as handle:
        found = await handle.verified()
        assert found.kind == "sha256"
        assert found.vouched
