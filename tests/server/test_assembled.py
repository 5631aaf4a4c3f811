"""A whole server of a tiny base: one story over a socket, what is closed, what comes back."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import HubStandIn
from openai import PermissionDeniedError
from transformers import LlamaForCausalLM

from common import our_threads, until
from engines.variants import PEFT_WARNING, active, save
from lorax_async.config import LoaderConfig
from lorax_async.errors import UsageError
from lorax_async.ids.allow import Allow
from lorax_async.server.generation import Generation
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, Service, open_service
from lorax_async.types import AdapterRef
from server.generating import GREEDY, all_of
from server.world import TOKEN, listening, llama_config, tokenizer, tokens_of
from tiny_loaders import fails, on_device

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.usefixtures("nothing_left", "hub_client"),
]

NEW = 8


@pytest.fixture
def base() -> ServedModel:
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(llama_config())
    return ServedModel(model.eval(), tokenizer(), frozenset())


@pytest.fixture
def folders(tmp_path: Path, base: ServedModel) -> dict[str, Path]:
    """Adapters of which each makes the base say something else."""
    return {
        name: save(base.model, {"r": 2, "target_modules": [target]}, tmp_path / name)
        for name, target in (("one", "q_proj"), ("two", "v_proj"), ("late", "o_proj"))
    }


@asynccontextmanager
async def whole(
    base: ServedModel,
    warm: Path | None = None,
    named: dict[str, Any] | None = None,
    sources: tuple[Allow, ...] = (),
    **config: Any,
) -> AsyncIterator[Service]:
    plain = {"dtype": "float32", "device_bytes": 1 << 20, "max_slots": 3}
    settings = ServerSettings(base="b", adapters=named or {}, sources=sources, admin_token=TOKEN)
    loader = LoaderConfig(**(plain | config))  # type: ignore[arg-type]
    async with open_service(base, loader, settings, ServerCapacity(sequences=2), warm) as service:
        yield service


async def test_a_server_answers_over_a_socket(base: ServedModel, folders: dict[str, Path]) -> None:
    """Two adapters in one forward pass, as PEFT says, one loaded by name, and a last answer."""
    expected, passes = dict[str, str](), list[int]()
    with active(base.model, **folders) as peft_model:
        for name in folders:
            peft_model.set_adapter(name)
            ids = torch.tensor([tokens_of("x")])
            found = peft_model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
            expected[name] = base.tokenizer.backend_tokenizer.decode(found[0, 1:].tolist())
    base.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(len(given["input_ids"])), with_kwargs=True
    )
    late = folders.pop("late")
    async with whole(base, named=folders) as service, listening(service) as (_, ended, __, client):

        async def streamed(name: str) -> str:
            stream = await client.completions.create(
                model=name, prompt="x", max_tokens=NEW, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert [model.id for model in (await client.models.list()).data] == ["b", "one", "two"]
        for name in folders:
            assert await streamed(name) == expected[name]
        assert set(passes) == {1}
        passes.clear()
        found = await asyncio.gather(*map(streamed, folders))
        assert found == [expected[name] for name in folders]
        assert 2 in passes
        assert len(passes) < 2 * NEW, "one after the other it would be as many"
        await fails(streamed("./late"), PermissionDeniedError)
        body = {"lora_name": "late", "lora_path": str(late)}
        admin = {"Authorization": f"Bearer {TOKEN}"}
        operator = client.with_options(default_headers=admin)
        await operator.post("/load_lora_adapter", cast_to=str, body=body)
        last = asyncio.create_task(streamed("late"))
        await until(lambda: service.engine.waiting or last.done())
        service.in_flight.close()
        assert await last == expected["late"]
        assert not ended.done()


async def test_all_is_closed(tmp_path: Path, base: ServedModel, folders: dict[str, Path]) -> None:
    """The list of the warm first; an adapter whose request is refused is not among them."""
    warm, tasks = tmp_path / "warm", asyncio.all_tasks()
    forwards = [vars(module).get("forward") for module in base.model.modules()]
    async with whole(base, warm) as service:
        engine, loader = service.engine, service.loader
        submitted = service.submit(Generation(folders["one"], (1, 2, 3), 4, GREEDY), "one")
        assert len(await all_of(submitted)) == 4
        (await loader.load(folders["two"])).release()
        with pytest.raises(UsageError):
            service.submit(Generation(folders["two"], (), 4, GREEDY), "two")
    assert "lorax-decoder_0" not in our_threads()
    assert not engine.alive
    assert loader.closed
    assert asyncio.all_tasks() == tasks
    assert [vars(module).get("forward") for module in base.model.modules()] == forwards
    (row,) = json.loads(warm.read_text())["adapters"]
    assert row["path"] == str(folders["one"])


def listed(path: Path, *rows: dict[str, Any]) -> Path:
    plain = {"source": None, "revision": None}
    path.write_text(json.dumps({"adapters": [plain | row for row in rows]}))
    return path


@pytest.mark.parametrize(
    ("sources", "tokens"),
    [
        ((), {"org/named": "own"}),
        ((Allow("hub", prefix="org/"),), {"org/named": "own", "org/loaded": None, "org/old": None}),
        (
            (Allow("hub", prefix="org/", use_token=True),),
            {"org/named": "own", "org/loaded": "own", "org/old": "own"},
        ),
    ],
    ids=["closed", "open", "open with the token"],
)
async def test_an_adapter_comes_back_as_a_request_could_name_it_now(
    tmp_path: Path, base: ServedModel, monkeypatch: pytest.MonkeyPatch, sources: Any, tokens: Any
) -> None:
    """A stranger may have named it while more was allowed; only a name keeps its authority."""
    monkeypatch.setenv("HF_TOKEN", "own")
    ids = ("other/loaded", "org/named", "org/loaded")
    rows = [{"id": id, "source": "hub", "use_token": True} for id in ids]
    warm = listed(tmp_path / "warm", *rows, {"id": "org/old"})
    named = {"named": AdapterRef("org/named", "hub", use_token=True)}

    def sent() -> dict[str, str | None]:
        asked = {
            (id, each.fields.get("authorization", "").removeprefix("Bearer ") or None)
            for id in (*ids, "org/old")
            for each in hub.asked
            if id in each.target
        }
        assert len(dict(asked)) == len(asked), "each is asked for on one authority"
        return dict(asked)

    with HubStandIn() as hub:
        config = {"hub_endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "max_slots": 4}
        config |= {"allow": sources} if sources else {}
        async with whole(base, warm, named, sources, **config):
            await until(lambda: sent().keys() >= tokens.keys())
        assert sent() == tokens


async def test_a_folder_without_its_name_comes_back_below_a_local_root_only(
    tmp_path: Path, base: ServedModel, folders: dict[str, Path]
) -> None:
    """An operator's path needs no root, so the list must not keep that authority."""
    paths = [
        Path(shutil.copytree(folders["one"], tmp_path / name))
        for name in ("loaded", "named", "root/open")
    ]
    warm = listed(tmp_path / "warm", *({"path": str(path)} for path in paths))
    roots = (tmp_path / "root",)
    async with whole(base, warm, {"named": paths[1]}, local_roots=roots) as service:
        await until(lambda: len(on_device(service.loader)) == 2)
        found = service.loader.placement().adapters.items()
        names = {Path(str(key.location)).name for key, it in found if it.tier == "device"}
        assert names == {"named", "open"}
