"""A whole server of a tiny base: what is closed when it is left, and in which order."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import HubStandIn
from transformers import LlamaConfig, LlamaForCausalLM

from common import our_threads, until
from engines.variants import PEFT_WARNING, save
from lorax_async import (
    AdapterLoader,
    AdapterRef,
    Allow,
    ConfigError,
    LoaderClosedError,
    LoaderConfig,
    UsageError,
)
from lorax_async.server.assembly import Base, Capacity, Noted, assembled
from lorax_async.server.calls.service import Service
from lorax_async.server.cold_requests import ColdRequests
from lorax_async.server.generation import Generation
from lorax_async.server.settings import ServerSettings
from server.generating import GREEDY, all_of
from server.test_bases import SIZES
from server.world import tokenizer

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.usefixtures("nothing_left"),
]


@pytest.fixture
def base() -> Base:
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    return Base(model.eval(), tokenizer(), frozenset())


@pytest.fixture
def adapter(tmp_path: Path, base: Base) -> Path:
    return save(base.model, {"r": 2, "target_modules": ["q_proj"]}, tmp_path / "one")


def noting_of(service: Service) -> Any:
    assert isinstance(service.engine, ColdRequests)
    noting = service.engine._engine
    assert isinstance(noting, Noted)
    return noting


async def test_all_of_it_is_closed(tmp_path: Path, base: Base, adapter: Path) -> None:
    """The list of the warm last of all that need the loader, and first of all that end."""
    warm = tmp_path / "warm"
    config = LoaderConfig(dtype="float32", device_bytes=1 << 20, max_slots=2)
    settings = ServerSettings(base="base")
    forwards = [vars(module).get("forward") for module in base.model.modules()]
    async with assembled(base, config, settings, Capacity(sequences=2), warm) as service:
        engine = service.engine
        assert isinstance(engine, ColdRequests)
        answer = engine.submit(Generation(adapter, (1, 2, 3), 4, GREEDY))
        assert len(await all_of(answer)) == 4
        scheduler = noting_of(service)._engine._scheduler
    assert "lorax-decoder_0" not in our_threads()
    assert not engine.alive
    assert service.loader.closed
    with pytest.raises(LoaderClosedError):
        await scheduler.next_batch(1, 1)
    assert [vars(module).get("forward") for module in base.model.modules()] == forwards
    (row,) = json.loads(warm.read_text())["adapters"]
    assert row["path"] == str(adapter)


@pytest.mark.parametrize("sources", [(), (Allow("hub", prefix="org/"),)], ids=["closed", "open"])
@pytest.mark.usefixtures("hub_client")
async def test_what_requests_may_no_longer_name_does_not_come_back(
    tmp_path: Path, base: Base, sources: tuple[Allow, ...]
) -> None:
    """A stranger may have named it while more was allowed."""
    warm, ids = tmp_path / "warm", ["org/theirs", "org/named", "org/loaded"]
    rows: list[dict[str, Any]] = [{"id": id, "source": None, "revision": None} for id in ids]
    rows[2] |= {"use_token": True}
    warm.write_text(json.dumps({"adapters": rows}))
    settings = ServerSettings(base="b", adapters={"named": "org/named"}, sources=sources)
    expected = set(ids) if sources else {"org/named"}

    def asked() -> set[str]:
        return {id for id in ids for each in hub.asked if id in each.target}

    with HubStandIn() as hub:
        config = LoaderConfig(
            dtype="float32",
            device_bytes=1 << 20,
            max_slots=3,
            hub_endpoint=hub.endpoint,
            cache_dir=tmp_path / "cache",
        )
        async with assembled(base, config, settings, Capacity(sequences=1), warm):
            await until(lambda: asked() >= expected)
        assert asked() == expected


@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.usefixtures("hub_client")
async def test_an_adapter_without_its_name_comes_back_without_the_names_authority(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch, *, lends: bool
) -> None:
    """A source that covers the id decides about the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_operator")
    warm, sources = tmp_path / "warm", (Allow("hub", prefix="org/", use_token=lends),)
    rows = [
        {"id": id, "source": "hub", "revision": None, "use_token": True}
        for id in ("other/loaded", "org/named", "org/loaded")
    ]
    warm.write_text(json.dumps({"adapters": rows}))
    named = AdapterRef("org/named", "hub", use_token=True)
    settings = ServerSettings(base="b", adapters={"named": named}, sources=sources)

    def sent(id: str) -> set[str | None]:
        return {each.fields.get("authorization") for each in hub.asked if id in each.target}

    with HubStandIn() as hub:
        config = LoaderConfig(
            dtype="float32",
            device_bytes=1 << 20,
            max_slots=3,
            hub_endpoint=hub.endpoint,
            allow=sources,
            cache_dir=tmp_path / "cache",
        )
        async with assembled(base, config, settings, Capacity(sequences=1), warm):
            await until(lambda: bool(sent("org/named") and sent("org/loaded")))
        assert sent("org/named") == {"Bearer hf_operator"}
        assert sent("org/loaded") == {"Bearer hf_operator" if lends else None}
        assert sent("other/loaded") == set()


async def test_a_folder_without_its_name_comes_back_below_a_local_root_only(
    tmp_path: Path, base: Base, adapter: Path
) -> None:
    """An operator's path needs no root, so the list must not keep that authority."""
    folders = {
        name: Path(shutil.copytree(adapter, tmp_path / name))
        for name in ("loaded", "named", "root/open")
    }
    warm = tmp_path / "warm"
    warm.write_text(
        json.dumps(
            {
                "adapters": [
                    {"path": str(folder), "source": None, "revision": None}
                    for folder in folders.values()
                ]
            }
        )
    )
    config = LoaderConfig(
        dtype="float32",
        device_bytes=1 << 20,
        max_slots=3,
        local_roots=(tmp_path / "root",),
    )
    settings = ServerSettings(base="b", adapters={"named": folders["named"]})

    def on_device(loader: AdapterLoader) -> set[str]:
        found = loader.residency().items()
        return {Path(str(key.location)).name for key, where in found if where.tier == "device"}

    async with assembled(base, config, settings, Capacity(sequences=1), warm) as service:
        there = service.loader
        await until(lambda: len(on_device(there)) == 2)
        assert on_device(there) == {"named", "open"}


async def test_who_is_refused_is_not_noted(base: Base, adapter: Path) -> None:
    config = LoaderConfig(dtype="float32", device_bytes=1 << 20, max_slots=2)
    settings, noted = ServerSettings(base="base"), list[object]()
    async with assembled(base, config, settings, Capacity(sequences=2)) as service:
        noting_of(service).used = noted.append
        with pytest.raises(UsageError):
            service.engine.submit(Generation(adapter, (), 4, GREEDY))
    assert noted == []


def test_what_is_told_of_a_base_is_told_again_after_it(tmp_path: Path) -> None:
    """Also after one that is none."""
    (tmp_path / "config.json").write_text("{}")
    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with pytest.raises(ConfigError):
            Base.load(tmp_path, dtype="float32", device="cpu")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
        if not shown:
            logging.disable_progress_bar()
