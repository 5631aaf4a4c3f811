"""How far an adapter was checked: told once it is known."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path

import pytest

import tiny
from common import Run, until
from false_bytes import told_false, watched
from lorax_async import (
    AdapterTimeoutError,
    HandleClosedError,
    IntegrityError,
    Merge,
    UsageError,
)
from lorax_async.verification import Verification
from tiny_loaders import loader
from tiny_sources import WEIGHTS, over, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

DIGEST = "5" * 64


async def test_a_load_is_there_before_it_is_verified(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    source.verifications["a"] = Verification("sha256", DIGEST)
    async with over(source) as there, await there.load("a") as handle:
        tiny.assert_equal_to_file(handle, tmp_path / "a")
        with pytest.raises(AdapterTimeoutError, match="here and checked within 0.01") as late:
            await handle.verified(timeout=0.01)
        assert (late.value.stage, late.value.id, late.value.key) == ("verify", "a", handle.key)
        async with handle.clone() as clone:
            waiting = [asyncio.create_task(each.verified()) for each in (handle, clone)]
            await asyncio.sleep(0.02)
            assert not any(each.done() for each in waiting)
            source.allow_verification("a")
            assert await asyncio.gather(*waiting) == [Verification("sha256", DIGEST)] * 2
        assert await handle.verified(timeout=0) == Verification("sha256", DIGEST)


async def test_it_is_known_as_long_as_the_adapter_is(tmp_path: Path) -> None:
    """Back from wherever it went, nothing is fetched, nor checked anew."""
    source = stocked(tmp_path, "a", "b")
    source.verifications["a"] = Verification("git-sha1", "7" * 40)
    async with over(source, max_slots=1) as there:
        for name in ("a", "b", "a"):
            async with await there.load(name) as handle:
                found = await handle.verified()
                assert found.kind == ("git-sha1" if name == "a" else "none")
        assert source.counts.brings == 2
        assert there.try_acquire("b") is None
        handle_or_none = there.try_acquire("a")
        assert handle_or_none is not None
        async with handle_or_none as handle:
            assert (await handle.verified()).kind == "git-sha1"


def test_what_is_awaited_ends_with_the_handle_and_on_its_loop_alone(
    run: Run, tmp_path: Path
) -> None:
    source = stocked(tmp_path, "a")
    source.hold_verification("a")

    async def body() -> None:
        async with over(source) as there, await there.load("a") as handle:
            with pytest.raises(UsageError, match="event loop of its loader"):
                await asyncio.to_thread(lambda: asyncio.run(handle.verified()))
            waiting = asyncio.create_task(handle.verified())
            await asyncio.sleep(0.01)
            handle.release()
            for late in (waiting, handle.verified()):
                with pytest.raises(HandleClosedError):
                    await late
            source.allow_verification("a")

    run(body())


@pytest.mark.parametrize("verb", ["load", "stream"])
async def test_before_use_nothing_is_moved_before_all_was_checked(
    tmp_path: Path, verb: str
) -> None:
    source = stocked(tmp_path, "a", "false")
    for id in ("a", "false"):
        source.hold_verification(id)
    there, device = watched(source, verify="before_use")

    async def use(id: str) -> None:
        if verb == "load":
            handle = await there.load(id)
            tiny.assert_equal_to_file(handle, tmp_path / id)
            handle.release()
            return
        async with there.stream(id) as handle:
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, tmp_path / id)

    async with there:
        using = [asyncio.create_task(use(id)) for id in ("a", "false")]
        await until(lambda: source.counts.brings == 2)
        await asyncio.sleep(0.02)
        assert device.copies == 0
        told_false(source, "false")
        with pytest.raises(IntegrityError, match="not what was promised"):
            await using[1]
        assert device.copies == 0
        source.allow_verification("a")
        await using[0]


@pytest.mark.parametrize("verify", ["none", "stream", "before_use"])
async def test_local_files_are_hashed_before_use_alone(tmp_path: Path, verify: str) -> None:
    folder = tiny.write(tmp_path / "a")
    digest = sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    hashed = verify == "before_use"
    async with loader(verify=verify) as there:
        async with await there.load(folder) as handle:
            expected = Verification("transport", digest) if hashed else Verification("none")
            assert await handle.verified() == expected
        merge = Merge("linear", [folder, folder], [1, 1])
        async with await there.load(merge) as handle:
            kind = "transport" if hashed else "none"
            assert await handle.verified() == Verification(kind)  # type: ignore[arg-type]
        made = await there.load_tensors("m", tiny.tensors(1), tiny.config())
        async with made as handle:
            assert await handle.verified() == Verification("none")


async def test_a_merge_is_checked_as_far_as_its_least_part(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    source.verifications |= {
        "a": Verification("sha256", DIGEST),
        "b": Verification("transport", "6" * 64),
    }
    source.hold_verification("b")
    merge = Merge("linear", ["a", "b"], [1, 1])
    async with over(source) as there, await there.load(merge) as handle:
        source.allow_verification("b")
        assert await handle.verified() == Verification("transport")
