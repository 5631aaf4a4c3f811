"""What calls that give tensors take, what they refuse, and what is one adapter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from given import assert_holds, used
from lorax_async import (
    AdapterLoader,
    AdapterRef,
    CapacityError,
    InvalidAdapterIdError,
    LoaderClosedError,
    LoaderConfig,
    UsageError,
)
from tiny_loaders import loader
from tiny_sources import is_resident, over, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_equal_content_is_one_adapter(tmp_path: Path) -> None:
    given = tiny.tensors(5)
    async with over(stocked(tmp_path)) as there:
        names = [f"mine {n}" for n in range(6)] + ["mine 0"]
        handles = await asyncio.gather(
            *(there.load_tensors(name, dict(given), tiny.config()) for name in names)
        )
        (key,) = {handle.key for handle in handles}
        assert {handle.slot for handle in handles} == {handles[0].slot}
        assert there.statistics().loads == 1
        assert used(there) == where(there, key).host_bytes
        for handle in handles:
            handle.release()
        for name in names[:5]:
            await there.unload(name)
            assert used(there) > 0
            async with await there.load("mine 5") as handle:
                assert_holds(handle, given)
        await there.unload("mine 5")
        assert used(there) == 0


@pytest.mark.parametrize("change", ["config", "name", "dtype", "one bit"])
async def test_other_content_is_another_adapter(tmp_path: Path, change: str) -> None:
    given, config = tiny.tensors(5), tiny.config()
    other, other_config = dict(given), config
    last = max(given)
    if change == "config":
        other_config = tiny.config(lora_alpha=9)
    elif change == "name":
        other = {name.replace("layers.3", "layers.03x"): t for name, t in given.items()}
        other = {name.replace("layers.03x", "layers.3"): t for name, t in list(other.items())[4:]}
    elif change == "dtype":
        other = {name: tensor.half() for name, tensor in given.items()}
    else:
        other[last] = given[last].clone()
        other[last].view(torch.int32)[-1, -1] ^= 1
    async with over(stocked(tmp_path)) as there:
        one = await there.load_tensors("one", given, config)
        two = await there.load_tensors("two", other, other_config)
        assert one.key != two.key
        assert one.slot != two.slot
        with pytest.raises(UsageError, match="means other tensors already") as caught:
            await there.load_tensors("one", other, other_config)
        assert caught.value.id == "one"
        async with await there.load("one") as handle:
            assert handle.key == one.key
        assert len(there.residency()) == 2
        one.release()
        two.release()


async def _attempt(there: AdapterLoader, *given: Any) -> None:
    (await there.load_tensors(*given)).release()


WRONG_CALLS = [
    (Path("mine"), {}, {}, InvalidAdapterIdError, "a str that is not empty"),
    ("", {}, {}, InvalidAdapterIdError, "a str that is not empty"),
    (AdapterRef("mine"), {}, {}, InvalidAdapterIdError, "a str that is not empty"),
    ("mine", [torch.zeros(1)], {}, UsageError, "a dict of torch tensors by name, not list"),
    ("mine", {"x": [1.0]}, {}, UsageError, "tensor 'x' is no torch tensor, but list"),
    ("mine", {1: torch.zeros(1)}, {}, UsageError, "tensors have names, not 1"),
    ("mine", {}, "{}", UsageError, "a dict as in adapter_config.json, or a peft.LoraConfig"),
    ("mine", {"x": torch.zeros(1, device="meta")}, {}, UsageError, "no plain bytes"),
    ("mine", {"x": torch.zeros(2, 2).to_sparse()}, {}, UsageError, "no plain bytes"),
]


@pytest.mark.parametrize(("name", "given", "config", "kind", "problem"), WRONG_CALLS)
async def test_a_wrong_call_says_what_is_right(
    name: Any, given: Any, config: Any, kind: type[UsageError], problem: str
) -> None:
    async with loader() as there:
        with pytest.raises(kind, match=problem):
            await _attempt(there, name, given, config)
        assert used(there) == 0


async def test_only_an_open_loader_takes_any() -> None:
    there = loader()
    with pytest.raises(UsageError, match="enter the loader"):
        await _attempt(there, "mine", tiny.tensors(0), tiny.config())
    async with there:
        pass
    with pytest.raises(LoaderClosedError):
        await _attempt(there, "mine", tiny.tensors(0), tiny.config())
    with pytest.raises(UsageError, match="memory_bytes must be an integer of at least 0"):
        LoaderConfig(memory_bytes=-1)
    async with loader(memory_bytes=0) as there:
        assert not is_resident(there, "mine")
        with pytest.raises(CapacityError):
            await _attempt(there, "mine", tiny.tensors(0), tiny.config())
        assert state(there, "mine") == "nowhere"
