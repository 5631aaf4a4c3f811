"""What Ray LLM's adapters are checked for before its engine gets them; `make ray` has the rest."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from adapter_files import pad_header
from fastapi import HTTPException
from safetensors.torch import load, save_file

from lorax_async import AdapterStore, Limits, StoreConfig
from lorax_async.engines.ray.ray_llm import model_downloader

BASE = {
    "model_type": "llama",
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 2 * tiny.HIDDEN,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": tiny.HIDDEN // 2,
    "vocab_size": 16,
}
"""A base of which `tiny`'s adapters are."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def llm_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray LLM's config of a replica, with its private modules as far as they are used."""
    module = SimpleNamespace(
        global_id_manager=SimpleNamespace(next=count(1).__next__), DiskMultiplexConfig=Found
    )
    serve = "ray.llm._internal.serve"
    for name in (
        *("ray", "ray.llm", "ray.llm._internal", "ray.llm._internal.common"),
        *("ray.llm._internal.common.models", serve, f"{serve}.core", f"{serve}.core.configs"),
        f"{serve}.core.configs.llm_config",
    ):
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE))
    return SimpleNamespace(
        model_id="base",
        model_loading_config=SimpleNamespace(model_source=str(tmp_path / "base")),
        engine_kwargs={"max_lora_rank": 8},
        lora_config=SimpleNamespace(dynamic_lora_loading_path=None),
    )


class Found:
    def __init__(self, **values: Any) -> None:
        self.local_path: str = values["local_path"]


@pytest.fixture
async def stores(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[AdapterStore]]:
    """The stores that open meanwhile; a replica's end with its process."""
    opened, enter = list[AdapterStore](), AdapterStore.__aenter__

    async def record(store: AdapterStore) -> AdapterStore:
        opened.append(store)
        return await enter(store)

    monkeypatch.setattr(AdapterStore, "__aenter__", record)
    yield opened
    for store in opened:
        assert all(found.leases == 0 for found in store.placement().values())
        await store.close(timeout=1)


def downloader(folder: Path, limits: Limits | None = None, **options: Any) -> Any:
    config = StoreConfig(cache_dir=folder.parent / "cache", limits=limits or Limits())
    return model_downloader(config, lambda _: folder, **options)()


def tear(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def spoil(folder: Path) -> None:
    tensors = load((folder / WEIGHTS).read_bytes())
    next(iter(tensors.values())).view(-1)[3] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def break_config(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-10])


def save_whole_module(folder: Path) -> None:
    whole = {"base_model.model.lm_head.weight": torch.ones(16, tiny.HIDDEN)}
    save_file(load((folder / WEIGHTS).read_bytes()) | whole, folder / WEIGHTS)


def save_magnitudes(folder: Path) -> None:
    """As PEFT saves those of DoRA, one for each B."""
    tensors = load((folder / WEIGHTS).read_bytes())
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(b))
        for name, b in tensors.items()
        if "lora_B" in name
    }
    save_file(tensors | magnitudes, folder / WEIGHTS)


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], object], str, str]] = {
    "another base": ({"hidden": 48}, Path.exists, "IncompatibleAdapterError", "wrong shapes"),
    "missing layers": (
        {"layers": 5},
        Path.exists,
        "IncompatibleAdapterError",
        "the base has no such module",
    ),
    "rank": ({"rank": 16}, Path.exists, "IncompatibleAdapterError", "its rank is 16"),
    "DoRA": (
        {"use_dora": True},
        save_magnitudes,
        "UnsupportedAdapterError",
        "DoRA, which vLLM does not apply",
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        save_whole_module,
        "UnsupportedAdapterError",
        "modules_to_save",
    ),
    "torn": ({}, tear, "AdapterFormatError", "the file ends 100 bytes before"),
    "broken JSON": ({}, break_config, "AdapterFormatError", "adapter_config.json"),
    "NaN": ({}, spoil, "AdapterFormatError", "NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_an_adapter_that_the_engine_cannot_use_is_refused(
    llm_config: Any,
    stores: list[AdapterStore],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    changes, spoil, error, problem = WRONG[case]
    folder = tiny.write(tmp_path / "a", **changes)
    spoil(folder)
    loads = downloader(folder)
    for _ in range(2):
        with pytest.raises(HTTPException) as refused:
            await loads.load_model_from_config("base:a", llm_config)
        assert refused.value.status_code == 400
        assert refused.value.detail.startswith("adapter 'base:a', stage ")
        assert problem in refused.value.detail
        assert type(refused.value.__cause__).__name__ == error
    ours = [each.getMessage() for each in caplog.records if "lorax_async" in each.name]
    assert len(ours) == 1
    assert problem in ours[0]


async def test_an_adapter_of_the_base_is_handed_on(
    llm_config: Any, stores: list[AdapterStore], tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "a", rank=8)
    found = await downloader(folder).load_model_from_config("base:a", llm_config)
    assert found.local_path == str(folder)
    del found
    spoil(folder)
    allowed = downloader(folder, check_finite=False)
    assert (await allowed.load_model_from_config("base:a", llm_config)).local_path == str(folder)


async def test_the_limits_are_the_configs(
    llm_config: Any, stores: list[AdapterStore], tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "a", rank=8)
    pad_header(folder / WEIGHTS, 11 << 20)
    with pytest.raises(HTTPException, match="over the limit of 10,485,760"):
        await downloader(folder).load_model_from_config("base:a", llm_config)
    loads = downloader(folder, Limits(max_header_bytes="12MiB"))
    assert (await loads.load_model_from_config("base:a", llm_config)).local_path == str(folder)


async def test_a_caller_that_leaves_does_not_end_what_others_wait_for(
    llm_config: Any, stores: list[AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, enter = tiny.write(tmp_path / "a", rank=8), AdapterStore.__aenter__
    opening, may_open = asyncio.Event(), asyncio.Event()

    async def open_late(store: AdapterStore) -> AdapterStore:
        opening.set()
        await may_open.wait()
        return await enter(store)

    monkeypatch.setattr(AdapterStore, "__aenter__", open_late)
    loads = downloader(folder)
    first = asyncio.create_task(loads.load_model_from_config("base:a", llm_config))
    await opening.wait()
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(loads.load_model_from_config("base:a", llm_config))
    may_open.set()
    assert (await second).local_path == str(folder)
    assert first.cancelled()
    assert len(stores) == 1


@pytest.mark.usefixtures("hub_client")
@pytest.mark.parametrize("source", ["org/absent", None, "s3://bucket/base", "unknown"])
async def test_where_the_base_is_not_known_the_rest_is_checked(
    llm_config: Any,
    stores: list[AdapterStore],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    source: str | None,
) -> None:
    if source == "unknown":
        (tmp_path / "base" / "config.json").write_text(json.dumps(BASE | {"model_type": "new"}))
        source = str(tmp_path / "base")
    llm_config.model_loading_config.model_source = source
    llm_config.get_engine_config = lambda: SimpleNamespace(actual_hf_model_id="/mirrored/nowhere")
    folder = tiny.write(tmp_path / "a", hidden=48)
    loads = downloader(folder)
    for _ in range(2):
        assert await loads.load_model_from_config("base:a", llm_config)
    ours = [each.getMessage() for each in caplog.records if "lorax_async" in each.name]
    assert len(ours) == 1
    assert ours[0].startswith("adapters are not compared with the shapes of the base: ")
    spoil(folder)
    with pytest.raises(HTTPException, match="NaN or infinite"):
        await loads.load_model_from_config("base:a", llm_config)
