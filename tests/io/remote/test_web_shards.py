"""Folders whose weights are several files: their version is that of all of them."""

from __future__ import annotations

import json

import pytest
from web_folder import CONFIG, INDEX, WEIGHTS, world

from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, FileRole
from lorax_async.errors import AdapterFormatError, AdapterNotFoundError, FetchError
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.web import MAX_INDEX_BYTES, MAX_SHARDS

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def shard(number: int, count: int = 3) -> str:
    return f"adapter_model-{number:05d}-of-{count:05d}.safetensors"


def index(*names: str) -> bytes:
    """As transformers and PEFT's neighbours write it."""
    weight_map = {
        f"base_model.model.layers.{n}.lora_A.weight": name for n, name in enumerate(names)
    }
    return json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}, indent=2).encode()


ROLES = [FileRole("weights", n) for n in (1, 2, 3)]
SHARDS = {shard(n): bytes([n]) * (FIRST_BYTES + n) for n in (1, 2, 3)}
FILES = {CONFIG: b"{}", INDEX: index(shard(1), shard(2), shard(2), shard(3)), **SHARDS}


async def test_the_files_that_an_index_names() -> None:
    with world(FILES) as it:
        located = await it.locator.locate(it.ref(token="t0ken"))
        assert [file.role for file in located.files] == [CONFIG_FILE, INDEX_FILE]
        assert located.files[1].answer is not None
        assert located.files[1].answer.start == FILES[INDEX]
        asked = len(it.folder.asked)
        files = await it.locator.shards(located, ROLES)
        assert len(it.folder.asked) == asked == 6
        assert [file.role for file in files] == ROLES
        for file, (name, data) in zip(files, SHARDS.items(), strict=True):
            assert file.target.name == name
            assert file.answer is not None
            assert (file.nbytes, file.answer.start) == (len(data), data[:FIRST_BYTES])
        assert {each.fields["authorization"] for each in it.folder.asked} == {"Bearer t0ken"}
        assert "t0ken" not in repr(located)


async def test_the_version_is_that_of_every_file() -> None:
    with world(FILES) as it:
        versions = [(await it.locator.locate(it.ref())).version]
        for name in (CONFIG, INDEX, *SHARDS):
            it.folder.fields = {name: ['ETag: "another"']}
            versions.append((await it.locator.locate(it.ref())).version)
        assert len(set(versions)) == 6
        it.folder.fields = {shard(2): []}
        assert (await it.locator.locate(it.ref())).version.startswith("weak-")
        it.folder.fields = {INDEX: ['ETag: "v1"']}
        for etag in ('"v1"', f"{CONFIG}-1", f"{shard(1)}-1"):
            with pytest.raises(AdapterNotFoundError, match="revision"):
                await it.locator.locate(it.ref(revision=etag))


async def test_one_file_of_weights_comes_before_an_index() -> None:
    with world(FILES | {WEIGHTS: b"weights"}) as it:
        located = await it.locator.locate(it.ref())
        assert [file.target.name for file in located.files] == [CONFIG, WEIGHTS]
        assert sorted(it.folder.names) == [CONFIG, WEIGHTS]
        with pytest.raises(AdapterFormatError, match=shard(1)):
            await it.locator.shards(located, ROLES)


async def test_a_file_that_is_missing_is_named() -> None:
    files = dict(FILES)
    del files[shard(2)]
    with world(files) as it, pytest.raises(AdapterNotFoundError, match=shard(2)):
        await it.locator.locate(it.ref())


@pytest.mark.parametrize(
    "content",
    [
        index(shard(1, 2), shard(2, 2)),
        index(shard(1, 3), shard(2, 4)),
        index("other.safetensors", "../../adapter_model-00001-of-00003.safetensors"),
        index(shard(0, 0)),
        b"",
        b"\xff{",
    ],
)
async def test_what_names_other_files_is_refused(content: bytes) -> None:
    """For three files; and nothing is asked for that the index does not name so."""
    with world(FILES | {INDEX: content, shard(1, 2): b"1", shard(2, 2): b"2"}) as it:
        located = await it.locator.locate(it.ref())
        with pytest.raises(AdapterFormatError, match=shard(1)):
            await it.locator.shards(located, ROLES)
        assert {name for name in it.folder.names if "-of-" in name} <= {shard(1, 2), shard(2, 2)}


async def test_an_index_has_limits() -> None:
    with world(FILES | {INDEX: index(shard(1, MAX_SHARDS + 1))}) as it:
        with pytest.raises(AdapterFormatError, match="257 files"):
            await it.locator.locate(it.ref())
        it.folder.files[INDEX] = b" " * (MAX_INDEX_BYTES + 1)
        with pytest.raises(FetchError, match=f"{INDEX} has more than the 2,097,152 bytes"):
            await it.locator.locate(it.ref())
