"""WeightsFile: opened once, checked, read tensor by tensor; LoraWeights made straight from it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import small_base as base
from common import Run, open_files, until
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights, WeightsFile
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
)
from lorax_async.io.sources import checked_open

pytestmark = pytest.mark.usefixtures("nothing_left")

WEIGHTS = "adapter_model.safetensors"
A, B = base.key(0, "q_proj", "A"), base.key(0, "q_proj", "B")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj", "v_proj"]))


@contextmanager
def opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Which files were opened to be read, and in which threads."""
    seen: list[tuple[str, int]] = []
    real = os.open

    def watched(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = real(path, flags, *args, **kwargs)
        if not flags & os.O_PATH:
            seen.append(
                (os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), threading.get_ident())
            )
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        yield seen


# -- one file -------------------------------------------------------------------------------------


def test_it_holds_what_safetensors_reads(folder: Path) -> None:
    saved = load_file(folder / WEIGHTS)
    with WeightsFile.open(folder) as file:
        assert set(file) == set(saved)
        assert len(file) == 12
        assert A in file
        assert "x" not in file
        for key, tensor in saved.items():
            assert file.shape(key) == tuple(tensor.shape)
            assert file.dtype(key) is torch.float32
            assert torch.equal(file.read(key), tensor)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(840, 8),
        torch.zeros(8, 840, dtype=torch.float16),
        torch.zeros(840, 8).T,
        torch.zeros(8, 840, device="meta"),
    ],
)
def test_a_target_fits_exactly(folder: Path, target: torch.Tensor) -> None:
    with WeightsFile.open(folder) as file, pytest.raises(UsageError, match="does not fit"):
        file.read_into(A, target)


def test_names_it_does_not_have(folder: Path) -> None:
    with WeightsFile.open(folder) as file, pytest.raises(UsageError, match="no tensor 'x'"):
        file.read("x")


def test_closed_it_reads_nothing(folder: Path) -> None:
    file = WeightsFile.open(folder)
    file.close()
    file.close()
    with pytest.raises(FetchError, match="closed"):
        file.read(A)


def test_a_file_that_changed_is_no_mixture(folder: Path) -> None:
    with WeightsFile.open(folder) as file:
        with (folder / WEIGHTS).open("r+b") as there:
            there.seek(-1, os.SEEK_END)
            there.write(b"x")
        with pytest.raises(IntegrityError, match="changed"):
            file.read(A)


def _spoil(folder: Path, how: str) -> None:
    path = folder / WEIGHTS
    made = load_file(path)
    path.unlink()
    if how == "cut":
        save_file(made, path)
        os.truncate(path, path.stat().st_size - 1)
    elif how == "none":
        save_file({}, path)
    elif how == "flat":
        save_file(made | {A: torch.zeros(8)}, path)
    elif how == "int":
        save_file(made | {A: torch.zeros(8, 840, dtype=torch.int8)}, path)
    elif how == "dora":
        save_file(made | {A[: -len("A.weight")] + "magnitude_vector": torch.zeros(8)}, path)
    elif how == "long name":
        save_file(made | {"x" * 600: torch.zeros(1)}, path)
    elif how == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("missing", AdapterNotFoundError, WEIGHTS),
        ("cut", AdapterFormatError, "fetch it again"),
        ("none", AdapterFormatError, "no tensors"),
        ("flat", AdapterFormatError, r"shape \[8\]"),
        ("int", UnsupportedAdapterError, "I8"),
        ("dora", UnsupportedAdapterError, "DoRA"),
        ("long name", AdapterFormatError, "512"),
        ("pickle", AdapterFormatError, "pickle"),
    ],
)
def test_strange_files_are_refused_and_closed(
    folder: Path, how: str, kind: type[LoraxError], text: str
) -> None:
    _spoil(folder, how)
    before = open_files()
    with pytest.raises(kind, match=text) as caught:
        WeightsFile.open(folder)
    assert caught.value.id == str(folder)
    assert open_files() == before


def test_a_header_that_is_longer_than_the_first_read(tmp_path: Path) -> None:
    made = {
        f"base_model.model.{'x' * 400}.{n}.lora_{part}.weight": torch.full((1, 1), float(n))
        for n in range(150)
        for part in "AB"
    }
    folder = base.write(tmp_path / "long", made, 1)
    assert int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little") > 128 << 10
    with WeightsFile.open(folder) as file:
        assert len(file) == 300
        assert file.read(f"base_model.model.{'x' * 400}.149.lora_B.weight").item() == 149


