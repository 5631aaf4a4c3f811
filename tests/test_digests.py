"""What a caller knows of an adapter's weights, held against them: for him alone."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path

import pytest

import tiny
from common import until
from false_bytes import watched
from known_digests import OTHER, digest_of, holders
from lorax_async import (
    AdapterRef,
    IntegrityError,
    Merge,
    UsageError,
)
from lorax_async.verification import Verification
from tiny_loaders import loader
from tiny_sources import is_resident, over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_a_local_adapter_is_held_against_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    digest = digest_of(folder)
    async with loader() as there:
        async with await there.load(folder, digest=digest) as handle:
            tiny.assert_equal_to_file(handle, folder)
            assert await handle.verified() == Verification("sha256", digest)
            async with handle.clone() as clone:
                assert await clone.verified() == Verification("sha256", digest)
        async with await there.load(folder) as handle:
            assert await handle.verified() == Verification("none"), "his word was not this one"


async def test_other_weights_are_refused_for_who_gave_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader() as there, await there.load(folder) as handle:
        with pytest.raises(IntegrityError) as caught:
            await there.load(folder, digest=OTHER)
        error = caught.value
        assert (error.id, error.key, error.stage) == (str(folder), handle.key, "verify")
        assert not error.retryable
        assert error.story == there.story(folder)
        assert digest_of(folder) in error.problem
        assert OTHER in error.problem
        assert holders(there) == 1
        tiny.assert_equal_to_file(handle, folder)
        assert is_resident(there, folder)


async def test_the_files_are_hashed_once_for_all(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    digest = digest_of(tmp_path / "a")
    async with over(source, max_slots=1) as there:
        loads = [there.load("a", digest=digest) for _ in range(20)]
        for handle in await asyncio.gather(*loads):
            handle.release()
        (await there.load("b")).release()
        (await there.load("a", digest=digest)).release()
        with pytest.raises(IntegrityError, match=f"{digest}, not {OTHER}"):
            await there.load("a", digest=OTHER)
        assert source.counts.digests == 1


@pytest.mark.parametrize("kind", ["sha256", "transport", "git-sha1", "none"])
@pytest.mark.parametrize("right", [True, False])
async def test_what_the_source_found_is_not_computed_again(
    tmp_path: Path, kind: str, right: bool
) -> None:
    """Whoever hashed on the way knows the sha256; git's name of a file is none."""
    source = stocked(tmp_path, "a")
    wanted = digest_of(tmp_path / "a")
    known = {"git-sha1": "7" * 40, "none": None}.get(kind, wanted if right else OTHER)
    source.verifications["a"] = Verification(kind, known)  # type: ignore[arg-type]
    source.hold_verification("a")
    by_source = kind in ("sha256", "transport")
    async with over(source) as there:
        asked = wanted if right or by_source else OTHER
        loading = asyncio.create_task(there.load("a", digest=asked))
        await until(lambda: is_resident(there, "a"))
        await asyncio.sleep(0.01)
        assert not loading.done(), "all of it was not here yet"
        source.allow_verification("a")
        if right:
            async with await loading as handle:
                assert await handle.verified() == Verification("sha256", wanted)
        else:
            with pytest.raises(IntegrityError):
                await loading
        assert source.counts.digests == (0 if by_source else 1)


