"""On a loop: files are opened and read in threads, and a cancelled call leaves nothing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import small_base as base
from adapters.opened import opens
from common import open_files, until
from lorax_async.adapters import LoraConfig, LoraWeights, WeightsFile
from lorax_async.adapters.loading.threads import in_thread
from lorax_async.io.sources import checked_open

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj", "v_proj"]))


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


async def test_no_file_is_touched_on_the_loops_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[int] = []
    real = checked_open.FileReader.read_into

    def watched(self: Any, *args: Any) -> None:
        readers.append(threading.get_ident())
        real(self, *args)

    monkeypatch.setattr(checked_open.FileReader, "read_into", watched)
    with opens(monkeypatch) as seen:
        loaded = await _load_all(folder, base.FakeModel())
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


async def test_the_loop_goes_on_while_a_thread_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is held until the loop has turned: a call that held the loop would never end."""
    turned = threading.Event()
    real = checked_open.FileReader.read_into

    def held(self: Any, *args: Any) -> None:
        assert turned.wait(20)
        real(self, *args)

    monkeypatch.setattr(checked_open.FileReader, "read_into", held)
    loading = asyncio.create_task(_load_all(folder, base.FakeModel()))
    await asyncio.sleep(0.01)
    turned.set()
    await loading


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


async def test_a_cancelled_opening_leaves_no_file_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    held = Held(monkeypatch, 0)
    await held.cancel(asyncio.create_task(WeightsFile.open_async(folder, None)))
    assert open_files() > before
    held.may_go_on.set()
    await until(lambda: open_files() == before)


async def test_a_cancelled_load_stops_at_the_next_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    held = Held(monkeypatch, 2)  # the header, and the first layer's A
    with WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        load = LoraWeights.load_async(config, model, module_map, "q_proj", names)
        await held.cancel(asyncio.create_task(load))
        held.may_go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        assert held.reads == 3
        assert len(names) == 12


async def test_a_call_that_is_cancelled_before_its_thread_begins() -> None:
    busy, begun = threading.Event(), list[int]()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    loop.run_in_executor(None, busy.wait)
    call = asyncio.create_task(in_thread(lambda _: begun.append(1)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    busy.set()
    await loop.shutdown_default_executor()
    assert begun == []
