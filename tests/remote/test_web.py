"""Folders behind URLs: which version is there, by whose word, and what is refused."""

import base64
import hashlib
import json
import random
import threading
from collections.abc import Iterator

import pytest
from fault_server import Asked, Client, FaultServer
from range_downloads import Anywhere, Engine, LoopbackOnly
from tiny_loaders import fails
from web_folder import CONFIG, INDEX, WEIGHTS, Folder, Locator, World, refuse, world

from lorax_async import AdapterRef, Limits, errors
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.http.settings import HttpSettings, PublicOnly
from lorax_async.remote.base import FIRST_BYTES, WEAK
from lorax_async.remote.web import WebBackend

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

DATA = random.Random(7).randbytes(FIRST_BYTES + 10_000)
FILES = {CONFIG: b'{"r": 4}', WEIGHTS: DATA}


@pytest.fixture
def it() -> Iterator[World]:
    with world(FILES) as it:
        yield it


async def test_a_folder_is_located_by_two_requests(it: World) -> None:
    located = await it.locator.locate(it.ref())
    assert sorted(it.folder.names) == [CONFIG, WEIGHTS]
    spans = {asked.target: asked.span for asked in it.folder.asked}
    assert spans == {f"/adapters/one/{CONFIG}": None, f"/adapters/one/{WEIGHTS}": (0, FIRST_BYTES)}
    assert (located.source, located.scope) == (it.server.url("/adapters/one/"), "")
    config, weights = located.files
    assert (config.name, weights.name) == (CONFIG_FILE, WEIGHTS_FILE)
    assert config.answer is not None
    assert weights.answer is not None
    assert (config.answer.start, config.nbytes) == (FILES[CONFIG], 8)
    assert weights.answer.start == DATA[:FIRST_BYTES]
    assert (weights.nbytes, weights.expected) == (len(DATA), None)
    assert it.locator.is_version(located.version)
    assert not any(map(it.locator.is_version, (weights.answer.validators.etag or "", "main")))


async def test_both_are_asked_for_at_once(it: World) -> None:

    def wait_for_both(asked: Asked, client: Client) -> None:
        while len(it.folder.asked) < 2 and not client.ending.wait(0.005):
            pass
        it.folder.serve(asked, client)

    it.folder.instead = {CONFIG: wait_for_both, WEIGHTS: wait_for_both}
    await it.locator.locate(it.ref())


async def located_version(it: World, **fields: list[str]) -> str:
    """With these fields for the config, or the weights."""
    names = {"config": CONFIG, "weights": WEIGHTS}
    it.folder.fields = {names[which]: lines for which, lines in fields.items()}
    version: str = (await it.locator.locate(it.ref())).version
    return version


async def test_a_version_is_what_strong_etags_come_to(it: World) -> None:
    first = await located_version(it)
    assert len(first) == 40
    assert await located_version(it) == first
    it.folder.files[WEIGHTS] = DATA[::-1]
    assert await located_version(it) == first, "the ETag is the server's word"
    seen = [
        await located_version(it, weights=['ETag: "another"']),
        await located_version(it, config=['ETag: "another"']),
        await located_version(it, weights=['ETag: "another"', "x-amz-version-id: a"]),
        await located_version(it, weights=['ETag: "another"', "x-amz-version-id: b"]),
        await located_version(it, weights=['ETag: "\xe9\xff"']),
    ]
    assert len({first, *seen}) == 6
    assert not any(version.startswith(WEAK) for version in [first, *seen])


UNNAMED = [[], ['ETag: W/"v1"'], ["ETag: v1"], ['ETag: ""'], ["ETag: *"], ['ETag: "a" "b"']]


