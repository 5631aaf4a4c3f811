"""Plans of shards: every tensor is cut, and moved by itself, which takes a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from lorax_async import AdapterLoader, LoaderConfig
from lorax_async.config import Shard
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.transfer_plan import plan_transfer
from lorax_async.runtime import planning

Run = Callable[[Coroutine[Any, Any, Any]], Any]
LAYERS, RANK = 3, 4


def layout() -> ModelLayout:
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
    modules = (Module(name, 4, 4, layer, Parallel.ROW) for layer, name in enumerate(names))
    return ModelLayout(tuple(modules), LAYERS, "F32")


def write(folder: Path) -> Path:
    tiny.write(folder, rank=RANK, target_modules=["o_proj"])
    tensors = {}
    for module in layout().modules:
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = torch.zeros(RANK, 4)
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = torch.zeros(4, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("shard", "thread"), [(None, "MainThread"), (Shard(1, 2), "lorax-metadata")]
)
async def test_many_moves_are_not_planned_on_the_loop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard: Shard | None,
    thread: str,
) -> None:
    """And once for all who are alike."""
    threads: list[str] = []

    def noted(*args: Any, **settings: Any) -> Any:
        threads.append(threading.current_thread().name)
        return plan_transfer(*args, **settings)

    monkeypatch.setattr(planning, "plan_transfer", noted)
    folders = [write(tmp_path / name) for name in ("a", "b")]
    config = LoaderConfig(shard=shard, device_bytes=1 << 20)
    async with AdapterLoader(layout(), config) as loader:
        for folder in folders:
            async with await loader.load(folder) as handle:
                columns = 4 if shard is None else 2
                assert handle.modules[layout().modules[0].name].a.shape == (RANK, columns)
    assert len(threads) == 1
    assert threads[0].startswith(thread)
