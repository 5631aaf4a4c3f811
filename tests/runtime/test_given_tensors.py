"""Adapters from tensors: equal to the same adapter in files, kept while named, refused cleanly."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cancellation_sweep import Bench, cancel_at, count_steps, local_bench, raising, released
from event_loops import until
from tensor_adapters import FILE, acquired, assert_means, give, held_bytes, put, used
from tiny_loaders import ONE, fails, loader, on_device
from tiny_sources import make_source, over, state, where

from lorax_async import AdapterHandle, AdapterRef, Limits, LoaderConfig, errors

pytestmark = pytest.mark.usefixtures("nothing_left")

OLD, NEW = tiny.tensors(1), tiny.tensors(2)


async def test_every_call_finds_given_tensors_by_their_name(tmp_path: Path) -> None:
    given = tiny.tensors(5)
    async with over(make_source(tmp_path)) as there:
        first = await there.load_tensors("mine", given, tiny.config())
        calls = [there.load("mine"), there.load("mine", token="anybody's"), there.load(first.key)]
        for handle in (acquired(there), *[await call for call in calls]):
            assert (handle.key, handle.slot) == (first.key, first.slot)
            handle.release()
        async with there.stream("mine") as handle:
            await handle.layer_ready(3)
            tiny.assert_holds(handle, given)
        await there.pin("mine")
        assert where(there, "mine").pins == 1
        assert there.unpin("mine")
        await there.prefetch(["mine"])
        await there.prefetch("mine", tier="host")
        assert there.placement().story("mine")[0].key == first.key
        await fails(there.load("mine", revision="main"), errors.AdapterNotFoundError)
        first.release()


@pytest.mark.parametrize(("device", "stored"), [("cpu", "bfloat16"), ("simulated", "float32")])
async def test_evicted_tensors_come_back_the_same(tmp_path: Path, device: str, stored: str) -> None:
    given, config = tiny.tensors(5), tiny.config(use_rslora=True)
    async with over(
        make_source(tmp_path, "a", "b"), max_slots=2, device=device, dtype=stored
    ) as there:
        (await there.load_tensors("mine", given, config)).release()
        for tensor in given.values():
            tensor.fill_(7)  # the caller trains on
        for _ in range(3):
            for name in "ab":
                (await there.load(name)).release()
            found = where(there, "mine")
            assert (found.tier, found.state, found.device_bytes) == ("host", "held", 0)
            assert found.host_bytes == used(there) > sum(t.nbytes for t in given.values())
            async with await there.load("mine") as handle:
                tiny.assert_holds(handle, tiny.tensors(5))
                assert {module.scale for module in handle.modules.values()} == {8 / 4**0.5}
                assert where(there, "mine").device_bytes >= ONE // 2
        assert there.statistics().fetches == 3


async def test_unloaded_tensors_are_gone_and_the_name_is_free(tmp_path: Path) -> None:
    source = make_source(tmp_path, "mine", "b")
    async with over(source) as there:
        (await there.load("mine")).release()
        async with await give(there, 5) as first:
            tiny.assert_holds(first, tiny.tensors(5))
            key = first.key
        await there.pin("mine")
        await there.unload("mine")
        assert key not in there.placement().adapters
        assert used(there) == 0
        await fails(there.load(key), errors.AdapterNotFoundError, "pass them again")
        async with await there.load("mine") as handle:  # the source's, as before
            tiny.assert_equal_to_file(handle, tmp_path / "mine")
        source.remove("mine")
        async with await give(there, 5) as handle:
            assert (handle.key, handle.resident) == (key, True)
            tiny.assert_holds(handle, tiny.tensors(5))
        await there.unload(key)
        await fails(there.load("mine"), errors.AdapterNotFoundError)
        assert used(there) == 0


async def test_equal_content_is_one_adapter_until_its_last_name_goes(tmp_path: Path) -> None:
    given = tiny.tensors(5)
    async with over(make_source(tmp_path)) as there:
        names = [f"mine {n}" for n in range(6)] + ["mine 0"]
        calls = [there.load_tensors(name, dict(given), tiny.config()) for name in names]
        handles = await asyncio.gather(*calls)
        (key,) = {handle.key for handle in handles}
        assert {handle.slot for handle in handles} == {handles[0].slot}
        assert there.statistics().loads == 1
        assert used(there) == where(there, key).host_bytes
        for handle in handles:
            handle.release()
        for name in names[:5]:
            await there.unload(name)
            assert used(there) > 0
            await assert_means(there, "mine 5", 5)
        await there.unload("mine 5")
        assert used(there) == 0


LAYER = "model.layers.0.self_attn.q_proj"


def _without(name: str) -> dict[str, torch.Tensor]:
    return {other: tensor for other, tensor in NEW.items() if name not in other}


def _with(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return NEW | {f"base_model.model.{name}": tensor}


REFUSED: list[tuple[Any, Any, type[errors.LoraxError], str]] = [
    ([torch.zeros(1)], {}, errors.UsageError, "a dict of torch tensors by name, not list"),
    ({"x": [1.0]}, {}, errors.UsageError, "tensor 'x' is not a torch tensor, but list"),
    ({1: torch.zeros(1)}, {}, errors.UsageError, "tensor names must be str, not 1"),
    ({}, "{}", errors.UsageError, "a dict as in adapter_config.json, or a peft.LoraConfig"),
    ({"x": torch.zeros(1, device="meta")}, {}, errors.UsageError, "no plain bytes"),
    ({"x": torch.zeros(2, 2).to_sparse()}, {}, errors.UsageError, "no plain bytes"),
    (NEW, {"peft_type": None}, errors.AdapterFormatError, "no 'peft_type'"),
    (NEW, {"r": 5}, errors.AdapterFormatError, "rank|shape"),
    (NEW, {"bias": "all"}, errors.UnsupportedAdapterError, "trained biases"),
    (NEW, {"lora_alpha": float("nan")}, errors.AdapterFormatError, "cannot be written.*JSON"),
    (NEW, {"what": object()}, errors.AdapterFormatError, "object has no JSON equivalent"),
    (NEW, {"x": "y" * (256 << 10)}, errors.AdapterFormatError, "adapter_config.json"),
    ({}, {}, errors.AdapterFormatError, "no tensor"),
    (_without("0.self_attn.q_proj.lora_A"), {}, errors.AdapterFormatError, "no A beside it"),
    (_with("x.lora_A.weight", torch.ones(4, 3)), {}, errors.LoraxError, "x"),
    (_with(f"{LAYER}.lora_A.default.weight", torch.ones(4, 32)), {}, errors.UnsupportedAdapterError,
     "get_peft_model_state_dict"),
    (_with("lm_head.weight", torch.ones(4, 32)), {}, errors.IncompatibleAdapterError, "such module"),
    (_with(f"{LAYER}.lora_A.weight", torch.ones(4, 31)), {}, errors.IncompatibleAdapterError, "31"),
    (_with(f"{LAYER}.lora_A.weight", torch.ones(4, 32).double()), {}, errors.UnsupportedAdapterError,
     "float64; pass it as torch.float32, torch.float16, torch.bfloat16"),
]  # fmt: skip
LIMITS = [
    (Limits(max_tensors=15), "16 tensors are over the limit of 15"),
    (Limits(max_rank=3), "r is 4, above the limit of 3"),
    (Limits(max_adapter_bytes=9000), "bytes in its tensors, over the limit of 9,000"),
]


@pytest.mark.parametrize(
    ("given", "changes", "kind", "problem", "limits"),
    [(*refused, Limits()) for refused in REFUSED]
    + [(NEW, {}, errors.UnsupportedAdapterError, problem, limits) for limits, problem in LIMITS],
)
async def test_what_is_no_adapter_for_this_base_is_refused(
    given: Any, changes: Any, kind: type[errors.LoraxError], problem: str, limits: Limits
) -> None:
    config: Any = tiny.config(**changes) if isinstance(changes, dict) else changes
    async with loader(limits=limits) as there:
        for verb in (there.load_tensors, there.replace):
            error = await fails(verb("mine", given, config), kind, problem)
            assert error.id in {"mine", None}
        assert not there.placement().adapters
        assert used(there) == 0


async def test_only_an_open_loader_with_memory_takes_tensors_by_a_str() -> None:
    there = loader()
    await fails(give(there, 0), errors.UsageError, "enter the loader")
    async with there:
        pass
    for call in (give, put):
        await fails(call(there, 0), errors.LoaderClosedError)
    with pytest.raises(errors.UsageError, match="memory_bytes must be an integer of at least 0"):
        LoaderConfig(memory_bytes=-1)
    async with loader(memory_bytes=0) as there:
        names: list[Any] = [Path("mine"), "", AdapterRef("mine")]
        for name in names:
            await fails(give(there, 0, name), errors.InvalidAdapterIdError, "a non-empty str")
        await fails(give(there, 0), errors.CapacityError)
        assert state(there, "mine") == "nowhere"


async def test_tensors_beyond_the_memory_are_refused_by_the_setting() -> None:
    with pytest.raises(errors.ConfigError, match="spill=True was removed.* Raise memory_bytes"):
        LoaderConfig(spill=True)
    async with loader(memory_bytes=FILE + FILE // 2) as there:
        (await give(there, 0)).release()
        await fails(give(there, 1, "other"), errors.CapacityError, "memory_bytes .*unload")
        await fails(put(there, 1), errors.CapacityError, "memory_bytes .*unload")
        await assert_means(there, "mine", 0)
        await there.unload("mine")
        (await give(there, 1, "other")).release()
        await assert_means(there, "other", 1)


VERBS = ["load_tensors", "replace", "replace a source's"]


class Call:
    """One of the three ways to give tensors, on a bench; `name` is the id it is about."""

    def __init__(self, bench: Bench, verb: str) -> None:
        self.bench = bench
        self.verb = verb
        self.loader = bench.loader
        self.name: Any = bench.adapter if verb.startswith("replace a") else "mine"

    async def prepare(self) -> None:
        """Give the id its meaning before."""
        if self.verb == "replace":
            (await self.loader.load_tensors("mine", OLD, tiny.config())).release()
        elif self.name != "mine":
            (await self.loader.load(self.name)).release()

    async def __call__(
        self, given: Mapping[str, torch.Tensor] = NEW, timeout: float = 20
    ) -> AdapterHandle:
        verb = self.loader.load_tensors if self.verb == "load_tensors" else self.loader.replace
        return await verb(self.name, given, tiny.config(), timeout=timeout)

    async def assert_nothing_changed(self) -> None:
        """A thread that was copying gives back its room; the id means what it did."""
        await until(self._is_as_before)
        await self.bench.assert_clean()
        if self.verb == "load_tensors":
            assert not self.loader.placement().adapters
        elif self.verb == "replace":
            await assert_means(self.loader, "mine", 1)
        else:
            async with await self.loader.load(self.name) as handle:
                tiny.assert_equal_to_file(handle, self.bench.adapter)
        assert len(on_device(self.loader)) == (self.verb != "load_tensors")

    def _is_as_before(self) -> bool:
        found = self.loader.placement().adapters.values()
        filling = any(where.state == "filling" for where in found)
        in_memory = sum(where.host_bytes > 0 for where in found)
        as_before = in_memory == (self.verb == "replace")
        return used(self.loader) == held_bytes(self.loader) and as_before and not filling


@asynccontextmanager
async def prepared(tmp_path: Path, verb: str) -> AsyncIterator[Call]:
    async with local_bench(tmp_path) as bench:
        call = Call(bench, verb)
        await call.prepare()
        yield call


@pytest.mark.parametrize("verb", VERBS)
async def test_tensors_cancelled_at_every_await_change_nothing(tmp_path: Path, verb: str) -> None:
    async with prepared(tmp_path / "counted", verb) as call:
        steps = await count_steps(released(call()))
    assert steps >= 3, "the copies, and the device, are waited for"
    async with prepared(tmp_path, verb) as call:
        for step in range(1, steps + 1):
            if not await cancel_at(call(), step):
                assert step > 3
                return
            await call.assert_nothing_changed()
        async with await call() as handle:
            tiny.assert_holds(handle, NEW)


STEPS = {
    "measure": "lorax_async.sources.tensors.TensorSnapshot.measure",
    "copy": "lorax_async.sources.tensors.TensorSnapshot.copy",
    "hash": "lorax_async.sources.tensors.StagingBuffer.of",
    "open": "lorax_async.sources.tensors.HostCopy.open",
    "plan": "lorax_async.runtime.fetches.TransferPlanner.plan",
    "read": "lorax_async.sources.tensors.CopyReader.read_into",
    "to device": "lorax_async.devices.cpu.CpuDevice.copy",
    "exchange": "lorax_async.runtime.resolver.AssignedIds.assign",
}


@pytest.mark.parametrize("error", [errors.FetchError("ordered"), RuntimeError("a foreign fault")])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("verb", VERBS)
async def test_an_error_at_every_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, step: str, error: Exception
) -> None:
    async with prepared(tmp_path, verb) as call:
        with monkeypatch.context() as patch:
            patch.setattr(STEPS[step], raising(error))
            caught = await fails(call(), errors.LoraxError)
        if isinstance(error, errors.LoraxError):
            assert type(caught) is errors.FetchError
        else:
            assert isinstance(caught, errors.InternalError | errors.TransferError)
            assert caught.__cause__ is error
        assert caught.id == str(call.name)
        await call.assert_nothing_changed()
        async with await call() as handle:
            tiny.assert_holds(handle, NEW)


@pytest.mark.parametrize("late", [0, 1, 2, 5, 0.005])
@pytest.mark.parametrize("verb", VERBS)
async def test_a_loader_that_closes_keeps_no_bytes(tmp_path: Path, verb: str, late: float) -> None:
    async with prepared(tmp_path, verb) as call:
        tasks = [asyncio.create_task(call(tiny.tensors(n))) for n in range(4)]
        if late < 1:
            await asyncio.sleep(late)
        for _ in range(int(late)):
            await asyncio.sleep(0)
        await call.loader.close(timeout=0.01)
        for task in tasks:
            with suppress(errors.LoaderClosedError, errors.UsageError):
                (await task).release()
        assert used(call.loader) == 0


async def test_a_machine_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory = RuntimeError("DefaultCPUAllocator: not enough memory")
    async with loader() as there:
        with monkeypatch.context() as patch:
            patch.setattr("lorax_async.sources.tensors.torch.empty", raising(no_memory))
            error = await fails(give(there, 2), errors.CapacityError, "no host memory")
        assert error.id == "mine"
        assert used(there) == 0