@pytest.mark.parametrize("etag", UNNAMED)
async def test_without_a_strong_etag_a_version_is_weak(etag: list[str]) -> None:
    """All that was seen of the file counts; what differs behind its beginning only does not."""
    dated = [*etag, "Last-Modified: Wed, 21 Oct 2026 07:28:00 GMT"]
    unseen = DATA[:FIRST_BYTES] + bytes(len(DATA) - FIRST_BYTES)
    with world(FILES) as it:
        versions = [await located_version(it, weights=etag)]
        it.folder.files[WEIGHTS] = unseen
        assert await located_version(it, weights=etag) == versions[0]
        versions.append(await located_version(it, weights=dated))
        for changed in (b"!" + DATA[1:], DATA + b"!"):
            it.folder.files[WEIGHTS] = changed
            versions.append(await located_version(it, weights=etag))
        it.folder.files = FILES | {CONFIG: b'{"r": 8}'}
        versions.append(await located_version(it, weights=etag, config=[]))
        versions.append(await located_version(it, config=[]))
        assert len(set(versions)) == len(versions)
        assert all(version.startswith(WEAK) for version in versions)


async def test_a_token_goes_to_the_server_and_nowhere_else() -> None:
    with world(FILES) as it, world(FILES) as elsewhere:
        refs = {
            it: [it.ref(token="s3cret-token"), it.ref(token="another"), it.ref()],
            elsewhere: [elsewhere.ref(token="s3cret-token")],
        }
        located = [await at.locator.locate(ref) for at, each in refs.items() for ref in each]
        sent = [asked.fields.get("authorization") for asked in it.folder.asked[:2]]
        assert sent == ["Bearer s3cret-token"] * 2
        assert "s3cret" not in f"{located!r} {located}"
        scopes = [each.scope for each in located]
        assert len(set(scopes)) == 4, "what one server grants, another one does not"
        assert scopes[2] == ""
        again = await it.locator.locate(it.ref(token="s3cret-token", path="/two/"))
        assert again.scope == scopes[0]


@pytest.mark.parametrize(
    "token", ["s3cret\r\nHost: other", "s3cret\xe9", "s3cret ", "a s3cret", ""]
)
async def test_what_is_no_token_is_not_sent(it: World, token: str) -> None:
    error = await fails(it.locator.locate(it.ref(token=token)), errors.UsageError)
    assert "s3cret" not in str(error)
    assert it.folder.asked == []


async def test_a_digest_of_the_file_is_taken_from_the_fields() -> None:
    digest = hashlib.sha256(DATA)
    told = base64.b64encode(digest.digest()).decode()
    expected = Digest("sha256", digest.hexdigest())
    with world(FILES) as it:
        for line, found in (
            (f"Repr-Digest: sha-256=:{told}:", expected),
            (f"Content-Digest: sha-256=:{told}:", None),
            (f"x-amz-checksum-sha256: {told}\r\nx-amz-checksum-type: FULL_OBJECT", expected),
            (f"x-amz-checksum-sha256: {told}-2", None),
        ):
            it.folder.fields = {WEIGHTS: ['ETag: "v1"', line]}
            config, weights = (await it.locator.locate(it.ref())).files
            assert (config.expected, weights.expected) == (None, found)


async def test_a_config_has_a_limit() -> None:
    with world(FILES, limits=Limits(max_config_bytes=8)) as it:
        await it.locator.locate(it.ref())
        it.folder.files[CONFIG] += b" "
        with pytest.raises(errors.FetchError, match=f"{CONFIG} has more than the 8 bytes"):
            await it.locator.locate(it.ref())


async def test_what_is_not_there_is_named() -> None:
    with world({WEIGHTS: DATA}) as it, pytest.raises(errors.AdapterNotFoundError, match=CONFIG):
        await it.locator.locate(it.ref())
    with world({CONFIG: b"{}", "model.safetensors": DATA}) as it:
        located = it.locator.locate(it.ref())
        await fails(located, errors.AdapterNotFoundError, f"has no {WEIGHTS}; nothing else")
    with world({CONFIG: b"{}", "adapter_model.bin": b"pickled"}) as it:
        with pytest.raises(errors.AdapterNotFoundError, match=r"adapter_model.bin only.*convert"):
            await it.locator.locate(it.ref())
        assert it.folder.asked[-1].fields["range"] == "bytes=0-0", "it was only looked for"


