"""Weights of files, in threads and on a device, and of what a loader holds; and their memory."""

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import small_base as base
import torch
from event_loops import Run, until
from late_device.world import LATE
from leaks import open_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_base import WEIGHTS, loaded

from engines.conftest import watched
from lorax_async import errors
from lorax_async.adapters.layers import LayoutModel
from lorax_async.adapters.lora import LoraConfig, LoraWeights
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.config import LoaderConfig, Shard
from lorax_async.errors import HandleClosedError, UnsupportedAdapterError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, Parallelism

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left")

A = base.key(0, "q_proj", "A")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj", "v_proj"]))


@contextmanager
def opens(monkeypatch: Patch) -> Iterator[list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    real = os.open

    def watched(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = real(path, flags, *args, **kwargs)
        if not flags & os.O_PATH:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            seen.append((name, threading.get_ident()))
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        yield seen


async def test_it_holds_what_safetensors_reads(folder: Path) -> None:
    saved = load_file(folder / WEIGHTS)
    moved = folder / "part-1.safetensors"
    moved.hardlink_to(folder / WEIGHTS)
    later = await WeightsFile.open_async(str(folder), None), await WeightsFile.at_async(str(moved))
    for opened in (WeightsFile.open(folder), WeightsFile.at(moved), *later):
        with opened as file:
            assert (set(file), len(file), A in file, "x" in file) == (set(saved), 12, True, False)
            for key, tensor in saved.items():
                assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), torch.float32)
                assert torch.equal(file.read(key), tensor)


def test_a_target_fits_and_a_file_that_changed_or_is_closed_gives_no_mixture(folder: Path) -> None:
    plain = torch.zeros(8, 840)
    with WeightsFile.open(folder) as file:
        for target in (plain.T, plain.half(), torch.zeros(840, 8).T, plain.to("meta")):
            with pytest.raises(errors.UsageError, match="does not fit"):
                file.read_into(A, target)
        with pytest.raises(errors.UsageError, match="no tensor 'x'"):
            file.read("x")
        with (folder / WEIGHTS).open("r+b") as there:
            there.seek(-1, os.SEEK_END)
            there.write(b"x")
        with pytest.raises(errors.IntegrityError, match="changed"):
            file.read(A)
    file.close()
    with pytest.raises(errors.FetchError, match="closed"):
        file.read(A)


STRANGE: list[tuple[str, Any, type[errors.LoraxError], str]] = [
    ("missing", None, errors.AdapterNotFoundError, WEIGHTS),
    ("cut", None, errors.AdapterFormatError, "fetch it again"),
    ("folder", None, errors.AdapterFormatError, "a folder"),
    ("pickle", None, errors.AdapterFormatError, "pickle"),
    ("none", {}, errors.AdapterFormatError, "no tensors"),
    ("flat", {A: torch.zeros(8)}, errors.AdapterFormatError, r"shape \[8\]"),
    ("int", {A: torch.zeros(8, 840, dtype=torch.int8)}, errors.UnsupportedAdapterError, "I8"),
    ("dora", {f"{A[:-9]}_magnitude_vector": torch.ones(8)}, errors.UnsupportedAdapterError, "DoRA"),
]


@pytest.mark.parametrize(("how", "content", "kind", "text"), STRANGE)
def test_odd_files_are_refused(folder: Path, how: str, content: Any, kind: Any, text: str) -> None:
    config, model, path = LoraConfig.load(folder), base.lorax_model(), folder / WEIGHTS
    module_map, names = config.map_weights_for_model(_lazily(path), model.weight_names)
    if how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    if content is not None:
        save_file(content, path)
    elif how == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"x")
    elif how == "folder":
        path.mkdir()
    before = open_files()
    with pytest.raises(kind, match=text) as caught:
        WeightsFile.open(folder)
    assert caught.value.id == str(folder)
    if how != "pickle":  # of which a path says nothing
        with pytest.raises(kind, match=text) as caught:
            LoraWeights.load(config, model, module_map, "q_proj", names)
        assert caught.value.id == str(path)
    assert open_files() == before
    assert len(names) == 12


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 16, 64, 160])
def test_as_from_tensors(tmp_path: Path, world_size: int, stored: torch.dtype, rank: int) -> None:
    made = base.tensors(rank, dtype=stored, skip=[(1, "v_proj")])
    folder = base.write(tmp_path / "a", made, rank)
    config = LoraConfig.load(folder)
    model = LayoutModel(base.layout(), torch.bfloat16, world_size, world_size - 1)
    with WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        assert module_map["lm_head"]["lora_A"] == (file, base.key(0, "lm_head", "A"))
        for layer_type in base.TYPES:
            ours = LoraWeights.load(config, model, module_map, layer_type, names)
            theirs = loaded(config, model, made, layer_type)
            assert ours is not None
            assert torch.equal(ours.weights_a, theirs.weights_a)
            assert torch.equal(ours.weights_b, theirs.weights_b)
    assert not names
    with pytest.raises(errors.FetchError, match="closed"):
        LoraWeights.load(config, model, module_map, "q_proj", names)


