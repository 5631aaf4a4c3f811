"""A whole server of a tiny base: what is asked for, by whom, what is closed, what comes back."""

import argparse
import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import server_world as fakes
import torch
from decode_world import GREEDY, all_of
from event_loops import until
from hub_stand_in import HubStandIn
from leaks import our_threads
from openai import NotFoundError
from peft_adapters import PEFT_WARNING, active, save
from server_world import TOKEN, Answer, FakeEngine, World, echo, listening, loading, serving
from tiny_loaders import fails, on_device
from transformers import LlamaForCausalLM
from user_loads import at, contents, loader, written

from lorax_async.cli.command_line import as_source
from lorax_async.cli.serve import find_adapters, request_sources, server_loader_settings
from lorax_async.config import LoaderConfig
from lorax_async.errors import UsageError
from lorax_async.ids import Allow
from lorax_async.server.engine import Generation, Sampling
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, Service, open_service
from lorax_async.types import AdapterRef

closed = pytest.mark.usefixtures("nothing_left", "hub_client")
pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING), closed]

NEW, TARGETS = 8, {"one": "q_proj", "two": "v_proj", "late": "o_proj"}
WITH_TOKEN = (Allow("hub", prefix="org/", use_token=True),)


@pytest.fixture
def base() -> ServedModel:
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(fakes.llama_config())
    return ServedModel(model.eval(), fakes.tokenizer(), frozenset())


@pytest.fixture
def folders(tmp_path: Path, base: ServedModel) -> dict[str, Path]:
    loras = {name: {"r": 2, "target_modules": [target]} for name, target in TARGETS.items()}
    return {name: save(base.model, lora, tmp_path / name) for name, lora in loras.items()}


@asynccontextmanager
async def whole(
    base: ServedModel, warm: Path | None = None, named: Any = None, sources: Any = (), **config: Any
) -> AsyncIterator[Service]:
    plain = {"dtype": "float32", "device_bytes": 1 << 20, "max_slots": 3}
    settings = ServerSettings(base="b", adapters=named or {}, sources=sources, admin_token=TOKEN)
    loader = LoaderConfig(**(plain | config))  # type: ignore[arg-type]
    async with open_service(base, loader, settings, ServerCapacity(sequences=2), warm) as service:
        yield service


async def test_a_server_answers_over_a_socket(base: ServedModel, folders: dict[str, Path]) -> None:
    expected, passes = dict[str, str](), list[int]()
    with active(base.model, **folders) as peft_model:
        for name in folders:
            peft_model.set_adapter(name)
            ids = torch.tensor([fakes.tokens_of("x")])
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
        assert service.loader.layout.base == "b", "errors must not name the base's folder"
        for name in folders:
            assert await streamed(name) == expected[name]
        assert set(passes) == {1}
        passes.clear()
        found = await asyncio.gather(*map(streamed, folders))
        assert found == [expected[name] for name in folders]
        assert 2 in passes
        assert len(passes) < 2 * NEW, "one after the other it would be as many"
        await fails(streamed("./late"), NotFoundError)
        body = {"lora_name": "late", "lora_path": str(late)}
        admin = {"Authorization": f"Bearer {TOKEN}"}
        operator = client.with_options(default_headers=admin)
        await operator.post("/load_lora_adapter", cast_to=str, body=body)
        last = asyncio.create_task(streamed("late"))
        await until(lambda: service.engine.waiting or last.done())
        service.in_flight.close()
        assert await last == expected["late"]
        assert not ended.done()