@pytest.mark.parametrize("content", [b"{}", b" " * (FIRST_BYTES + 1)])
async def test_an_index_in_place_of_the_weights_is_refused(content: bytes) -> None:
    """Whatever it says, and however long it is."""
    with world({CONFIG: b"{}", INDEX: content}) as it:
        await fails(it.locator.locate(it.ref()), errors.UnsupportedAdapterError, INDEX)
        it.folder.files[WEIGHTS] = b"weights"
        it.folder.asked.clear()
        await it.locator.locate(it.ref())
        assert sorted(it.folder.names) == [CONFIG, WEIGHTS], "which are asked for alone"


HEADER = json.dumps({"a": {"dtype": "U8", "shape": [400_000], "data_offsets": [0, 400_000]}})
WITH_HEADER = len(HEADER).to_bytes(8, "little") + HEADER.encode() + bytes(400_000)


class Hurried(threading.local):
    """A clock by which everything takes long. How often other threads look at theirs is chance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.2
        return self.now


@pytest.mark.parametrize(
    ("etag", "least"),
    [('"v1"', 8 + len(HEADER)), *((tag, FIRST_BYTES) for tag in (None, 'W/"weak"', "unquoted"))],
)
async def test_what_is_part_of_the_version_is_waited_for(etag: str | None, least: int) -> None:
    """A slow answer ends with the header, unless its first bytes are all that tells the version."""
    folder = Folder({CONFIG: b"{}", WEIGHTS: WITH_HEADER})
    folder.fields = {name: [f"ETag: {etag}"] if etag else [] for name in folder.files}
    with (
        FaultServer(b"", folder) as server,
        Engine(HttpSettings(), network=LoopbackOnly(), clock=Hurried()) as asking,
    ):
        locator = Locator(WebBackend(asking, Anywhere(), Limits()))
        _, weights = (await locator.locate(AdapterRef(server.url("/folder/")))).files
        assert weights.answer is not None
        found = len(weights.answer.start)
    assert least <= found <= (FIRST_BYTES - 1 if least < FIRST_BYTES else FIRST_BYTES)


@pytest.mark.parametrize("weak", [False, True])
async def test_a_revision_is_the_version_or_a_strong_etag(it: World, weak: bool) -> None:
    etag = 'W/"the-weights"' if weak else '"the-weights"'
    it.folder.fields = {WEIGHTS: [f"ETag: {etag}"]}
    version = (await it.locator.locate(it.ref())).version
    assert (await it.locator.locate(it.ref(revision=version))).version == version
    for revision in (etag, '"the-weights"', "the-weights", version[:-1], f"{CONFIG}-1", "main"):
        if not weak and "the-weights" in revision:
            found = await it.locator.locate(it.ref(revision=revision))
            assert found.version == version
            continue
        with pytest.raises(errors.AdapterNotFoundError, match=version) as raised:
            await it.locator.locate(it.ref(revision=revision))
        assert not raised.value.retryable


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("status", [401, 403, 500, 418])
async def test_other_answers_are_errors(it: World, name: str, status: int) -> None:
    it.folder.instead = {name: refuse(f"{status} No")}
    with pytest.raises(errors.FetchError, match=f"{name} .*status {status}") as raised:
        await it.locator.locate(it.ref(token="s3cret"))
    assert isinstance(raised.value, errors.AccessDeniedError) is (status in {401, 403})
    assert "s3cret" not in str(raised.value)
    assert INDEX not in it.folder.names


async def test_what_is_not_allowed_is_not_asked_for() -> None:
    with world(FILES, rules=PublicOnly()) as it:
        await fails(it.locator.locate(it.ref()), errors.AccessDeniedError)
        assert it.server.clients == []
