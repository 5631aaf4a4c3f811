"""Adapters with a vocabulary and a tokenizer of their own: as PEFT's model with their tokenizer."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import server_world as fakes
import torch
from fault_server import Asked
from hub_stand_in import HubStandIn
from huggingface_hub import snapshot_download
from openai import AsyncOpenAI, BadRequestError, UnprocessableEntityError
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import FEATURE_WARNINGS
from safetensors.torch import load_file, save_file
from server_world import TOKEN, listening
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from user_loads import at, contents

from lorax_async import AdapterLoader, layouts
from lorax_async.config import Limits, LoaderConfig
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError
from lorax_async.ids import Allow
from lorax_async.server.adapter_tokenizers import read_tokenizer
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, Service, open_service

pytestmark = [
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
    pytest.mark.usefixtures("nothing_left", "hub_client"),
]

NEW = 8
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]


def llama() -> Any:
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(fakes.llama_config())
    return model.eval()


@pytest.fixture
def base() -> ServedModel:
    return ServedModel(llama(), fakes.tokenizer(), frozenset())


def save(folder: Path, rows: int = 310, seed: int = 5) -> Path:
    """Train an adapter on a base with more rows; save it with its tokenizer, as users do."""
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=fakes.tokenizer().backend_tokenizer, eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[:-1], "eos_token": "<|end|>"})
    tokenizer.add_tokens(TOKENS[-1:])
    tokenizer.chat_template = TEMPLATE
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft: Any = get_peft_model(resized(rows), config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                weight.normal_(0, 0.5, generator=random)
    peft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resized(rows: int) -> Any:
    model = llama()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def pefts(folder: Path, prompt: str | list[dict[str, str]], rows: int = 310) -> str:
    """Return the text that PEFT's model answers, by the adapter's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = PeftModel.from_pretrained(resized(rows), folder).eval()
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    end = tokenizer.eos_token_id
    found = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    answer: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.rstrip("\ufffd")  # a character whose last bytes did not come


@asynccontextmanager
async def serving(
    base: ServedModel, named: Any = None, sources: Any = (), **config: Any
) -> AsyncIterator[tuple[Service, AsyncOpenAI]]:
    plain = {"dtype": "float32", "device_bytes": 1 << 20, "max_slots": 3}
    settings = ServerSettings(base="b", adapters=named or {}, sources=sources, admin_token=TOKEN)
    loader = LoaderConfig(**(plain | config))  # type: ignore[arg-type]
    async with (
        open_service(base, loader, settings, ServerCapacity(sequences=3)) as service,
        listening(service) as (_, __, ___, client),
    ):
        yield service, client


async def complete(client: AsyncOpenAI, model: str, prompt: Any = "x", **more: Any) -> str:
    found = await client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, **more
    )
    text: str = found.choices[0].text
    return text


async def chat(client: AsyncOpenAI, model: str, messages: Any) -> str:
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=NEW, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "so"}]
OWN = "a<|tool|>b"


@pytest.mark.each_loop
async def test_answers_are_pefts_with_the_adapter_s_tokenizer(
    base: ServedModel, tmp_path: Path
) -> None:
    """Whether its first request is a text or a conversation, and beside the base in one batch."""
    adapter, narrow = save(tmp_path / "own"), save(tmp_path / "narrow", 265, seed=6)
    plain = await answer_alone(base)
    expected = pefts(adapter, OWN), pefts(adapter, CHAT), pefts(narrow, CHAT, 265)
    assert len({*expected, plain}) == 4
    for first in (0, 1):
        async with serving(base, {"own": adapter, "narrow": narrow}) as (service, client):
            calls = [complete(client, "own", OWN), chat(client, "own", CHAT)]
            calls.append(chat(client, "narrow", CHAT))
            if first:
                calls.reverse()
                expected = expected[::-1]
            found = await asyncio.gather(complete(client, "b"), *calls)
            assert found == [plain, *expected]
            assert await complete(client, "own", service_ids(adapter, OWN)) == pefts(adapter, OWN)
            assert await complete(client, "b") == plain
            assert service.loader.statistics().loads >= 2


async def answer_alone(base: ServedModel) -> str:
    async with serving(base) as (_, client):
        return await complete(client, "b")