@pytest.mark.parametrize("in_place", [True, False])
async def test_overlapping_requests_follow_a_replaced_folder(
    base: ServedModel, tmp_path: Path, in_place: bool
) -> None:
    """From `load_inplace` on, or a moment after a rename; once it is gone, it is not found."""
    strong = {"r": 2, "lora_alpha": 64, "target_modules": "all-linear"}
    folders = {
        name: save(base.model, strong, tmp_path / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    texts = dict[str, str]()
    window, served = 0.05, folders["one"]
    async with (
        whole(base, named={"a": served}, revalidate_files=window) as service,
        listening(service) as (_, __, ___, client),
    ):
        operator = client.with_options(default_headers={"Authorization": f"Bearer {TOKEN}"})

        async def answer(model: str) -> str:
            found = await client.completions.create(
                model=model, prompt="x", max_tokens=NEW, temperature=0
            )
            return found.choices[0].text

        async def load(name: str, folder: Path, **more: Any) -> None:
            body = {"lora_name": name, "lora_path": str(folder)} | more
            await operator.post("/load_lora_adapter", cast_to=str, body=body)

        for name in ("one", "two"):
            await load(name, folders[name])
            texts[name] = await answer(name)
        assert texts["one"] != texts["two"]
        replaced, answers = asyncio.Event(), list[tuple[bool, str]]()

        async def keep_asking(delay: float) -> None:
            await asyncio.sleep(delay)
            while len(answers) < 40 or not replaced.is_set():
                after = replaced.is_set()
                answers.append((after, await answer("a")))

        async def replace_it() -> None:
            await until(lambda: len(answers) > 10)
            served.rename(served.with_name("before"))
            shutil.copytree(folders["two"], served)
            if in_place:
                await load("a", served, load_inplace=True)
            else:
                await asyncio.sleep(2 * window)
            answers.clear()
            replaced.set()

        await asyncio.gather(replace_it(), *(keep_asking(n * 0.003) for n in range(4)))
        assert {text for after, text in answers if after} == {texts["two"]}
        shutil.rmtree(served)
        await asyncio.sleep(2 * window)
        await fails(answer("a"), NotFoundError)


async def test_requests_override_the_bases_sampling(base: ServedModel) -> None:
    """Its tokens with a penalty are transformers' own."""

    def expected(penalty: float) -> str:
        ids, how = torch.tensor([fakes.tokens_of("abab")]), {"repetition_penalty": penalty}
        found = base.model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **how)
        return str(base.tokenizer.backend_tokenizer.decode(found[0, 4:].tolist()))

    texts = [expected(penalty) for penalty in (5.0, 1.0)]
    assert len({*texts}) == 2
    base = replace(base, sampling=Sampling(temperature=0, repetition_penalty=5.0))
    async with whole(base) as service, listening(service) as (_, __, ___, client):
        for given, text in zip(({}, {"repetition_penalty": 1, "top_k": -1}), texts, strict=True):
            answer = await client.completions.create(
                model="b", prompt="abab", max_tokens=NEW, extra_body=given
            )
            assert answer.choices[0].text == text


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
    [((), ()), ((Allow("hub", prefix="org/"),), (None, None)), (WITH_TOKEN, ("own", "own"))],
)
async def test_an_adapter_comes_back_as_a_request_could_name_it_now(
    tmp_path: Path, base: ServedModel, monkeypatch: pytest.MonkeyPatch, sources: Any, tokens: Any
) -> None:
    """A stranger may have named it while more was allowed; only a name keeps its authority."""
    monkeypatch.setenv("HF_TOKEN", "own")
    ids = ("other/loaded", "org/named", "org/loaded")
    rows = [{"id": id, "source": "hub", "use_token": True} for id in ids]
    warm = listed(tmp_path / "warm", *rows, {"id": "org/old"})
    tokens = {"org/named": "own"} | dict(zip(("org/loaded", "org/old"), tokens, strict=False))
    named = {"named": AdapterRef("org/named", "hub", use_token=True)}

    def sent() -> dict[str, str | None]:
        found = [(id, one) for id in (*ids, "org/old") for one in empty.asked if id in one.target]
        fields = [(id, each.fields.get("authorization", "")) for id, each in found]
        asked = {(id, field.removeprefix("Bearer ") or None) for id, field in fields}
        assert len(dict(asked)) == len(asked), "each is asked for on one authority"
        return dict(asked)

    with HubStandIn() as empty:
        config = {"hub_endpoint": empty.endpoint, "cache_dir": tmp_path / "cache", "max_slots": 4}
        config |= {"allow": sources} if sources else {}
        async with whole(base, warm, named, sources, **config):
            await until(lambda: sent().keys() >= tokens.keys())
        assert sent() == tokens