def _lazily(*paths: Path | str) -> dict[str, Path | str]:
    """As LoRAX's `load_module_map` does: every tensor's name, with the file that it is in."""
    found: dict[str, Path | str] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


@pytest.mark.parametrize("how", ["str", "Path", "split", "open"])
def test_each_file_is_opened_once(run: Run, folder: Path, monkeypatch: Patch, how: str) -> None:
    config, model, path = LoraConfig.load(folder), base.lorax_model(), folder / WEIGHTS
    saved = load_file(path)
    wanted = loaded(config, model, saved, "v_proj")
    paths: list[Any] = [str(path) if how == "str" else path]
    if how == "split":
        paths = [folder / "lora_A", folder / "lora_B"]
        for half in paths:
            save_file({name: one for name, one in saved.items() if half.name in name}, half)
    with WeightsFile.open(folder) as file:
        content: Any = file if how == "open" else _lazily(*paths)
        module_map, names = config.map_weights_for_model(content, model.weight_names)
        given = config, model, module_map, "v_proj", names
        for load in (LoraWeights.load, lambda *given: run(LoraWeights.load_async(*given))):
            with opens(monkeypatch) as seen:
                got = load(*given)
            assert got is not None
            assert len(seen) == (0 if how == "open" else len(paths))  # not for every module
            assert torch.equal(got.weights_a, wanted.weights_a)
            assert torch.equal(got.weights_b, wanted.weights_b)
    assert len(names) == 6


