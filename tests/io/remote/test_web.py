"""Folders behind URLs: which version is there, by whose word, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import random

import pytest
from fault_server import Asked, Client
from web_folder import CONFIG, INDEX, WEIGHTS, World, refuse, world

from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.core.file_digest import Digest
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    FetchError,
    InvalidAdapterIdError,
    UsageError,
)
from lorax_async.io.http.settings import PublicOnly
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.ports import WEAK

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

DATA = random.Random(7).randbytes(FIRST_BYTES + 10_000)
FILES = {CONFIG: b'{"r": 4}', WEIGHTS: DATA}


async def test_a_folder_is_located_by_two_requests() -> None:
    with world(FILES) as it:
        located = await it.locator.locate(it.ref())
        assert sorted(it.folder.names) == [CONFIG, WEIGHTS]
        spans = {asked.target: asked.span for asked in it.folder.asked}
        assert spans == {
            f"/adapters/one/{CONFIG}": None,
            f"/adapters/one/{WEIGHTS}": (0, FIRST_BYTES),
        }
        assert (located.source, located.scope) == (it.server.url("/adapters/one/"), "")
        config, weights = located.files
        assert (config.role, weights.role) == (CONFIG_FILE, WEIGHTS_FILE)
        assert config.answer is not None
        assert weights.answer is not None
        assert (config.answer.start, config.nbytes) == (FILES[CONFIG], 8)
        assert weights.answer.start == DATA[:FIRST_BYTES]
        assert (weights.nbytes, weights.expected) == (len(DATA), None)
        pinned = it.ref(revision=located.version)
        assert it.locator.recalled(pinned) == (located.source, located.version, "")
        for other in (None, weights.answer.known.etag, "main"):
            assert it.locator.recalled(it.ref(revision=other)) is None


async def test_both_are_asked_for_at_once() -> None:
    """Neither is answered before the other one was asked for."""
    with world(FILES) as it:
        serve = it.folder

        def wait_for_both(asked: Asked, client: Client) -> None:
            while len(serve.asked) < 2 and not client.ending.wait(0.005):
                pass
            serve._serve(asked.target.rpartition("/")[2], asked, client)

        it.folder.instead = {CONFIG: wait_for_both, WEIGHTS: wait_for_both}
        await it.locator.locate(it.ref())


def located_version(run: Run, it: World, **fields: list[str]) -> str:
    """With these fields for the config, or the weights."""
    names = {"config": CONFIG, "weights": WEIGHTS}
    it.folder.fields = {names[which]: lines for which, lines in fields.items()}
    version: str = run(it.locator.locate(it.ref())).version
    return version


def test_a_version_is_what_strong_etags_come_to(run: Run) -> None:
    with world(FILES) as it:
        first = located_version(run, it)
        assert len(first) == 40
        assert located_version(run, it) == first
        it.folder.files[WEIGHTS] = DATA[::-1]
        assert located_version(run, it) == first, "the ETag is the server's word"
        seen = [
            located_version(run, it, weights=['ETag: "another"']),
            located_version(run, it, config=['ETag: "another"']),
            located_version(run, it, weights=['ETag: "another"', "x-amz-version-id: a"]),
            located_version(run, it, weights=['ETag: "another"', "x-amz-version-id: b"]),
            located_version(run, it, weights=['ETag: "\xe9\xff"']),
        ]
        assert len({first, *seen}) == 6
        assert not any(version.startswith(WEAK) for version in [first, *seen])


UNNAMED = [[], ['ETag: W/"v1"'], ["ETag: v1"], ['ETag: ""'], ["ETag: *"], ['ETag: "a" "b"']]


@pytest.mark.parametrize("etag", UNNAMED)
def test_without_a_strong_etag_a_version_is_weak(run: Run, etag: list[str]) -> None:
    """All that was seen of the file counts."""
    dated = [*etag, "Last-Modified: Wed, 21 Oct 2026 07:28:00 GMT"]
    with world(FILES) as it:
        versions = [located_version(run, it, weights=etag)]
        assert located_version(run, it, weights=etag) == versions[0]
        versions.append(located_version(run, it, weights=dated))
        for changed in (b"!" + DATA[1:], DATA + b"!"):
            it.folder.files[WEIGHTS] = changed
            versions.append(located_version(run, it, weights=etag))
        it.folder.files = FILES | {CONFIG: b'{"r": 8}'}
        versions.append(located_version(run, it, weights=etag, config=[]))
        versions.append(located_version(run, it, config=[]))
        assert len(set(versions)) == len(versions)
        assert all(version.startswith(WEAK) for version in versions)


def test_what_a_weak_version_cannot_tell(run: Run) -> None:
    """Of the same size, and different behind its beginning only."""
    with world(FILES) as it:
        version = located_version(run, it, weights=[])
        it.folder.files[WEIGHTS] = DATA[:FIRST_BYTES] + bytes(len(DATA) - FIRST_BYTES)
        assert located_version(run, it, weights=[]) == version


def test_a_token_goes_to_the_server_and_nowhere_else(run: Run) -> None:
    with world(FILES) as it:
        located = run(it.locator.locate(it.ref(token="s3cret-token")))
        sent = [asked.fields.get("authorization") for asked in it.folder.asked]
        assert sent == ["Bearer s3cret-token"] * 2
        assert "s3cret" not in repr(located) + str(located)
        others = [it.ref(token="another"), it.ref(token=None)]
        scopes = [located.scope, *(run(it.locator.locate(ref)).scope for ref in others)]
        assert len(set(scopes)) == 3
        assert scopes[2] == ""
        assert run(it.locator.locate(it.ref(token="s3cret-token", path="/two/"))).scope == scopes[0]
        with world(FILES) as elsewhere:
            there = run(elsewhere.locator.locate(elsewhere.ref(token="s3cret-token")))
            assert there.scope not in scopes, "what one server grants, another one does not"


@pytest.mark.parametrize("token", ["s3cret\r\nHost: other", "s3cret\xe9", "s3cret ", ""])
async def test_what_is_no_token_is_not_sent(token: str) -> None:
    with world(FILES) as it:
        with pytest.raises(UsageError) as raised:
            await it.locator.locate(it.ref(token=token))
        assert "s3cret" not in str(raised.value)
        assert it.folder.asked == []


async def test_a_revision_is_the_version_or_the_etag_of_the_weights() -> None:
    with world(FILES) as it:
        it.folder.fields = {WEIGHTS: ['ETag: "the-weights"']}
        version = (await it.locator.locate(it.ref())).version
        for revision in (version, '"the-weights"', "the-weights"):
            assert (await it.locator.locate(it.ref(revision=revision))).version == version
        for revision in (version[:-1], f"{CONFIG}-1", "main"):
            with pytest.raises(AdapterNotFoundError, match=version) as raised:
                await it.locator.locate(it.ref(revision=revision))
            assert not raised.value.retryable


async def test_a_weak_etag_is_no_revision() -> None:
    with world(FILES) as it:
        it.folder.fields = {WEIGHTS: ['ETag: W/"v1"']}
        version = (await it.locator.locate(it.ref())).version
        assert (await it.locator.locate(it.ref(revision=version))).version == version
        for revision in ('W/"v1"', '"v1"', "v1"):
            with pytest.raises(AdapterNotFoundError):
                await it.locator.locate(it.ref(revision=revision))


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


async def test_what_is_not_there_is_named() -> None:
    with world({WEIGHTS: DATA}) as it, pytest.raises(AdapterNotFoundError, match=CONFIG):
        await it.locator.locate(it.ref())
    with world({CONFIG: b"{}", "adapter_model.bin": b"pickled"}) as it:
        with pytest.raises(AdapterNotFoundError, match=f"neither {WEIGHTS} nor {INDEX}"):
            await it.locator.locate(it.ref())
        assert sorted(it.folder.names) == [CONFIG, WEIGHTS, INDEX], "and nothing else is asked for"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("401 Unauthorized", AccessDeniedError),
        ("403 Forbidden", AccessDeniedError),
        ("500 Internal Server Error", FetchError),
        ("418 I'm a teapot", FetchError),
    ],
)
async def test_other_answers_are_errors(name: str, status: str, error: type[Exception]) -> None:
    with world(FILES) as it:
        it.folder.instead = {name: refuse(status)}
        with pytest.raises(error, match=f"{name} .*status {status[:3]}") as raised:
            await it.locator.locate(it.ref(token="s3cret"))
        assert "s3cret" not in str(raised.value)
        assert INDEX not in it.folder.names


async def test_a_config_has_a_limit() -> None:
    with world(FILES, limits=Limits(max_config_bytes=8)) as it:
        await it.locator.locate(it.ref())
        it.folder.files[CONFIG] += b" "
        with pytest.raises(FetchError, match=f"{CONFIG} has more than the 8 bytes"):
            await it.locator.locate(it.ref())


async def test_the_rules_are_asked() -> None:
    with world(FILES, rules=PublicOnly()) as it:
        with pytest.raises(AccessDeniedError):
            await it.locator.locate(it.ref())
        assert it.server.clients == []


async def test_what_is_in_no_folder_is_not_looked_for_in_one() -> None:
    with world(FILES) as it, pytest.raises(InvalidAdapterIdError, match="no folder behind a URL"):
        await it.locator.locate(AdapterRef("org/name"))
