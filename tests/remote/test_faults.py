"""One adapter is served wrongly: each caller gets one typed error, or it comes right; others load."""

import asyncio
import hashlib
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import fault_server
import pytest
import remote_world
import tiny
from cancellation_sweep import Bench
from disk_cache_world import private_and_whole
from event_loops import LOOPS, until
from fault_server import Asked, Client, Hangup
from leaks import our_threads
from range_downloads import PretendNetwork, engine
from remote_world import Fault, RemoteWorld, Steps, Stored, is_weights, over
from user_loads import contents
from web_folder import CONFIG, WEIGHTS

from lorax_async import AdapterHandle, AdapterLoader, AdapterRef, Verification
from lorax_async.cache.base import CacheKey
from lorax_async.cache.disk_cache import ls
from lorax_async.cache.partials import CHUNK_BYTES, ChunkMap
from lorax_async.config import Checking, Limits
from lorax_async.errors import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterTimeoutError,
    CapacityError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    LoaderClosedError,
    LoraxError,
)
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.http.failures import FileChangedError, RetryPolicy
from lorax_async.http.settings import Timeouts
from lorax_async.remote.base import FIRST_BYTES

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")
settings = remote_world.settings


def part_of(asked: Asked) -> str:
    """Which step of a load asks so."""
    if asked.target.endswith(CONFIG_FILE):
        return "config"
    return "header" if asked.span == (0, FIRST_BYTES) else "body"


def at(part: str, fault: Fault, times: int = 1 << 30) -> Fault:
    """Wrong in that part of a load, so many times; else right."""
    faults = itertools.count()

    def behave(world: RemoteWorld, asked: Asked, client: Client) -> None:
        wrong = part_of(asked) == part and next(faults) < times
        (fault if wrong else RemoteWorld.well)(world, asked, client)

    return behave


async def loads_right(loader: AdapterLoader, world: RemoteWorld, name: str) -> None:
    async with await loader.load(world.ref(name)) as handle:
        tiny.assert_equal_to_file(handle, world.adapters / name)


async def assert_at_rest(loader: AdapterLoader, world: RemoteWorld) -> None:
    """Nobody waits, nothing is held or under way, and what is in the cache is true."""
    bench = Bench(loader, cast(Any, loader.device), "")
    await bench.assert_clean()
    await until(lambda: not any(listed.in_use for listed in ls(world.cache)))
    await asyncio.to_thread(assert_true_cache, world.folder, world.versions)


def assert_true_cache(folder: Path, versions: list[tuple[str, Stored]]) -> None:
    """All is private; entries are whole, partials tell the truth, nothing is half gone."""
    private_and_whole(folder)
    contents = {CacheKey(name, each.version).name: each for name, each in versions}
    for entry in folder.glob("entries/*"):
        stored = contents[entry.name]
        assert (entry / CONFIG_FILE).read_bytes() == stored.config
        assert (entry / WEIGHTS_FILE).read_bytes() == stored.weights
    for map_file in folder.glob("partials/*/*.chunks"):
        stored = contents[map_file.parent.name.partition(".")[0]]
        true = stored.config if map_file.stem == CONFIG_FILE else stored.weights
        written = map_file.with_suffix("").read_bytes()
        chunk_map = ChunkMap.decoded(map_file.read_bytes(), len(written))
        assert chunk_map is not None
        for start, stop in chunk_map.spans():
            assert written[start:stop] == true[start:stop], (map_file.name, start)


def begin(world: RemoteWorld, asked: Asked, client: Client, etag: str | None = None) -> bytes:
    """The head of a good answer; returns the body that should follow."""
    data, tag = world.content(asked.target)
    return fault_server.begin(asked, client, data, f"ETag: {etag or tag}")


def of_body(change: Callable[[bytes], bytes], etag: str | None = None) -> Fault:
    """A good head, and then another body."""

    def answer(world: RemoteWorld, asked: Asked, client: Client) -> None:
        client.send(change(begin(world, asked, client, etag)))

    return answer