class Reads:
    """Reads of files: in which threads; from number `after` on they wait until they may go on."""

    def __init__(self, monkeypatch: Patch, after: int = 1 << 30) -> None:
        self.may_go_on, self.threads, self.after = threading.Event(), list[int](), after
        real = os.preadv

        def held(*args: Any) -> int:
            count = real(*args)
            self.threads.append(threading.get_ident())
            if len(self.threads) > self.after:
                assert self.may_go_on.wait(20)
            return count

        monkeypatch.setattr(os, "preadv", held)

    async def cancel(self, call: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(call)
        await until(lambda: len(self.threads) > self.after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _load_all(folder: Path, model: Any) -> dict[str, LoraWeights | None]:
    config = await LoraConfig.load_async(folder, None)
    with await WeightsFile.open_async(folder, None) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        load, given = config.load_batched_adapter_weights_async, (model, module_map)
        loaded = {kind: await load(*given, kind, names, True) for kind in base.TYPES}
    assert not names
    return loaded


@pytest.mark.each_loop
async def test_no_file_is_touched_on_the_loops_thread(folder: Path, monkeypatch: Patch) -> None:
    """A read is held until the loop has turned: a call that held the loop would never end."""
    reads, here = Reads(monkeypatch, 0), threading.get_ident()
    with opens(monkeypatch) as seen:
        loading = asyncio.create_task(_load_all(folder, base.lorax_model()))
        await until(lambda: reads.threads)
        reads.may_go_on.set()
        found = await loading
    assert {name for name, _ in seen} == {"adapter_config.json", WEIGHTS}
    assert here not in {thread for _, thread in seen} | set(reads.threads)
    assert len(reads.threads) == 2 + 12  # the config, the header, and every tensor
    weights = found["v_proj"]
    assert weights is not None
    b = load_file(folder / WEIGHTS)[base.key(2, "v_proj", "B")]
    assert torch.equal(weights.weights_b_t[2], 2 * b)
    assert found["lm_head"] is found["down_proj"] is None


@pytest.mark.each_loop
async def test_a_cancelled_opening_leaves_no_file_open(folder: Path, monkeypatch: Patch) -> None:
    before, reads = open_files(), Reads(monkeypatch, 0)
    for call in (WeightsFile.open_async(folder, None), WeightsFile.at_async(folder / WEIGHTS)):
        opened, reads.after = open_files(), len(reads.threads)
        await reads.cancel(call)
        assert open_files() > opened
    reads.may_go_on.set()
    await until(lambda: open_files() == before)


@pytest.mark.each_loop
async def test_a_cancelled_load_stops_at_the_next_layer(folder: Path, monkeypatch: Patch) -> None:
    config, model = LoraConfig.load(folder), base.lorax_model()
    reads = Reads(monkeypatch, 2)  # the header, and the first layer's A
    with WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        await reads.cancel(LoraWeights.load_async(config, model, module_map, "q_proj", names))
        reads.may_go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        assert (len(reads.threads), len(names)) == (3, 12)


async def test_a_call_cancelled_at_once_reads_nothing(folder: Path, monkeypatch: Patch) -> None:
    busy, loop = threading.Event(), asyncio.get_running_loop()
    for _ in range(64):  # more than an executor has threads
        loop.run_in_executor(None, busy.wait)
    with opens(monkeypatch) as seen:
        call = asyncio.create_task(WeightsFile.open_async(folder, None))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        busy.set()
        await loop.shutdown_default_executor()
    assert seen == []


class OnDevice(LayoutModel):
    @cached_property
    def target_to_layer(self) -> Any:
        weight = torch.empty(1, 1, dtype=torch.float32, device=LATE)
        layer = base.ParallelLayer(base_layer=base.BaseLayer(linear=base.Linear(weight=weight)))
        return {key: (name, layer) for key, (name, _) in super().target_to_layer.items()}


def now(tensor: torch.Tensor) -> torch.Tensor:
    """What its memory holds at this moment. Two of them differ without a diff of all their bytes."""
    content = bytearray(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return torch.frombuffer(content, dtype=tensor.dtype).view(tensor.shape)


Origin = Callable[[dict[str, torch.Tensor], WeightsFile], Any]
ORIGINS: dict[str, Origin] = {
    "file": lambda _, file: file,
    "host": lambda made, _: made,
    # Copies on the device run late; the caller may compute on any stream.
    "device": lambda made, _: {name: tensor.to(LATE) for name, tensor in made.items()},
}


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("world_size", "place"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("rank", [5, 8, 33])
def test_weights_are_on_the_device_on_return(
    tmp_path: Path, rank: int, world_size: int, place: int, origin: str
) -> None:
    made = base.tensors(rank, skip=[(1, "v_proj")])
    folder, config = base.write(tmp_path / "a", made, rank), base.config(rank, 2 * rank)
    given = base.layout(), torch.float32, world_size, place
    models = LayoutModel(*given), OnDevice(*given)
    with WeightsFile.open(folder) as file:
        content = ORIGINS[origin](made, file)
        for layer_type in base.TYPES:
            wanted = loaded(config, models[0], made, layer_type)
            got = loaded(config, models[1], content, layer_type)
            assert got.weights_a.device.type == got.weights_b.device.type == "late"
            for name in ("weights_a", "weights_b"):
                assert getattr(got, name).is_contiguous()
                assert torch.equal(now(getattr(got, name)), getattr(wanted, name))


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_as_from_the_file(tmp_path: Path, rank: int, device: str, monkeypatch: Patch) -> None:
    types = ["q_proj", "v_proj"]
    made = base.tensors(rank, dtype=torch.bfloat16, skip=[(1, "v_proj")], types=types)
    folder = base.write(tmp_path / "a", made, rank, use_rslora=True)
    model = LayoutModel(base.layout("BF16"), torch.bfloat16, 1)
    uses = watched(monkeypatch, AdapterHandle, "use")
    settings = LoaderConfig(device=device, device_bytes=8 << 20, max_slots=2)
    loader = AdapterLoader(base.layout("BF16"), settings)
    async with loader, await loader.load(folder) as handle:
        for layer_type in ("q_proj", "v_proj"):
            wanted = loaded(LoraConfig.load(folder), model, made, layer_type)
            plain = LoraWeights.from_adapter(handle, layer_type)
            uses.clear()
            in_thread = await LoraWeights.from_adapter_async(handle, layer_type)
            # The slot is in use while it is copied, and elsewhere than on the loop.
            assert [use.thread == threading.get_ident() for use in uses] == [False]
            for got in (plain, in_thread):
                assert got is not None
                assert torch.equal(got.weights_a, wanted.weights_a)
                assert torch.equal(got.weights_b, wanted.weights_b)
                config = got.adapter_config
                assert (config.r, config.padded_rank) == (rank, wanted.adapter_config.padded_rank)
                assert config.lora_alpha / rank == pytest.approx(16 / rank**0.5)
        assert LoraWeights.from_adapter(handle, "lm_head") is None
        with pytest.raises(UsageError, match="no layer type 'k_proj'"):
            LoraWeights.from_adapter(handle, "k_proj")
        kept = LoraWeights.from_adapter(handle, "q_proj")
    with pytest.raises(HandleClosedError):
        LoraWeights.from_adapter(handle, "q_proj")
    assert kept is not None
    assert torch.equal(kept.weights_a_t[2, :rank], made[base.key(2, "q_proj", "A")])


@pytest.mark.parametrize("world_size", [1, 2])
async def test_a_shard_is_refused(tmp_path: Path, world_size: int) -> None:
    folder = base.write(tmp_path / "a", base.tensors(types=["q_proj"]))
    settings = LoaderConfig(device_bytes=8 << 20, shard=Shard(world_size - 1, world_size))
    loader = AdapterLoader(base.layout(), settings)
    async with loader, await loader.load(folder) as handle:
        if world_size == 1:
            assert LoraWeights.from_adapter(handle, "q_proj") is not None
        else:
            with pytest.raises(UsageError, match=r"one shard.*LoraWeights.load"):
                await LoraWeights.from_adapter_async(handle, "q_proj")


Q = f"base_model.model.{base.module_name(0, 'q_proj')}"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_"
EMBEDDED = {f"{EMBEDDING}A": torch.ones(8, 100), f"{EMBEDDING}B": torch.ones(840, 8)}


@pytest.mark.parametrize(
    ("more", "config", "feature"),
    [
        ({f"{Q}.lora_B.bias": torch.ones(840)}, {"lora_bias": True}, "lora_bias"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(840)}, {"use_dora": True}, "DoRA"),
        (EMBEDDED, {"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
    ],
)
async def test_more_than_a_and_b_fails(
    tmp_path: Path, more: dict[str, torch.Tensor], config: dict[str, Any], feature: str
) -> None:
    made = base.tensors(types=["q_proj"], skip=[(1, "q_proj"), (2, "q_proj")])
    folder = base.write(tmp_path / "a", made | more, **config)
    embedding = Module("model.embed_tokens", 100, 840, -1, Parallelism.REPLICATED, embedding=True)
    small = base.layout()
    layout = ModelLayout((embedding, *small.modules), small.num_layers, "F32", "model.")
    loader = AdapterLoader(layout, LoaderConfig(device_bytes=8 << 20))
    async with loader, await loader.load(folder) as handle:
        with pytest.raises(UnsupportedAdapterError, match=feature):
            LoraWeights.from_adapter(handle, "q_proj")


PEAK_LAYERS, PEAK_FEATURES, PEAK_RANK = 24, 8192, 64
MIB = 1 << 20


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _peak(load: Callable[[], LoraWeights | None]) -> int:
    load()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    weights = load()
    assert weights is not None
    return _memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "world_size", "resident"),
    [("bfloat16", 1, False), ("float32", 1, False), ("bfloat16", 2, False), ("bfloat16", 1, True)],
)
async def test_the_peak(tmp_path: Path, stored: str, world_size: int, resident: bool) -> None:
    modules, made = list[Module](), dict[str, torch.Tensor]()
    for layer in range(PEAK_LAYERS):
        name = f"layers.{layer}.q_proj"
        modules.append(Module(name, PEAK_FEATURES, PEAK_FEATURES, layer, Parallelism.COLUMN))
        made |= base.pair(name, PEAK_FEATURES, PEAK_FEATURES, PEAK_RANK)
    dtype: torch.dtype = getattr(torch, stored)
    given = {name: tensor.to(dtype) for name, tensor in made.items()}
    folder = base.write(tmp_path / "a", given, PEAK_RANK, target_modules=["q_proj"])
    del made, given
    layout, config = ModelLayout(tuple(modules), PEAK_LAYERS, "BF16"), LoraConfig.load(folder)
    model = LayoutModel(layout, torch.bfloat16, world_size)
    if resident:
        settings = LoaderConfig(device_bytes=64 << 20, max_slots=1)
        async with AdapterLoader(layout, settings) as loader, await loader.load(folder) as handle:
            peak = _peak(lambda: LoraWeights.from_adapter(handle, "q_proj"))
    else:
        with WeightsFile.open(folder) as file:
            peak = _peak(lambda: base.load(config, model, file, "q_proj"))
    result = PEAK_LAYERS * 2 * PEAK_FEATURES * PEAK_RANK * 2 // world_size
    one_layer = 2 * PEAK_FEATURES * PEAK_RANK * dtype.itemsize
    # A list of one type's layers would be another 48 MiB; the interpreter's own noise is not.
    allowed = result + one_layer * (1 if world_size == 1 else 2) + 2 * MIB
    assert result - 2 * MIB < peak <= allowed
