"""How an adapter's bytes were checked, digests of callers, and wrong bytes."""

import asyncio
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from cancellation_sweep import raising
from event_loops import until
from false_bytes import told_false, watched
from tensor_adapters import acquired
from tiny_loaders import fails, loader
from tiny_sources import WEIGHTS, Slowed, is_resident, make_source, over, state

from lorax_async import AdapterHandle, AdapterKey, Failed, errors
from lorax_async.concurrency import FetchControl
from lorax_async.files import Reader
from lorax_async.sources.base import AdapterFile
from lorax_async.testing import FakeSource
from lorax_async.types import AdapterRef, Verification, VerificationKind

pytestmark = pytest.mark.usefixtures("nothing_left")

SOME, OTHER = "5" * 64, "0" * 64
"""Digests of no file."""


def digest_of(folder: Path) -> str:
    return sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.each_loop
async def test_a_load_is_verified_after_it_is_there(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    source.hold_verification("a")
    source.verifications["a"] = Verification("sha256", SOME)
    async with over(source) as there, await there.load("a") as handle:
        tiny.assert_equal_to_file(handle, tmp_path / "a")
        words, checking = "fetched and checked within 0.01", handle.verified(timeout=0.01)
        error = await fails(checking, errors.AdapterTimeoutError, words)
        assert (error.stage, error.id, error.key) == ("verify", "a", handle.key)
        async with handle.clone() as clone:
            waiting = [asyncio.create_task(each.verified()) for each in (handle, clone)]
            await asyncio.sleep(0.01)
            assert not any(each.done() for each in waiting)
            source.allow_verification("a")
            assert await asyncio.gather(*waiting) == [Verification("sha256", SOME)] * 2
        assert await handle.verified(timeout=0) == Verification("sha256", SOME)
        with pytest.raises(errors.UsageError, match="event loop of its loader"):
            await asyncio.to_thread(lambda: asyncio.run(handle.verified()))
    source.hold_verification("a")
    async with over(source) as there, await there.load("a") as handle:
        waiting = [asyncio.create_task(handle.verified())]
        await asyncio.sleep(0)
        handle.release()
        for late in (waiting[0], handle.verified()):
            await fails(late, errors.HandleClosedError)
        source.allow_verification("a")


async def test_a_verification_lasts_as_long_as_the_adapter_is_known(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    source.verifications["a"] = Verification("git-sha1", "7" * 40)
    async with over(source, max_slots=1) as there:
        for name in ("a", "b", "a"):
            async with await there.load(name) as handle:
                found = await handle.verified()
                assert found.kind == ("git-sha1" if name == "a" else "none")
        assert source.counts.fetches == 2
        assert there.try_acquire("b") is None
        async with acquired(there, "a") as handle:
            assert (await handle.verified()).kind == "git-sha1"


async def test_before_use_all_is_checked_before_a_copy(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "false")
    for id in ("a", "false"):
        source.hold_verification(id)
    there, device = watched(source, verify="before_use")

    async def use(id: str) -> None:
        async with there.stream(id) as handle:
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, tmp_path / id)

    async with there:
        using = [asyncio.create_task(use(id)) for id in ("a", "false")]
        await until(lambda: source.counts.fetches == 2)
        await asyncio.sleep(0.02)
        assert device.copies == 0
        told_false(source, "false")
        await fails(using[1], errors.IntegrityError, "not what was promised")
        assert device.copies == 0
        source.allow_verification("a")
        await using[0]


@pytest.mark.parametrize("verify", ["none", "stream", "before_use"])
async def test_local_files_are_hashed_before_use_alone(tmp_path: Path, verify: str) -> None:
    folder = tiny.write(tmp_path / "a")
    found: VerificationKind = "transport" if verify == "before_use" else "none"
    async with loader(verify=verify) as there:
        async with await there.load(folder) as handle:
            digest = digest_of(folder) if verify == "before_use" else None
            assert await handle.verified() == Verification(found, digest)
        async with await there.load_tensors("m", tiny.tensors(1), tiny.config()) as handle:
            assert await handle.verified() == Verification("none")


async def test_a_digest_is_compared_for_its_caller_alone(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    digest = digest_of(folder)
    async with loader() as there:
        async with await there.load(folder, digest=digest) as handle:
            tiny.assert_equal_to_file(handle, folder)
            async with handle.clone() as clone:
                for each in (handle, clone):
                    assert await each.verified() == Verification("sha256", digest)
        async with await there.load(folder) as handle:
            assert await handle.verified() == Verification("none"), "another's word"
            error = await fails(there.load(folder, digest=OTHER), errors.IntegrityError)
            assert (error.id, error.key, error.stage) == (str(folder), handle.key, "verify")
            assert not error.retryable
            assert error.story == there.placement().story(folder)
            assert digest in error.problem
            assert OTHER in error.problem
            assert there.placement().usage.leases == 1
            tiny.assert_equal_to_file(handle, folder)
            assert is_resident(there, folder)


async def test_every_call_compares_and_the_files_are_hashed_once(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    digest = digest_of(tmp_path / "a")
    right, wrong = (AdapterRef("a", digest=each) for each in (digest, OTHER))
    async with over(source, max_slots=1) as there:
        for handle in await asyncio.gather(*(there.load(right) for _ in range(20))):
            handle.release()
        (await there.load("b")).release()
        for tier in ("disk", "device"):
            await there.prefetch(right, tier=tier)
            await fails(there.prefetch(wrong, tier=tier), errors.IntegrityError)
        for call in (there.load, there.pin):
            await fails(call(wrong), errors.IntegrityError, f"{digest}, not {OTHER}")
        await there.pin(right)
        assert not there.unpin(wrong)
        acquired(there, right).release()
        assert there.try_acquire(wrong) is None
        assert there.unpin(right)
        assert not there.placement().usage.leases
        assert source.counts.digests == 1


@pytest.mark.parametrize("kind", ["sha256", "transport", "git-sha1", "none"])
@pytest.mark.parametrize("right", [True, False])
async def test_known_sha256_is_reused(tmp_path: Path, kind: VerificationKind, right: bool) -> None:
    source = make_source(tmp_path, "a")
    wanted = digest_of(tmp_path / "a")
    known = {"git-sha1": "7" * 40, "none": None}.get(kind, wanted if right else OTHER)
    source.verifications["a"] = Verification(kind, known)
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
            await fails(loading, errors.IntegrityError)
        assert source.counts.digests == (0 if by_source else 1)


async def test_a_stream_with_a_digest_waits_for_the_comparison(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with over(source) as there, there.stream("a") as plain:
        await plain.layer_ready(0)
        wrong, right = (
            asyncio.create_task(there.stream("a", digest=digest).__aenter__())
            for digest in (OTHER, digest_of(tmp_path / "a"))
        )
        await asyncio.sleep(0.01)
        assert not wrong.done()
        assert not right.done()
        source.allow("a")
        await fails(wrong, errors.IntegrityError, f"not {OTHER}")
        with await right as handle, handle.clone() as clone:
            for each in (handle, clone):
                tiny.assert_equal_to_file(each, tmp_path / "a")
                assert (await each.verified()).kind == "sha256"
        tiny.assert_equal_to_file(plain, tmp_path / "a")
        assert (await plain.verified()).kind == "none"
        assert there.statistics().failures == 0


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "g" * 64, "sha256:" + "a" * 64, 5])
async def test_a_digest_is_64_lowercase_hex_digits(tmp_path: Path, digest: object) -> None:
    async with loader() as there:
        for call in (there.load, lambda *a, **k: there.stream(*a, **k).__aenter__()):
            await fails(call(tmp_path, digest=digest), errors.UsageError, "digest")  # type: ignore[arg-type]


@pytest.mark.each_loop
@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_hashing_ends_when_nobody_waits_for_it(tmp_path: Path, how: str) -> None:
    source = make_source(tmp_path, "a")
    hashing = Slowed(source, "digest")
    async with over(source) as there:
        if how == "late":
            call = there.load("a", digest=OTHER, timeout=0.2)
            assert (await fails(call, errors.AdapterTimeoutError)).stage == "verify"
        else:
            loads = [asyncio.create_task(there.load("a", digest=OTHER)) for _ in range(2)]
            await until(lambda: hashing.asked)
            for load in loads:
                assert not hashing.cancelled
                load.cancel()
                await fails(load, asyncio.CancelledError)
        await until(lambda: hashing.cancelled == 1)
        assert not there.placement().usage.leases
        hashing.may_go_on.set()
        (await there.load("a", digest=digest_of(tmp_path / "a"))).release()
        assert hashing.asked == 2


async def test_each_caller_gets_an_error_of_hashing_of_its_own(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with over(source) as there:
        source.fail("digest", errors.FetchError("the disk is on fire"))
        loads = [there.load("a", digest=OTHER) for _ in range(3)]
        ends = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(error) for error in ends] == [errors.FetchError] * 3
        assert len(set(map(id, ends))) == 3
        source.fail("digest", RuntimeError("a foreign fault"))
        await fails(there.load("a", digest=OTHER), errors.InternalError, "foreign fault")
        assert not there.placement().usage.leases
        (await there.load("a", digest=digest_of(tmp_path / "a"))).release()


@pytest.mark.parametrize("step", ["fetched", "hashed"])
async def test_a_loader_that_closes_ends_the_wait_for_a_digest(tmp_path: Path, step: str) -> None:
    source = make_source(tmp_path, "a")
    hashing = Slowed(source, "digest")
    if step == "fetched":
        source.hold_verification("a")
    async with over(source) as there:
        loading = asyncio.create_task(there.load("a", digest=OTHER))
        await until(lambda: is_resident(there, "a"))
        if step == "hashed":
            await until(lambda: hashing.asked)
        closing = asyncio.create_task(there.close())
        caught = await fails(loading, errors.LoaderClosedError)
        assert caught.id == "a"
        source.allow_verification("a")
        await closing


def weights(handle: AdapterHandle) -> list[torch.Tensor]:
    """Views of the device's memory, which stay when the handle is released."""
    return [each for module in handle.modules.values() for each in (module.a, module.b)]


async def test_every_use_of_false_bytes_fails(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "other")
    source.hold_verification("a")
    events: list[object] = []
    async with over(source) as there, await there.load("other") as other:
        there.subscribe(events.append)
        handle = await there.load("a")
        clone = handle.clone()
        waiting = [asyncio.create_task(each.verified()) for each in (handle, clone)]
        told_false(source)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        for error in ends:
            assert type(error) is errors.IntegrityError
            assert (error.id, error.key, error.stage) == ("a", handle.key, "verify")
        assert ends[0] is not ends[1]
        for wait in (handle.layer_ready(0), asyncio.to_thread(clone.wait_layer, 3)):
            await fails(wait, errors.IntegrityError, "not what was promised")
        with pytest.raises(errors.IntegrityError), handle.use():
            raise AssertionError("a kernel would run")
        for use in (lambda: handle.modules, clone.clone, lambda: handle.queue_behind(0)):
            with pytest.raises(errors.IntegrityError):
                use()
        assert there.try_acquire("a") is None
        failed = [event for event in events if isinstance(event, Failed)]
        assert [(event.key, event.slot) for event in failed] == [(handle.key, handle.slot)]
        assert there.statistics().failures == 1
        handle.release()
        clone.release()
        await until(lambda: state(there, "a") == "nowhere")
        tiny.assert_equal_to_file(other, tmp_path / "other")
        async with await there.load("a") as again:
            tiny.assert_equal_to_file(again, tmp_path / "a")
        assert source.counts.fetches == 3, "nothing of it was kept"


async def test_false_bytes_are_zeroed_before_their_slot_is_free(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b", "c", "d", "e")
    source.hold_verification("a")
    there, device = watched(source)
    freed: list[bool] = []
    async with there:
        handle = await there.load("a")
        clear, index, memory = device.clear_column, handle.slot.index, weights(handle)

        def cleared(slot: int) -> None:
            if slot == index:
                freed.append(any(each.any() for each in memory))
            clear(slot)

        device.clear_column = cleared  # type: ignore[method-assign]
        with handle.use():
            told_false(source)
            await fails(handle.verified(), errors.IntegrityError)
            handle.release()
            others = [await there.load(name) for name in "bcd"]
            waiting = asyncio.create_task(there.load("e"))
            await asyncio.sleep(0.02)
            assert all(each.any() for each in memory), "zeroed under a kernel"
            assert not waiting.done()
        last = await waiting
        assert freed == [False]
        assert last.slot.index == index
        for name, each in zip("bcde", (*others, last), strict=True):
            tiny.assert_equal_to_file(each, tmp_path / name)
            each.release()


async def test_a_slot_that_cannot_be_zeroed_is_free_all_the_same(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    source.hold_verification("a")
    there, device = watched(source)
    device.wipe = raising(RuntimeError("it has its moods"))  # type: ignore[method-assign,assignment]
    async with there:
        (await there.load("a")).release()
        told_false(source)
        await until(lambda: state(there, "a") == "nowhere")
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")


class Rewritten(FakeSource):
    """The bytes of `key` are those of another adapter once its own are `gone`."""

    gone = False

    def given(self, key: AdapterKey) -> AdapterKey:
        return self.other if self.gone and key == self.key else key

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        return await super().open(self.given(key), control)

    def reopen(self, key: AdapterKey) -> Reader:
        return super().reopen(self.given(key))

    def put_both(self, config: bytes, own: bytes, other: bytes) -> None:
        self.key, self.other = self.put("a", config, own), self.put("other", config, other)


async def test_bytes_that_were_false_vouch_for_no_others(tmp_path: Path) -> None:
    """The first bytes of a version are finite, and damaged; its own have a NaN."""
    config, weights = tiny.files(tiny.write(tmp_path / "a"))
    ruined = safetensors.torch.load(weights)
    next(iter(ruined.values())).view(-1)[0] = float("nan")
    source = Rewritten()
    source.put_both(config, weights, safetensors.torch.save(ruined))
    source.hold_verification("a")
    async with over(source) as there:
        async with there.stream("a") as handle:
            await handle.layer_ready(3)
            told_false(source)
            await fails(handle.verified(), errors.IntegrityError)
        source.gone = True
        await fails(there.load("a"), errors.AdapterFormatError, "NaN or infinite")