def service_ids(adapter: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(adapter)(text)["input_ids"]
    return ids


async def test_a_first_prompt_of_ids_that_the_base_does_not_have(
    base: ServedModel, tmp_path: Path
) -> None:
    adapter = save(tmp_path / "own")
    ids = service_ids(adapter, "<|tool|><|end|>")
    assert max(ids) >= 257
    async with serving(base, {"own": adapter}) as (_, client):
        assert await complete(client, "own", ids) == pefts(adapter, "<|tool|><|end|>")
        with pytest.raises(BadRequestError, match="outside 0"):
            await complete(client, "own", [*ids, 300])
        with pytest.raises(BadRequestError, match="outside 0"):
            await complete(client, "b", ids)


async def test_its_end_token_ends_an_answer(base: ServedModel, tmp_path: Path) -> None:
    """And is not shown; those of the base end it where they are the same tokens."""
    adapter = save(tmp_path / "own")
    end = service_ids(adapter, "<|end|>")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    head = tensors["base_model.model.lm_head.weight"]
    head[end[0]] = 8 * head[end[0] - 1]  # it is likely somewhere in an answer
    save_file(tensors, weights, metadata={"format": "pt"})
    async with serving(base, {"own": adapter}) as (_, client):
        finishes = set()
        for prompt in ("x", "yy", "abc", "so"):
            found = await client.completions.create(
                model="own", prompt=prompt, max_tokens=NEW, temperature=0
            )
            assert found.choices[0].text == pefts(adapter, prompt)
            finishes.add(found.choices[0].finish_reason)
            if found.choices[0].finish_reason == "stop":
                assert found.usage is not None
                assert found.usage.completion_tokens < NEW
    assert "stop" in finishes


@pytest.mark.each_loop
async def test_from_the_hub_with_its_tokenizer(base: ServedModel, tmp_path: Path) -> None:
    adapter = save(tmp_path / "own")
    with HubStandIn() as hub:
        hub.put("org/own", contents(adapter))
        config: dict[str, Any] = {"cache_dir": tmp_path / "cache", "hub_endpoint": hub.endpoint}
        config["allow"] = (Allow("hub"), at(hub.store_netloc))
        async with serving(base, sources=(Allow("hub"),), **config) as (_, client):
            found = await asyncio.gather(*(complete(client, "org/own", OWN) for _ in range(3)))
            assert set(found) == {pefts(adapter, OWN)}
        asked = [each for each in hub.asked if each.target.endswith("/tokenizer.json")]
        assert [each.method for each in asked] == ["HEAD", "GET"], "three requests share them"
        hub.asked.clear()
        async with serving(base, sources=(Allow("hub"),), **config) as (_, client):
            assert await chat(client, "org/own", CHAT) == pefts(adapter, CHAT)
        assert not [each for each in hub.asked if "tokenizer" in each.target]


async def test_loads_ask_for_no_tokenizer_and_a_fetch_adds_it(tmp_path: Path) -> None:
    adapter, layout = save(tmp_path / "own"), layouts.from_module(llama())
    with HubStandIn() as hub:
        hub.put("org/own", contents(adapter))
        allow = (Allow("hub"), at(hub.store_netloc))
        config = LoaderConfig(
            cache_dir=tmp_path / "cache", hub_endpoint=hub.endpoint, allow=allow, dtype="float32"
        )
        async with AdapterLoader(layout, config) as loader:
            async with await loader.load("org/own") as handle:
                assert handle.vocabulary == 310
            assert not [each for each in hub.asked if "token" in each.target]
            async with await loader.fetch(handle.key) as folder:
                found = contents(folder.path)
        names = {"tokenizer.json", "tokenizer_config.json"}
        assert names <= found.keys()
        assert all(found[name] == contents(adapter)[name] for name in names)


async def test_of_the_standard_hub_cache_the_snapshot_s_tokenizer_is_read(
    base: ServedModel, tmp_path: Path
) -> None:
    adapter = save(tmp_path / "own")
    with HubStandIn() as hub:
        hub.put("org/own", contents(adapter))
        await asyncio.to_thread(
            snapshot_download, "org/own", cache_dir=tmp_path / "hub", endpoint=hub.endpoint
        )
        config: dict[str, Any] = {"cache_dir": tmp_path / "cache", "hub_endpoint": hub.endpoint}
        config |= {"offline": True, "hub_cache_dir": tmp_path / "hub"}
        async with serving(base, sources=(Allow("hub"),), **config) as (_, client):
            assert await complete(client, "org/own", OWN) == pefts(adapter, OWN)


async def test_a_client_that_leaves_while_the_tokenizer_comes(
    base: ServedModel, tmp_path: Path
) -> None:
    adapter, go_on, asked_for = save(tmp_path / "own"), threading.Event(), threading.Event()

    def hold(asked: Asked) -> None:
        if asked.method == "GET" and asked.target.endswith("/tokenizer.json"):
            asked_for.set()
            assert go_on.wait(30)

    with HubStandIn(hold) as hub:
        hub.put("org/own", contents(adapter))
        config: dict[str, Any] = {"cache_dir": tmp_path / "cache", "hub_endpoint": hub.endpoint}
        config["allow"] = (Allow("hub"), at(hub.store_netloc))
        async with serving(base, sources=(Allow("hub"),), **config) as (service, client):
            calls = [asyncio.create_task(complete(client, "org/own", OWN)) for _ in range(2)]
            await asyncio.to_thread(asked_for.wait, 30)
            calls[0].cancel()
            await asyncio.wait(calls[:1])
            assert await complete(client, "b")
            go_on.set()
            assert await calls[1] == pefts(adapter, OWN)
            assert await service.in_flight.wait_until_idle(20)


async def test_a_version_with_another_vocabulary_follows(base: ServedModel, tmp_path: Path) -> None:
    """Also one with the base's, and back: each request has the tokens of its version."""
    versions = save(tmp_path / "wide"), save(tmp_path / "narrow", 265, seed=6)
    plain = tmp_path / "plain"
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(plain))
    served = tmp_path / "served"
    alone = await answer_alone(base)
    expected = pefts(versions[0], OWN), pefts(versions[1], OWN, 265)
    async with serving(base, {"a": served}, revalidate_files=0) as (_, client):
        for version, text in ((versions[0], expected[0]), (versions[1], expected[1])) * 2:
            replace(served, version)
            assert await complete(client, "a", OWN) == text
            replace(served, plain)  # its B is zero
            assert await complete(client, "a") == alone