# -- LoraWeights from it --------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 16, 64, 160])
def test_the_same_as_from_tensors(
    tmp_path: Path, world_size: int, stored: torch.dtype, rank: int
) -> None:
    folder = base.write(
        tmp_path / "a", base.tensors(rank, dtype=stored, skip=[(1, "v_proj")]), rank
    )
    config, saved = LoraConfig.load(folder), load_file(folder / WEIGHTS)
    model = LayoutModel(base.layout(), torch.bfloat16, world_size, world_size - 1)
    with WeightsFile.open(folder) as file:
        from_file, names = config.map_weights_for_model(file, model.weight_names)
        from_memory, _ = config.map_weights_for_model(saved, model.weight_names)
        assert from_file["lm_head"]["lora_A"] == (file, "base_model.model.lm_head.lora_A.weight")
        for layer_type in base.SHAPES:
            ours = LoraWeights.load(config, model, from_file, layer_type, names)
            theirs = LoraWeights.load(config, model, from_memory, layer_type, set())
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.weights_a, theirs.weights_a)
            assert torch.equal(ours.weights_b, theirs.weights_b)
    assert not names


def test_the_file_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    with opens(monkeypatch) as seen, WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        seen.clear()  # the config's and the weights' permissions are looked at, by opening them
        for layer_type in base.SHAPES:
            LoraWeights.load(config, model, module_map, layer_type, names)
    assert seen == []


def test_a_file_that_is_closed_meanwhile(folder: Path) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    with WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
    with pytest.raises(FetchError, match="closed"):
        LoraWeights.load(config, model, module_map, "q_proj", names)
    assert len(names) == 12


# -- on a loop ------------------------------------------------------------------------------------


async def _load_all(folder: Path, model: Any) -> dict[str, LoraWeights | None]:
    config = await LoraConfig.load_async(folder, None)
    loaded = {}
    with await WeightsFile.open_async(folder, None) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        for layer_type in base.SHAPES:
            loaded[layer_type] = await config.load_batched_adapter_weights_async(
                model, module_map, layer_type, names, True
            )
    assert not names
    return loaded


def test_no_file_is_touched_on_the_loops_thread(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[int] = []
    real = checked_open.FileReader.read_into

    def watched(self: Any, *args: Any) -> None:
        readers.append(threading.get_ident())
        real(self, *args)

    monkeypatch.setattr(checked_open.FileReader, "read_into", watched)
    with opens(monkeypatch) as seen:
        loaded = run(_load_all(folder, base.FakeModel()))
    assert {name for name, _ in seen} == {"adapter_config.json", WEIGHTS}
    here = threading.get_ident()
    assert here not in {thread for _, thread in seen}
    assert len(readers) == 1 + 12  # the header, and every tensor
    assert here not in readers
    saved = load_file(folder / WEIGHTS)
    weights = loaded["v_proj"]
    assert weights is not None
    for layer in range(base.LAYERS):
        b = saved[base.key(layer, "v_proj", "B")]
        assert torch.equal(weights.weights_b_t[layer], 2 * b)
    assert loaded["lm_head"] is loaded["down_proj"] is None


def test_the_loop_goes_on_while_a_thread_reads(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is held until the loop has turned: a call that held the loop would never end."""
    turned = threading.Event()
    real = checked_open.FileReader.read_into

    def held(self: Any, *args: Any) -> None:
        assert turned.wait(20)
        real(self, *args)

    async def body() -> None:
        loading = asyncio.create_task(_load_all(folder, base.FakeModel()))
        await asyncio.sleep(0.01)
        turned.set()
        await loading

    monkeypatch.setattr(checked_open.FileReader, "read_into", held)
    run(body())


class Held:
    """Threads that have read and wait, until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.may_go_on, self.reads, self.after = threading.Event(), 0, after
        real = checked_open.FileReader.read_into

        def held(reader: Any, *args: Any) -> None:
            real(reader, *args)
            self.reads += 1
            if self.reads > self.after:
                assert self.may_go_on.wait(20)

        monkeypatch.setattr(checked_open.FileReader, "read_into", held)

    async def cancel(self, task: asyncio.Task[Any]) -> None:
        await until(lambda: self.reads > self.after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_cancelled_opening_leaves_no_file_open(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    held = Held(monkeypatch, 0)

    async def body() -> None:
        await held.cancel(asyncio.create_task(WeightsFile.open_async(folder, None)))
        assert open_files() > before
        held.may_go_on.set()
        await until(lambda: open_files() == before)

    run(body())


def test_a_cancelled_load_stops_at_the_next_layer(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    held = Held(monkeypatch, 2)  # the header, and the first layer's A

    async def body() -> None:
        with WeightsFile.open(folder) as file:
            module_map, names = config.map_weights_for_model(file, model.weight_names)
            load = LoraWeights.load_async(config, model, module_map, "q_proj", names)
            await held.cancel(asyncio.create_task(load))
            held.may_go_on.set()
            await asyncio.get_running_loop().shutdown_default_executor()
            assert held.reads == 3
            assert len(names) == 12

    run(body())


def test_a_call_that_is_cancelled_before_its_thread_begins(run: Run, folder: Path) -> None:
    async def body() -> None:
        opening = asyncio.create_task(WeightsFile.open_async(folder, None))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.get_running_loop().shutdown_default_executor()

    run(body())