async def test_a_folder_without_its_name_comes_back_below_a_local_root_only(
    tmp_path: Path, base: ServedModel, folders: dict[str, Path]
) -> None:
    """An operator's path needs no root, so the list must not keep that authority."""
    spots = [tmp_path / name for name in ("loaded", "named", "root/open")]
    paths = [Path(shutil.copytree(folders["one"], spot)) for spot in spots]
    warm = listed(tmp_path / "warm", *({"path": str(path)} for path in paths))
    roots = (tmp_path / "root",)
    async with whole(base, warm, {"named": paths[1]}, local_roots=roots) as service:
        await until(lambda: len(on_device(service.loader)) == 2)
        found = service.loader.placement().adapters.items()
        names = {Path(str(key.location)).name for key, it in found if it.tier == "device"}
        assert names == {"named", "open"}


HUB_TOKEN = "hf_0perat0rsToken"
OWN = f"Bearer {HUB_TOKEN}"
CHAT = "/v1/chat/completions"
PRIVATE, PUBLIC, ELSEWHERE = "org/private", "org/public", "other/private"


async def ask(world: World, model: str) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    return await world.ask("POST", CHAT, body)


BELOW = (Allow("hub", prefix="org/"), Allow("s3", "bucket", prefix="loras/"))
IDS = ["org/name", "org/name@v1", "s3://bucket/loras/a"]
OTHERS = ["other/name", "Org/name", "org/name@refs/pr/1", "s3://bucket/loras2/a", "gs://bucket/a"]
OTHERS += ["az://container/a", "https://host.example/a", "http://127.0.0.1:1/a"]


# Folders are the loader's to judge, by its local_roots.
@pytest.mark.parametrize(
    ("sources", "allowed", "refused"),
    [((), [], [*IDS, *OTHERS]), (BELOW, [*IDS, "./folder"], OTHERS)],
    ids=["no source", "two sources"],
)
async def test_requests_may_name_what_is_below_a_source(
    sources: tuple[Allow, ...], allowed: list[str], refused: list[str]
) -> None:
    async with serving(FakeEngine(echo), adapters={"sql": "org/x"}, sources=sources) as world:
        for model in ("sql", "base", *allowed):
            assert (await ask(world, model)).status == 200, model
        submitted = len(world.engine.submitted)
        for model in refused:
            answer = await ask(world, model)
            assert (answer.status, answer.error["code"]) == (404, "model_not_found"), model
        assert len(world.engine.submitted) == submitted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    files = contents(written(tmp_path / "adapter", layers=4, rank=4))
    with HubStandIn() as found:
        found.put(PUBLIC, files)
        for repo in (PRIVATE, ELSEWHERE):
            found.put(repo, files, private_token=HUB_TOKEN)
        yield found


@asynccontextmanager
async def served(
    hub: HubStandIn, cache: Path, adapters: list[str], sources: list[str], *, offline: bool = False
) -> AsyncIterator[World]:
    found, places = find_adapters(adapters), [as_source(text) for text in sources]
    arguments = argparse.Namespace(source=places, hub_endpoint=hub.endpoint, offline=offline)
    refs = [ref for ref in found.values() if isinstance(ref, AdapterRef)]
    config = server_loader_settings(arguments, refs)
    config["allow"] = (*config["allow"], at(hub.store_netloc))
    there = loader(cache, layers=4, **config)
    engine = FakeEngine(loading(there))
    async with serving(engine, there, adapters=found, sources=request_sources(arguments)) as world:
        yield world


def sent(hub: HubStandIn, repo: str) -> set[str | None]:
    return {each.fields.get("authorization") for each in hub.asked if repo in each.target}


@pytest.mark.parametrize(
    ("sources", "statuses", "tokens"),
    [
        # What strangers get for a public repository, a private one, and one of others; and the
        # authority on which the hub was asked for each.
        ([], [404, 404, 404], [set(), set(), set()]),
        (["hub"], [200, 404, 404], [{None}, {None}, {None}]),
        (["hub:org/"], [200, 200, 404], [{OWN}, {OWN}, set()]),
        (["hub", "hub:org/"], [200, 200, 404], [{OWN}, {OWN}, {None}]),
    ],
)
async def test_a_strangers_id_gets_the_token_of_its_source_alone(
    hub: HubStandIn, tmp_path: Path, sources: list[str], statuses: list[int], tokens: Any
) -> None:
    async with served(hub, tmp_path, [], sources) as world:
        found = [await ask(world, model) for model in (PUBLIC, PRIVATE, ELSEWHERE)]
        assert [answer.status for answer in found] == statuses
        assert all(HUB_TOKEN.encode() not in answer.body for answer in found)
    assert [sent(hub, repo) for repo in (PUBLIC, PRIVATE, ELSEWHERE)] == tokens