def half_and(then: Callable[[Client], None]) -> Fault:
    def answer(world: RemoteWorld, asked: Asked, client: Client) -> None:
        body = begin(world, asked, client)
        client.send(body[: len(body) // 2])
        then(client)

    return answer


def of_all(change: Callable[[bytes], bytes], *, told: bool = False) -> Fault:
    """All of the file in place of a range, with its length or until the connection ends."""

    def answer(world: RemoteWorld, asked: Asked, client: Client) -> None:
        data, etag = world.content(asked.target)
        length = [f"Content-Length: {len(data)}", f"ETag: {etag}"]
        client.head("200 OK", *(length if told else ["Connection: close"]))
        client.send(change(data))
        if not told:
            raise Hangup

    return answer


def _reset(client: Client) -> None:
    time.sleep(0.02)
    client.reset()


def _flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


truncated, reset, stalled = half_and(Client.hang_up), half_and(_reset), half_and(Client.stall)
wrong_bytes, other_etag = of_body(_flipped), of_body(bytes, '"another"')
not_finite = of_body(lambda body: b"\xff" * len(body))
more_than_said = of_body(lambda body: body + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n!")
short_body = of_all(lambda data: data[: len(data) // 2])
long_body = of_all(lambda data: data + b" and then some")
whole_body, whole_in_place_of_range = of_all(bytes), of_all(bytes, told=True)


def wrong_range(world: RemoteWorld, asked: Asked, client: Client) -> None:
    data, etag = world.content(asked.target)
    assert asked.span is not None
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start + 1, stop + 1, len(data), f"ETag: {etag}")
    client.send(data[start:stop])


def other_size(world: RemoteWorld, asked: Asked, client: Client) -> None:
    """One byte more than there was."""
    data, etag = world.content(asked.target)
    fault_server.answer(asked, client, data + b"!", f"ETag: {etag}")


def silent(world: RemoteWorld, asked: Asked, client: Client) -> None:
    client.stall()


def dripping(world: RemoteWorld, asked: Asked, client: Client) -> None:
    """One byte per second."""
    client.drip(begin(world, asked, client), 1.0)


def status(line: str, *fields: str) -> Fault:
    return lambda world, asked, client: client.head(line, "Content-Length: 0", *fields)


def refused_range(world: RemoteWorld, asked: Asked, client: Client) -> None:
    """416, and yet it says that it has these bytes."""
    size = len(world.content(asked.target)[0])
    client.head("416 No", "Content-Length: 0", f"Content-Range: bytes */{size}")


PARTS = ("config", "header", "body")
SECRET = "hf_swordfish"
METADATA = "169.254.169.254"


@pytest.fixture
def world(tmp_path: Path, settings: dict[str, Any]) -> Iterator[RemoteWorld]:
    with make_world(tmp_path, **settings) as world:
        yield world


@contextmanager
def make_world(folder: Path, **settings: Any) -> Iterator[RemoteWorld]:
    """It has "bad" and "good"."""
    with RemoteWorld(folder, **settings) as world:
        world.stock("bad")
        world.stock("good", 1)
        yield world


async def right_beside(loader: AdapterLoader, world: RemoteWorld, *names: str) -> None:
    """These load right, at once, and then nothing is under way."""
    loads = (loads_right(loader, world, name) for name in names)
    await asyncio.gather(*loads)
    await assert_at_rest(loader, world)


async def fails(world: RemoteWorld, ref: AdapterRef | None = None, **settings: Any) -> LoraxError:
    """The error of a load of "bad" by two callers, beside one of "good"; and nothing is left."""
    async with over(world, **settings) as loader:
        loading = [loader.load(ref or world.ref("bad")) for _ in range(2)]
        good = loads_right(loader, world, "good")
        first, second, beside = await asyncio.gather(*loading, good, return_exceptions=True)
        assert beside is None, beside
        assert isinstance(first, LoraxError), first
        assert type(first) is type(second)
        assert first is not second
        await assert_at_rest(loader, world)
    return first


async def comes_right(world: RemoteWorld) -> None:
    async with over(world) as loader:
        await right_beside(loader, world, "bad", "good", "bad")
        assert len(ls(world.cache)) == 2


@dataclass(frozen=True)
class Case:
    """What is wrong, and what every caller is told."""

    fault: Fault
    kind: type[LoraxError]
    words: str
    retryable: bool = True
    retry_after: float | None = None
    stage: str = "fetch"
    promises: bool = True
    verify: Checking = "stream"
    hurried: bool = False


malformed = partial(Case, kind=AdapterFormatError, retryable=False, stage="verify", promises=False)
CASES = {
    # the config
    "config truncated": Case(at("config", truncated), FetchError, "closed the connection"),
    "config short": Case(at("config", short_body), IntegrityError, "its source named"),
    "config short, no promise": malformed(at("config", short_body), words="adapter_config"),
    "config long": Case(at("config", long_body), IntegrityError, "its source named"),
    "config wrong": Case(at("config", wrong_bytes), IntegrityError, "sha256"),
    "config 401": Case(at("config", status("401 No")), AccessDeniedError, "401", retryable=False),
    "config 404": Case(at("config", status("404 No")), AdapterNotFoundError, "404", False),
    "config 429 a day": Case(
        at("config", status("429 No", "Retry-After: 86400")), FetchError, "429", retry_after=86_400
    ),
    # the beginning of the weights
    "header short": Case(at("header", short_body), IntegrityError, "its source named"),
    "header short, no promise": malformed(at("header", short_body), words="the file ends"),
    "header of another size": Case(at("header", other_size), IntegrityError, "its source named"),
    "header wrong range": Case(at("header", wrong_range), IntegrityError, "were requested"),
    "header 416": Case(at("header", status("416 No")), IntegrityError, "shorter"),
    # the rest of the weights
    "body truncated": Case(at("body", truncated), FetchError, "closed the connection"),
    "body wrong": Case(at("body", wrong_bytes), IntegrityError, "sha256", verify="before_use"),
    "body wrong, not finite": Case(at("body", not_finite), IntegrityError, "sha256"),
    "body of another ETag": Case(at("body", other_etag), FileChangedError, "changed"),
    "body of another size": Case(at("body", other_size), FileChangedError, "changed"),
    "body wrong range": Case(at("body", wrong_range), IntegrityError, "were requested"),
    "body 416": Case(at("body", status("416 No")), IntegrityError, "shorter"),
    "body 416 of what it has": Case(at("body", refused_range), FetchError, "refuses a range"),
    # what stalls or drips ends by itself
    **{
        f"{part} {fault.__name__}": Case(at(part, fault), FetchTimeoutError, "", hurried=True)
        for part, fault in (("config", dripping), ("header", silent), ("body", silent))
    },
    "body stalled": Case(at("body", stalled), FetchTimeoutError, "", hurried=True),
}
SLOW = [pytest.mark.slow]
HURRIED = Timeouts(read=1.5, slowest=1_000, over=1.2, idle=5.0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW * case.hurried) for name, case in CASES.items()]
)
async def test_a_lasting_fault_is_one_typed_error(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    http = engine(timeouts=HURRIED, retries=RetryPolicy(attempts=2)) if case.hurried else None
    with make_world(tmp_path, verify=case.verify, http=http) as world:
        world.locator.promises = case.promises
        world.faults["bad"] = case.fault
        error = await fails(world)
        assert type(error) is case.kind, error
        assert case.words in error.problem
        assert (error.id, error.stage, error.retryable) == ("bad", case.stage, case.retryable)
        assert (error.attempt, error.retry_after) == (1, case.retry_after)
        assert error.story
        partials = [listed.is_partial for listed in ls(world.cache)]
        assert partials.count(False) == 1
        if issubclass(case.kind, IntegrityError):
            assert not any(partials), "of what may be wrong nothing is kept"
        if case.retry_after is not None:
            asked = [each for each in world.asked_of("bad") if part_of(each) == "config"]
            assert len(asked) == 1, "nobody is asked again before the time is over"
        world.faults.clear()
        async with over(world) as loader:
            await right_beside(loader, world, "bad")


PASSING: dict[str, Fault] = {
    "config 500 twice": at("config", status("500 No"), 2),
    "config without length": at("config", whole_body),
    "header reset once": at("header", reset, 1),
    "header more than said": at("header", more_than_said),
    "body truncated twice": at("body", truncated, 2),
    "body 429 now": at("body", status("429 No", "Retry-After: 0"), 2),
    "body more than said": at("body", more_than_said),
    "ranges, and then no ranges": at("body", whole_in_place_of_range),
    "no ranges": whole_in_place_of_range,
    "no ranges, no promise": whole_in_place_of_range,
}


@pytest.mark.parametrize("name", PASSING)
async def test_what_passes_is_overcome(world: RemoteWorld, name: str) -> None:
    world.locator.promises = "no promise" not in name
    world.faults["bad"] = PASSING[name]
    await comes_right(world)


ETAGS = [
    *(
        '""a" or "b"',
        "../../x",
        '"../../../../etc/passwd"',
        '"' + "x" * 8_000 + '"',
        '"\xe9\xff\xa0"',
    ),
    *('"%0d%0aX-Injected: 1"', '"a\tb"', '""', 'W/"v1"', '"a", "b"', "*"),
    '"a"\r\nX-Injected: "b"',
]


@pytest.mark.parametrize("etag", ETAGS, ids=lambda etag: repr(etag)[:16])
async def test_etags_are_only_sent_back(world: RemoteWorld, etag: str, tmp_path: Path) -> None:
    """On the wire CR and LF end the field: what follows is another field of the response."""
    world.faults["bad"] = of_body(bytes, etag)
    await comes_right(world)
    assert {each.name for each in tmp_path.iterdir()} == {"cache", "adapters"}
    sent = {each.fields.get("if-range") for each in world.asked_of("bad")} - {None}
    assert sent == (set() if etag.startswith("W/") else {etag.partition("\r")[0]})
    assert not any("x-injected" in each.fields for each in world.server.asked)


HEADER_LIMIT = 350_000
LIMITS = Limits(max_header_bytes=HEADER_LIMIT, max_adapter_bytes=780_000)


def padded_header(weights: bytes) -> bytes:
    """A good one, but for spaces after it: a byte over the limit of this test."""
    size = int.from_bytes(weights[:8], "little")
    padding = b" " * (HEADER_LIMIT + 1 - size)
    header = struct.pack("<Q", HEADER_LIMIT + 1) + weights[8 : 8 + size]
    return header + padding + weights[8 + size :]


def longer(data: bytes) -> bytes:
    return data.ljust(900_000)


def huge_header(_: bytes) -> bytes:
    return struct.pack("<Q", 20_000_000) + b"{" + b" " * 20_000_100


NONE, BOTH = set[str](), {CONFIG, WEIGHTS}
TOO_LARGE: dict[str, tuple[str, Callable[[bytes], bytes], str, set[str]]] = {
    "config": (CONFIG, longer, "max_config_bytes", NONE),
    "config, no promise": (CONFIG, longer, "more than the 262,144 bytes", BOTH),
    "weights": (WEIGHTS, longer, "max_adapter_bytes", NONE),
    "weights, no promise": (WEIGHTS, longer, "max_adapter_bytes", BOTH),
    "a header over the limit": (WEIGHTS, padded_header, "header", BOTH),
    "a huge header, no promise": (WEIGHTS, huge_header, "max_adapter_bytes", BOTH),
}
"""Which file is too large and how, what the error says, and the files that may be requested."""


@pytest.mark.parametrize("settings", [{"limits": LIMITS}], ids=[""])
@pytest.mark.parametrize("name", TOO_LARGE)
async def test_what_is_too_large_is_not_fetched(world: RemoteWorld, name: str) -> None:
    file, make, words, asked = TOO_LARGE[name]
    world.locator.promises = "no promise" not in name
    files = contents(world.adapters / "bad")
    files[file] = make(files[file])
    world.put("bad", files[CONFIG], files[WEIGHTS])
    error = await fails(world, limits=LIMITS)
    cut_off = name == "config, no promise"  # its size is known from the bytes that came
    assert type(error) is (FetchError if cut_off else AdapterFormatError)
    assert words in error.problem
    assert (error.stage, error.retryable) == ("fetch" if cut_off else "verify", False)
    assert len(ls(world.cache)) == 1
    assert {each.target.split("/")[-1] for each in world.asked_of("bad")} <= asked
    assert set(world.spans_of("bad")) <= {(0, FIRST_BYTES)}


async def test_a_cache_that_cannot_hold_it_says_so_at_once(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path, cache_bytes=500_000) as world:
        world.stock("bad", rank=256)
        world.stock("good", 1, rank=100)
        async with over(world) as loader:
            await right_beside(loader, world, "good")
            with pytest.raises(CapacityError, match=r"do not fit.*raise its budget") as caught:
                await loader.load(world.ref("bad"))
            assert (caught.value.stage, caught.value.retryable) == ("fetch", False)
            assert world.spans_of("bad") == [(0, FIRST_BYTES)]
            (stays,) = (listed for listed in ls(world.cache) if not listed.is_partial)
            assert stays.nbytes > 300_000
            await right_beside(loader, world, "good")


@pytest.mark.parametrize("part", PARTS)
async def test_nobody_is_led_to_a_private_address(tmp_path: Path, part: str) -> None:
    """Only the world's server can be connected to."""
    network = PretendNetwork(names={host: [host] for host in ("127.0.0.1", METADATA)})
    http = engine(network=network)
    with make_world(tmp_path, http=http) as world:
        network.ports["127.0.0.1"] = world.server.port
        away = status("302 Found", f"Location: http://{METADATA}/latest/meta-data")
        world.faults["bad"] = at(part, away)
        error = await fails(world, AdapterRef("bad", source="hub", token=SECRET))
    assert type(error) is AccessDeniedError
    assert "not public" in error.problem
    assert (error.stage, error.retryable) == ("fetch", False)
    told = f"{error} {error!r} {error.story} {error.key!r}"
    assert "meta-data" not in told
    assert SECRET not in told
    assert set(network.connected) == {"127.0.0.1"}


def is_poisoned(handle: AdapterHandle) -> bool:
    try:
        assert handle.modules
    except IntegrityError:
        return True
    return False


async def test_a_caller_that_holds_wrong_bytes_already_gets_the_error(world: RemoteWorld) -> None:
    """The digest comes late: it has the adapter's first layers by then."""
    go_on = threading.Event()

    def late(world: RemoteWorld, asked: Asked, client: Client) -> None:
        body = begin(world, asked, client)
        client.send(body[:-1])
        assert go_on.wait(20)
        client.send(_flipped(body)[-1:])

    world.faults["bad"] = at("body", late)
    async with over(world) as loader:
        async with loader.stream(world.ref("bad")) as handle:
            await handle.layer_ready(0)
            go_on.set()
            with pytest.raises(IntegrityError, match="sha256"):
                await handle.verified()
            await until(lambda: is_poisoned(handle))
        await assert_at_rest(loader, world)
        assert not ls(world.cache)
        world.faults.clear()
        await right_beside(loader, world, "good", "bad")


@contextmanager
def other_bytes(world: RemoteWorld, name: str, *, silent: bool) -> Iterator[Callable[[], object]]:
    """Yield what gives its weights in the cache another last byte, and the same size and date.

    If `silent`, by a page that is to be written to the disk anyway: no time of the file tells.
    """
    content = world.locator.there[name].weights
    weights_files = (world.folder / "entries").glob(f"*/{WEIGHTS}")
    (path,) = (file for file in weights_files if file.read_bytes() == content)
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:

        def write(content: bytes) -> None:
            memory[:] = content
            if path.stat().st_mtime_ns != before.st_mtime_ns:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        if silent:
            write(content)
        yield partial(write, _flipped(content))


@pytest.mark.parametrize("verify", ["stream", "before_use", "always"])
async def test_an_unpromised_digest_is_marked_as_such(tmp_path: Path, verify: Checking) -> None:
    """Later on these bytes are what counts: others in their place are noticed."""

    async def notices(loader: AdapterLoader, world: RemoteWorld) -> None:
        healthy = asyncio.create_task(loads_right(loader, world, "good"))
        with pytest.raises(IntegrityError, match="changed"):  # or after it is resident
            async with await loader.load(world.ref("bad")) as handle:
                await handle.verified()
        await healthy
        await assert_at_rest(loader, world)
        await right_beside(loader, world, "bad")

    with make_world(tmp_path, verify=verify) as world:
        world.locator.promises = False
        own = hashlib.sha256(world.locator.there["bad"].weights).hexdigest()
        async with over(world) as loader:
            async with await loader.load(world.ref("bad")) as handle:
                tiny.assert_equal_to_file(handle, world.adapters / "bad")
                assert await handle.verified() == Verification("transport", own)
            await right_beside(loader, world, "good")
        for listed in ls(world.cache):
            assert listed.record is not None
            assert listed.record.weights.digest.kind == "transport"
        with other_bytes(world, "bad", silent=verify == "always") as alter:
            async with over(world) as loader:
                await loads_right(loader, world, "bad")
                await loader.unload(world.ref("bad"))
                alter()
                if verify == "always":  # hashed before it is opened: as if it were not there
                    await loads_right(loader, world, "bad")
                else:
                    await notices(loader, world)
        with other_bytes(world, "bad", silent=verify == "always") as alter:
            async with over(world) as loader:
                await loads_right(loader, world, "bad")
            alter()
            async with over(world) as loader:
                await notices(loader, world)


async def test_half_of_an_adapter_is_not_served(world: RemoteWorld) -> None:
    """The origin goes down in the midst of a download: a partial is no version to fall back to."""
    world.faults["bad"] = at("body", status("503 No"))
    old = replace(world.ref("bad"), allow_stale=True)
    pinned = replace(old, revision=world.locator.there["bad"].version)
    async with over(world) as loader:
        with pytest.raises(FetchError, match="503"):
            await loader.load(world.ref("bad"))
        assert [listed.is_partial for listed in ls(world.cache)] == [True]
        world.locator.error = FetchError("it is down")
        for ref in (old, pinned):
            with pytest.raises(FetchError, match="down"):
                await loader.load(ref)
        world.locator.error = None
        world.faults.clear()
        async with await loader.load(pinned) as handle:
            tiny.assert_equal_to_file(handle, world.adapters / "bad")
        await assert_at_rest(loader, world)


async def test_the_next_load_goes_on_where_the_deadline_was(world: RemoteWorld) -> None:
    """Of two chunks the second one does not come in time."""
    world.stock("two-chunks", rank=168)
    size = len(world.locator.there["two-chunks"].weights)
    assert 2 * CHUNK_BYTES - 10_000 < size < 2 * CHUNK_BYTES

    def held(world: RemoteWorld, asked: Asked, client: Client) -> None:
        if is_weights(asked) and asked.span and asked.span[1] > CHUNK_BYTES:
            client.stall()
        world.well(asked, client)

    world.faults["two-chunks"] = held
    async with over(world) as loader:
        with pytest.raises(AdapterTimeoutError):
            await loader.load(world.ref("two-chunks"), timeout=1.0)
        await assert_at_rest(loader, world)
        (left,) = ls(world.cache)
        assert left.is_partial
        begun = len(world.spans_of("two-chunks"))
        world.faults.clear()
        await loads_right(loader, world, "two-chunks")
        first, *rest = world.spans_of("two-chunks")[begun:]
        assert first == (0, CHUNK_BYTES), "the header is asked for again, and no more of it"
        assert sum(stop - start for start, stop in rest) == size - CHUNK_BYTES


SWEPT_RANK = 100
"""Some 300 KB: ranges are asked for after the first."""

LEAST = {"download": 7, "resumed": 7, "cached": 2}
"""Suspensions: of a download, at least for the version, the beginning, two places, bytes, the end."""


async def part_of_it(world: RemoteWorld, ref: AdapterRef) -> None:
    """Its first bytes are on the disk, and no more come."""
    world.faults[ref.text] = at("body", silent)
    async with over(world) as loader:
        loading = asyncio.create_task(loader.load(ref))
        await until(lambda: len(world.spans_of(ref.text)) > 1)
        loading.cancel()
        await asyncio.wait([loading])
        await assert_at_rest(loader, world)
    del world.faults[ref.text]
    assert any(listed.is_partial for listed in ls(world.cache))


async def ended_at(world: RemoteWorld, ref: AdapterRef, steps: Steps, step: int, end: str) -> bool:
    """Cancel a load at that step, or close its loader; whether there was one. Then it loads right."""
    loader, closing = over(world), list[asyncio.Task[None]]()

    def act() -> None:
        if end == "closed":
            closing.append(asyncio.create_task(loader.close(timeout=10)))
        else:
            loading.cancel()

    async def loads(loader: AdapterLoader) -> None:
        async with await loader.load(ref) as handle:
            tiny.assert_equal_to_file(handle, world.adapters / "a")
        await assert_at_rest(loader, world)

    async with loader:
        steps.expect(step, act)
        loading = asyncio.create_task(loader.load(ref))
        await asyncio.wait([loading])
        if not loading.cancelled() and loading.exception() is None:
            loading.result().release()
        assert loading.cancelled() or isinstance(loading.exception(), LoaderClosedError | None)
        reached = steps.met
        if end == "given up":
            await assert_at_rest(loader, world)
            await loads(loader)
        await asyncio.gather(*closing)
    if end == "closed":
        assert not {name for name in our_threads() if "http" not in name and "remote" not in name}
        async with over(world) as other:
            await loads(other)
    return reached


SWEEPS = [
    *(("asyncio", "download", "given up"), ("asyncio", "cached", "given up")),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("uvloop", "download", "given up"),
            *((loop, "download", "closed") for loop in LOOPS),
            *(("asyncio", "resumed", "given up"), ("uvloop", "resumed", "closed")),
            ("asyncio", "cached", "closed"),
        )
    ),
]


@pytest.mark.parametrize(("anyio_backend", "what", "end"), SWEEPS, indirect=["anyio_backend"])
async def test_it_ends_at_every_step(tmp_path: Path, what: str, end: str) -> None:
    with RemoteWorld(tmp_path, cache_bytes=1_000_000) as world:
        contents = tiny.files(tiny.write(world.adapters / "a", 0, SWEPT_RANK))
        step, missed, steps = 0, 0, Steps(world.source)
        while missed < 2:  # how often threads are waited for depends on how quick they are
            step += 1
            ref = world.put(f"{what}-{step}", *contents)
            if what == "cached":
                async with over(world) as loader:
                    (await loader.load(ref)).release()
            if what == "resumed":
                await part_of_it(world, ref)
            missed = 0 if await ended_at(world, ref, steps, step, end) else missed + 1
        assert step - 2 >= LEAST[what]
