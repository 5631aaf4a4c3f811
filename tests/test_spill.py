"""What is given as tensors and finds no room in memory: older ones go on in the disk cache."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tiny
from common import until
from given import assert_holds, put, used
from lorax_async import (
    AdapterNotFoundError,
    AdapterRef,
    CapacityError,
    ConfigError,
    IntegrityError,
    LoaderConfig,
    Merge,
)
from merges import weights_of
from spilling_loaders import (
    CONFIG,
    WEIGHTS,
    entries,
    entry_of,
    given,
    in_memory,
    off_device,
    roomy,
    spilled,
)
from tiny_sources import where

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
async def test_what_was_read_longest_ago_goes_and_comes_back_the_same(
    tmp_path: Path, device: str, stored: str
) -> None:
    async with roomy(tmp_path, 2, device=device, dtype=stored) as there:
        keys = [await given(there, seed) for seed in (0, 1)]
        assert entries(tmp_path) == []
        await off_device(there)
        (await there.load("0")).release()  # so that 1 was read longest ago
        keys.append(await given(there, 2))
        assert in_memory(there) == [keys[0], keys[2]]
        assert used(there) <= there.config.memory_bytes
        assert entries(tmp_path) == [entry_of(tmp_path, keys[1]).name]
        await off_device(there)
        for seed, key in enumerate(keys):
            async with await there.load(str(seed)) as handle:
                assert handle.key == key
                assert_holds(handle, tiny.tensors(seed))
        assert there.statistics().spills == 1


async def test_the_entry_is_an_adapter_as_others_read_it(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (_, keys):
        folder = entry_of(tmp_path, keys[0])
        record = json.loads((folder / "record.json").read_bytes())
        named = {file["file"]: file for file in record["files"]}
        assert named.keys() == {WEIGHTS, CONFIG}
        for name, file in named.items():
            content = (folder / name).read_bytes()
            found = (file["kind"], file["digest"], file["nbytes"])
            assert found == ("sha256", hashlib.sha256(content).hexdigest(), len(content))
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(tmp_path.joinpath("entries").stat().st_mode) == 0o700
        loaded = safetensors.torch.load_file(folder / WEIGHTS)
        expected = tiny.tensors(0)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert json.loads((folder / CONFIG).read_bytes()).items() >= tiny.config().items()


async def test_its_digest_is_asked_for_on_disk_as_in_memory(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1) as there:
        keys = [await given(there, seed) for seed in (0, 1)]
        content = (entry_of(tmp_path, keys[0]) / WEIGHTS).read_bytes()
        await off_device(there)
        right = AdapterRef("0", digest=hashlib.sha256(content).hexdigest())
        async with await there.load(right) as handle:
            assert_holds(handle, tiny.tensors(0))
            assert (await handle.verified()).digest == right.digest
        with pytest.raises(IntegrityError):
            await there.load(AdapterRef("0", digest=64 * "0"))


async def test_residency_says_where_it_is(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, keys):
        found = where(there, keys[0])
        assert (found.tier, found.state, found.host_bytes) == ("device", "resident", 0)
        await off_device(there)
        found = where(there, keys[0])
        assert (found.tier, found.state) == ("disk", "present")
        assert (found.host_bytes, found.device_bytes) == (0, 0)
        found = where(there, keys[1])
        assert (found.tier, found.state, found.host_bytes) == ("host", "held", used(there))
        await there.prefetch("0", tier="disk")
        await there.prefetch("0", tier="host")
        found = where(there, keys[0])
        assert (found.tier, found.state, found.host_bytes) == ("host", "read ahead", 0)
        async with await there.load("0") as handle:
            assert_holds(handle, tiny.tensors(0))


async def test_equal_content_joins_what_is_on_disk(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, keys):
        again = await there.load_tensors("again", tiny.tensors(0), tiny.config())
        assert again.key == keys[0]
        assert_holds(again, tiny.tensors(0))
        again.release()
        await until(lambda: used(there) == 0)  # the other one made room for the copy
        assert len(entries(tmp_path)) == 2
        await there.unload("again")
        await off_device(there)
        async with await there.load("0") as handle:
            assert_holds(handle, tiny.tensors(0))


@pytest.mark.parametrize("held", [False, True])
async def test_unloaded_it_is_gone_from_the_disk(tmp_path: Path, held: bool) -> None:
    async with spilled(tmp_path, 2) as (there, keys):
        await off_device(there)
        other = await there.load("0") if held else None
        await there.unload("1")
        await until(lambda: entries(tmp_path) == [entry_of(tmp_path, keys[0]).name])
        for name in ("1", keys[1]):
            with pytest.raises(AdapterNotFoundError):
                await there.load(name)
        assert keys[1] not in there.residency()
        if other is not None:
            assert_holds(other, tiny.tensors(0))
            other.release()
        assert await given(there, 1) == keys[1]
        async with await there.load("1") as handle:
            assert_holds(handle, tiny.tensors(1))


async def test_replaced_it_goes_with_the_last_who_holds_it(tmp_path: Path) -> None:
    async with spilled(tmp_path) as (there, keys):
        old = await there.load("0")
        await there.pin("0")
        (await put(there, 7, "0")).release()
        assert where(there, "0").pins == 1
        assert entry_of(tmp_path, keys[0]).is_dir()
        assert_holds(old, tiny.tensors(0))
        old.release()
        await until(lambda: not entry_of(tmp_path, keys[0]).exists())
        async with await there.load("0") as handle:
            assert_holds(handle, tiny.tensors(7))


async def test_what_is_replaced_makes_room_itself(tmp_path: Path) -> None:
    """A training loop with memory for one: only the latest version is left, and only in memory."""
    async with roomy(tmp_path, 1) as there:
        for seed in range(6):
            async with await put(there, seed, "policy") as handle:
                assert_holds(handle, tiny.tensors(seed))
        assert in_memory(there) == [handle.key]
        await until(lambda: entries(tmp_path) == [])
        assert there.statistics().spills == 5


async def test_it_is_a_part_of_merges(tmp_path: Path) -> None:
    def merge(*parts: str) -> Merge:
        return Merge("ties", list(parts), [0.5, -2], density=0.5)

    async with roomy(tmp_path / "unused", 9) as there:
        for seed in (0, 1):
            await given(there, seed)
        async with await there.load(merge("0", "1")) as handle:
            expected = {name: t.clone() for name, t in weights_of(handle).items()}
    async with spilled(tmp_path / "cache") as (there, _):
        for _ in range(2):  # read anew, and once more by a reader that is opened again
            async with await there.load(merge("0", "1")) as handle:
                found = weights_of(handle)
                assert found.keys() == expected.keys()
                assert all(torch.equal(t, expected[name]) for name, t in found.items())
            await off_device(there)


async def test_closed_it_leaves_nothing(tmp_path: Path) -> None:
    async with spilled(tmp_path, 3) as (there, _):
        assert len(entries(tmp_path)) == 3
        held = await there.load("0")
        await there.close(timeout=0.01)
        assert entries(tmp_path) == []
        held.release()


async def test_the_disk_is_used_when_it_must_be_and_never_without_leave(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for spill in (True, False):
        async with roomy(folder, 1, spill=spill) as there:
            key = await given(there, 0)
            assert os.listdir(tmp_path) == []
            with pytest.raises(CapacityError, match="memory_bytes") as caught:
                await there.load_tensors("large", tiny.tensors(1, 64), tiny.config(64))
            assert (caught.value.id, caught.value.retryable) == ("large", False)
            if not spill:
                with pytest.raises(CapacityError, match="memory_bytes") as caught:
                    await given(there, 1)
                assert (caught.value.id, caught.value.retryable) == ("1", True)
                assert in_memory(there) == [key]
            assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="spill"):
        LoaderConfig(spill=1)  # type: ignore[arg-type]