SPELLINGS = (
    *("{0}", "{0}@main", "{0}@{commit}", "{0}@refs/pr/1", "{0}@../main", "{0}/", "/{0}", " {0}", "{0}\n"),
    *("ORG/private", "Org/private", "org//private", "org/./private", "org/../{0}", "org%2fprivate"),
    *("public/../private", "hub:{0}", "hub://{0}", "HUB://{0}", "hf://{0}", "models/{0}", "{0}.git"),
    *("http://{hub}/{0}/", "http://{hub}/{0}/resolve/main/", "HTTP://{hub}/{0}/resolve/main/"),
    *("http://user@{hub}/{0}/resolve/main/", "http://{hub}/api/models/{0}/", "//{hub}/{0}/"),
    *("./{0}", "../{0}", "~/{0}", "file:{0}", "file:///{0}", "local://{0}", "org/private\0", "org\\private"),
    *("org/moved", "org/moved@{commit}", "other/moved", "s3://org/private/", "{0}?token", "{0}#main"),
)  # fmt: skip
"""Of ids with which a stranger may try to reach `PRIVATE` on the operator's authority."""


@pytest.mark.parametrize("sources", [[], ["hub"], ["hub", "hub:open/"]])
async def test_no_spelling_of_an_id_borrows_the_token(
    hub: HubStandIn, tmp_path: Path, sources: list[str]
) -> None:
    commit = hub.repos[PRIVATE].refs["main"]
    hub.moved |= {"org/moved": PRIVATE, "other/moved": PRIVATE}
    async with served(hub, tmp_path, [f"sql={PRIVATE}"], sources) as world:
        assert (await ask(world, "sql")).status == 200
        begun = len(hub.asked)
        for spelling in SPELLINGS:
            model = spelling.format(PRIVATE, commit=commit, hub=hub.netloc)
            answer = await ask(world, model)
            assert (answer.status, answer.error["code"]) == (404, "model_not_found"), model
            assert HUB_TOKEN.encode() not in answer.body
        asked = hub.asked[begun:]
        assert {each.fields.get("authorization") for each in asked} <= {None}
        assert bool(asked) is bool(sources)
        assert (await world.ask("GET", "/v1/models/sql")).status == 200


async def test_a_name_by_the_admin_gets_the_operators_token(
    hub: HubStandIn, tmp_path: Path
) -> None:
    """And that makes it no stranger's, though it is on the device and the hub is open to all."""
    commit = hub.repos[PRIVATE].refs["main"]
    async with served(hub, tmp_path, [], ["hub"]) as world:
        body = {"lora_name": "sql", "lora_path": "org/nowhere"}
        nowhere = await world.admin("/v1/load_lora_adapter", body)
        assert nowhere.status == 404
        assert "no such folder, and on the hub: " in nowhere.error["message"]
        body["lora_path"] = PRIVATE
        assert (await world.admin("/v1/load_lora_adapter", body)).status == 200
        assert (await ask(world, "sql")).status == 200
        assert sent(hub, PRIVATE) == {OWN}
        begun = len(hub.asked)
        for id in (PRIVATE, f"{PRIVATE}@main", f"{PRIVATE}@{commit}"):
            assert (await ask(world, id)).status == 404
        assert {each.fields.get("authorization") for each in hub.asked[begun:]} == {None}
        assert (await ask(world, "sql")).status == 200


async def test_offline_no_source_is_asked(hub: HubStandIn, tmp_path: Path) -> None:
    async with served(hub, tmp_path, [f"sql={PRIVATE}"], ["hub:org/"], offline=True) as world:
        for model in ("sql", PRIVATE, PUBLIC):
            assert (await ask(world, model)).status == 502
    assert not hub.asked