async def test_who_streams_is_told_when_it_is_known(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with (
        over(source) as there,
        there.stream("a", digest=OTHER) as handle,
        handle.clone() as clone,
        there.stream("a", digest=digest_of(tmp_path / "a")) as right,
        there.stream("a") as plain,
    ):
        for each in (handle, clone, right, plain):
            await each.layer_ready(0)
        waiting = [asyncio.create_task(each.layer_ready(3)) for each in (handle, right)]
        verified = asyncio.create_task(handle.verified())
        source.allow("a")
        with pytest.raises(IntegrityError, match=f"not {OTHER}"):
            await verified
        await waiting[1]
        for each in (handle, clone):
            with pytest.raises(IntegrityError), each.use():
                raise AssertionError("a kernel would run")
            with pytest.raises(IntegrityError):
                await asyncio.to_thread(each.wait_layer, 3)
        await asyncio.gather(*waiting, return_exceptions=True)
        for each in (right, plain):
            tiny.assert_equal_to_file(each, tmp_path / "a")
        assert (await right.verified()).kind == "sha256"
        assert (await plain.verified()).kind == "none"
        assert there.statistics().failures == 0


async def test_who_waits_in_a_thread_is_woken(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with over(source) as there, there.stream("a", digest=OTHER) as handle:
        source.verifications["a"] = Verification("sha256", "1" * 64)
        waiting = asyncio.create_task(asyncio.to_thread(handle.wait_layer, 3, 30))
        verified = asyncio.create_task(handle.verified())
        await asyncio.sleep(0.01)
        source.allow("a")
        ends = await asyncio.gather(waiting, verified, return_exceptions=True)
        # The last layer may have come first: that a digest is another's is known after it.
        assert isinstance(ends[1], IntegrityError)
        assert ends[0] is None or isinstance(ends[0], IntegrityError)


async def test_who_waits_for_a_copy_in_a_thread_need_not_wait_for_its_end(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.verifications["a"] = Verification("sha256", "1" * 64)
    there, device = watched(source)
    async with there, there.stream("a", digest=OTHER) as handle:
        device.gate.clear()
        waiting = asyncio.create_task(asyncio.to_thread(handle.wait_layer, 3, 60))
        await asyncio.sleep(0.01)
        source.allow("a")
        with pytest.raises(IntegrityError, match=f"not {OTHER}"):
            await waiting
        device.gate.set()


async def test_a_prefetch_and_a_pin_are_held_against_it_too(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    right, wrong = (AdapterRef(folder, digest=each) for each in (digest_of(folder), OTHER))
    async with loader() as there:
        for tier in ("disk", "device"):
            await there.prefetch(right, tier=tier)
            with pytest.raises(IntegrityError):
                await there.prefetch(wrong, tier=tier)
        with pytest.raises(IntegrityError):
            await there.pin(wrong)
        await there.pin(right)
        assert not there.unpin(wrong)
        assert there.unpin(right)


async def test_what_is_had_at_once_is_known_to_have_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    right, wrong = (AdapterRef(folder, digest=each) for each in (digest_of(folder), OTHER))
    async with loader() as there:
        await there.pin(folder)
        await there.prefetch(right, tier="disk")
        with pytest.raises(IntegrityError):
            await there.load(wrong)
        handle = there.try_acquire(right)
        assert handle is not None
        handle.release()
        assert there.try_acquire(wrong) is None
        assert not holders(there)


async def test_parts_of_a_merge_have_theirs(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    digests = {name: digest_of(tmp_path / name) for name in "ab"}
    async with over(source) as there:
        parts = [AdapterRef(name, digest=digests[name]) for name in "ab"]
        async with await there.load(Merge("linear", parts, [1, 1])) as handle:
            assert await handle.verified() == Verification("none")
        assert source.counts.digests == 2
        parts = [AdapterRef("a", digest=digests["b"]), AdapterRef("b")]
        with pytest.raises(IntegrityError, match=digests["a"]):
            await there.load(Merge("linear", parts, [1, 1]))


async def test_tensors_are_the_file_that_they_became(tmp_path: Path) -> None:
    async with loader(local_roots=(tmp_path,)) as there:
        (await there.load_tensors("m", tiny.tensors(1), tiny.config())).release()
        key = there._acquiring.known(AdapterRef("m"))
        assert key is not None
        reader = there._machinery._tensors.reopen(key)
        content = bytearray(reader.nbytes)
        reader.read_into([memoryview(content)], 0)
        reader.close()
        (await there.load("m", digest=sha256(content).hexdigest())).release()
        with pytest.raises(IntegrityError, match="sha256"):
            await there.load("m", digest=OTHER)
        ref = AdapterRef("m", digest=OTHER)
        (await there.replace(ref, tiny.tensors(2), tiny.config())).release()
        async with await there.load("m") as handle:
            assert handle.key != key, "what is replaced is an id, whatever was known of it"
        await there.unload("m")


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "g" * 64, "sha256:" + "a" * 64, 5])
async def test_what_is_no_digest(tmp_path: Path, digest: object) -> None:
    async with loader() as there:
        for call in (there.load, lambda *a, **k: there.stream(*a, **k).__aenter__()):
            with pytest.raises(UsageError, match="digest"):
                await call(tmp_path, digest=digest)  # type: ignore[arg-type]