def replace(place: Path, folder: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)


async def test_without_a_tokenizer_it_is_refused_by_name(base: ServedModel, tmp_path: Path) -> None:
    adapter = save(tmp_path / "own")
    (adapter / "tokenizer.json").unlink()
    async with serving(base, {"own": adapter}) as (service, client):
        for _ in range(2):
            with pytest.raises(UnprocessableEntityError, match="no tokenizer.json beside it"):
                await complete(client, "own")
        with pytest.raises(UnprocessableEntityError, match="no tokenizer.json beside it"):
            await chat(client, "own", CHAT[1:])
        assert await complete(client, "b")
        assert service.healthy


def test_a_stranger_s_config_names_no_code_and_no_file(tmp_path: Path) -> None:
    """It is read by the generic class, or the base's, as the config says."""
    adapter, elsewhere = save(tmp_path / "own"), tmp_path / "elsewhere.json"
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    other: Any = AutoTokenizer.from_pretrained(adapter)
    other.add_tokens(["<|other|>"])
    other.backend_tokenizer.save(str(elsewhere))
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_file": str(elsewhere)}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    (adapter / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...")
    read = read_tokenizer(adapter, PreTrainedTokenizerFast, Limits())
    assert read.convert_tokens_to_ids("<|tool|>") == 261
    assert read.convert_tokens_to_ids("<|other|>") is None
    assert read.chat_template == TEMPLATE
    assert read.eos_token == "<|end|>"
    assert not (tmp_path / "ran").exists()


def link_out(path: Path) -> None:
    path.rename(path.parent.parent / "outside.json")
    path.symlink_to("../outside.json")


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), AdapterFormatError, "be read"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            AdapterFormatError,
            "tokenizer_config.json",
        ),
        (
            lambda folder: os.truncate(folder / "tokenizer.json", 1 << 21),
            AdapterFormatError,
            "limi",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), UnsupportedAdapterError, "no token"),
        (lambda folder: link_out(folder / "tokenizer.json"), AdapterFormatError, "a link out of"),
        (lambda folder: make_fifo(folder / "chat_template.jinja"), AdapterFormatError, "a FIFO"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_a_typed_error(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], text: str
) -> None:
    adapter = save(tmp_path / "own")
    limits = Limits(max_tokenizer_bytes=1 << 20)
    assert read_tokenizer(adapter, PreTrainedTokenizerFast, limits)
    spoil(adapter)
    with pytest.raises(error, match=text):
        read_tokenizer(adapter, PreTrainedTokenizerFast, limits)
