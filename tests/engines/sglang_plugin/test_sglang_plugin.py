"""The plug-in in SGLang's own classes: which adapters requests get, and with which scale."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from event_loops import until
from fastapi import HTTPException
from peft_adapters import Lora, active, llama, save
from safetensors.torch import load_file, save_file

from engines.sglang_plugin.conftest import ATTENTION, NOBODY, REMOTE, Server
from link import Link
from lorax_async import AdapterRef, AdapterStore
from lorax_async.engines.sglang import register

UNKNOWN = "never been loaded"
"""Of SGLang's own refusal."""


async def test_requests_get_adapters_that_were_never_loaded(
    server: Server, local: Path, origin: Link
) -> None:
    """They share a download, which does not hold others."""
    save(llama(), ATTENTION, local / "plain")
    plain = await server.resolve("plain")
    asked = [asyncio.create_task(server.resolve(origin.url("one/"), None)) for _ in range(8)]
    await asyncio.sleep(0)
    asked[0].cancel()  # the others stay
    assert await server.resolve("plain") == plain
    assert not any(task.done() for task in asked[1:])
    found = await asyncio.gather(*asked[1:])
    assert server.weights.loras.keys() == {plain, found[0][0]}
    assert found == [[found[0][0], None]] * 7
    assert len(server.loads) == 2


async def test_a_folder_that_was_replaced_is_loaded_again_for_later_requests(
    server: Server, local: Path, tmp_path: Path
) -> None:
    """The one in progress keeps its version; once the folder is gone, no request gets it."""
    folder = save(llama(), ATTENTION, local / "swapped", seed=1)
    first = await server.resolve("swapped")
    assert await server.serve("swapped") == str(folder)
    folder.rename(tmp_path / "before")
    save(llama(), ATTENTION, tmp_path / "next", seed=2).rename(folder)
    await asyncio.sleep(1.1)  # a look at a folder counts for a second
    later = [asyncio.create_task(server.resolve("swapped")) for _ in range(3)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in later)
    await server.requests.lora_registry.release(first)
    (second,) = set(await asyncio.gather(*later))
    assert second != first
    assert server.weights.loras.keys() == {second}
    assert server.loads == [str(folder)] * 2
    await server.requests.lora_registry.release([second] * 3)
    shutil.rmtree(folder)
    await asyncio.sleep(1.1)
    with pytest.raises(ValueError, match="no such folder"):
        await server.resolve("swapped")


async def test_a_failed_adapter_leaves_one_line_in_the_log(
    server: Server, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (save(llama(), ATTENTION, local / "torn") / "adapter_config.json").write_text("{")
    for _ in range(2):
        with pytest.raises(ValueError, match="'torn'"):
            await server.resolve("torn")
    ours = [each.getMessage() for each in caplog.records if "lorax_async" in each.name]
    assert [text.partition(":")[0] for text in ours] == ["the adapter 'torn' cannot be used"]


async def test_what_sglang_unloads_makes_room_and_comes_again(
    server: Server, local: Path, origin: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has room for two loaded adapters, one that comes and one more."""
    urls = [origin.url(f"{name}/") for name in REMOTE]
    kept = await server.serve(urls[0])
    for url in (*urls[1:], *urls[1:]):
        path = await server.serve(url)
        assert await server.serve(urls[0]) == kept
        assert Path(path).is_dir()
        assert Path(kept).is_dir()  # though it was the first to come
    assert len(server.loads) == 9
    for url in urls[1:]:
        await server.serve(url)
    assert not Path(kept).exists()
    assert await server.serve(urls[0]) == kept
    checkout, gate = AdapterStore.checkout, asyncio.Event()

    async def held(store: AdapterStore, ref: AdapterRef) -> Any:
        if ref.text == urls[1]:
            await gate.wait()
        return await checkout(store, ref)

    monkeypatch.setattr(AdapterStore, "checkout", held)
    both = asyncio.create_task(server.resolve(*urls[:2]))
    for name in ("left", "right"):  # before the second one comes, the first one goes
        save(llama(), ATTENTION, local / name)
        await server.serve(name)
    gate.set()
    assert server.weights.loras.keys() == set(await both)


async def test_an_unload_that_was_cut_short_is_finished(
    server: Server, origin: Link, tmp_path: Path
) -> None:
    """A client leaves while SGLang waits for the requests of the adapter that makes room."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    one, two, three = (origin.url(f"{name}/") for name in REMOTE[:3])
    used = [await server.resolve(one), await server.resolve(two)]
    folder, manager = save(llama(), ATTENTION, tmp_path / "own"), server.requests
    request = LoadLoRAAdapterReqInput(lora_name="own", lora_path=str(folder))
    loading = asyncio.create_task(manager.load_lora_adapter(request))
    await until(lambda: one in manager.pending_lora_unloads)
    loading.cancel()
    await asyncio.wait([loading])
    await manager.lora_registry.release(used)
    assert Path(await server.serve(one)).is_dir()
    await server.serve(three)
    assert manager.pending_lora_unloads == {}


async def test_adapters_that_others_load_stay_theirs(
    server: Server, local: Path, origin: Link, tmp_path: Path
) -> None:
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    folder = save(llama(), ATTENTION, tmp_path / "own")
    save(llama(), ATTENTION, local / "own")
    request = LoadLoRAAdapterReqInput(lora_name="own", lora_path=str(folder))
    assert (await server.requests.load_lora_adapter(request)).success
    for name in REMOTE[:2]:
        await server.serve(origin.url(f"{name}/"))
    assert "own" not in server.requests.lora_registry.get_all_adapters()
    assert await server.serve("own") == str(folder)
    folder = save(llama(), {**ATTENTION, "rank_pattern": {"o_proj": 2}}, tmp_path / "pattern")
    request = LoadLoRAAdapterReqInput(lora_name="pattern", lora_path=str(folder))
    assert "one scale" in (await server.requests.load_lora_adapter(request)).error_message


async def replace(folder: Path, seed: int) -> None:
    """Put another adapter in a folder's place, and wait for as long as a look at it counts."""
    new = save(llama(), ATTENTION, folder.with_name(f"{folder.name}-{seed}"), seed=seed)
    folder.rename(folder.with_name(f"{folder.name}-before-{seed}"))
    new.rename(folder)
    await asyncio.sleep(1.1)


def weights_of(server: Server, lora_id: str) -> torch.Tensor:
    """Return what SGLang has of one layer."""
    weights: torch.Tensor = next(iter(server.weights.loras[lora_id].layers[1].weights.values()))
    return weights.clone()


async def test_a_request_gets_the_version_that_is_there_when_it_begins(
    server: Server, local: Path
) -> None:
    """The version before stays until its requests have ended; others are not held."""
    folder = save(llama(), ATTENTION, local / "changing")
    save(llama(), ATTENTION, local / "calm")
    old = await server.resolve("changing")
    before = weights_of(server, old)
    assert await server.resolve("changing") == old
    await replace(folder, 5)
    asked = [asyncio.create_task(server.resolve("changing")) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in asked), "the one before has requests"
    assert torch.equal(weights_of(server, old), before)
    await server.requests.lora_registry.release([old, old])
    found = await asyncio.gather(*asked)
    assert old not in {*found, *server.weights.loras}
    assert len({*found}) == 1
    assert not torch.equal(weights_of(server, found[0]), before)
    assert len(server.loads) == 2
    await server.resolve("calm")
    assert await server.resolve("changing") == found[0]
    shutil.rmtree(folder)
    await asyncio.sleep(1.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such folder"):
            await server.resolve("changing")
    assert found[0] in server.weights.loras, "its requests go on"


async def test_a_folder_that_changes_while_sglang_reads_it_is_read_again(
    server: Server, local: Path
) -> None:
    """The config of one version is never served with the weights of another."""
    folder, tell = save(llama(), ATTENTION, local / "unsteady"), server.tell
    changes = iter(range(10, 11))

    async def change(request: Any) -> list[Any]:
        if "Unload" not in type(request).__name__:
            for seed in changes:
                new = save(llama(), ATTENTION, local / f"unsteady-{seed}", seed=seed)
                folder.rename(local / f"unsteady-before-{seed}")
                new.rename(folder)
                break
        return await tell(request)

    server.requests.update_lora_adapter_communicator = change
    await server.serve("unsteady")
    assert len(server.loads) == 2
    await replace(folder, 20)
    changes = iter(range(21, 40))
    with pytest.raises(HTTPException, match="rename") as raised:
        await server.resolve("unsteady")
    assert raised.value.status_code == 502
    changes = iter(())
    await server.serve("unsteady")


REFUSED: dict[str, tuple[Lora, str]] = {
    "rank": ({**ATTENTION, "r": 17}, "takes up to 16"),
    "pattern": ({**ATTENTION, "alpha_pattern": {"v_proj": 3}}, "one scale"),
    "dora": ({**ATTENTION, "use_dora": True}, "DoRA, which SGLang does not apply"),
    "key": ({**ATTENTION, "target_modules": ["k_proj"]}, "only together with 'q_proj'"),
    "up": ({**ATTENTION, "target_modules": ["up_proj"]}, "only together with 'gate_proj'"),
    "head": ({**ATTENTION, "target_modules": ["lm_head"]}, "what another adapter left there"),
}


async def test_what_does_not_fit_is_refused_before_it_is_loaded(
    server: Server, local: Path, origin: Link
) -> None:
    for name, (lora, problem) in REFUSED.items():
        save(llama(), lora, local / name)
        for _ in range(2):  # nothing of the first remains
            with pytest.raises(ValueError, match=problem):
                await server.resolve(name)
    save(llama(hidden_size=64), ATTENTION, local / "wide")
    with pytest.raises(ValueError, match="shapes"):
        await server.resolve("wide")
    with pytest.raises(ValueError, match="no such folder"):
        await server.resolve("missing")
    for name in ("https://elsewhere.invalid/a/", "org/name", "/etc"):
        with pytest.raises(ValueError, match=UNKNOWN):
            await server.resolve(name)
    with pytest.raises(HTTPException, match="ECONNREFUSED") as raised:
        await server.resolve(f"{NOBODY}one/")
    assert raised.value.status_code == 503
    assert server.loads == []
    server.partly = True
    for _ in range(2):
        with pytest.raises(ValueError, match="no room"):
            await server.resolve(origin.url("one/"))
    server.partly = False
    await server.resolve(origin.url("one/"))


OUT, DENSE = "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.dense"
TARGETS = ["q_proj", "v_proj", "o_proj", "dense"]


def save_odd(local: Path, module: str, config: Lora) -> None:
    """Save an adapter that changes `module` in place of an o_proj, with changes of its config."""
    folder = save(llama(), ATTENTION, local / "odd")
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {name.replace(OUT, module): each for name, each in load_file(weights).items()}
    save_file(tensors, weights)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))


@pytest.mark.parametrize(
    ("module", "config", "served", "problem"),
    [
        (OUT, {"r": 4}, {"all"}, "not a pair of rank 4"),
        ("model.vision.layers.1.self_attn.o_proj", {}, {"all"}, "cannot tell the layers"),
        ("model.projector.o_proj", {}, {"all"}, "leaves out 'model.projector.o_proj'"),
        (DENSE, {"target_modules": TARGETS}, {"all"}, "not among the target modules of this"),
        (DENSE, {}, None, r"leaves out .*dense \(target_modules\)"),
        (OUT, {"target_modules": "all-linear"}, None, "names no target modules"),
    ],
)
async def test_what_sglang_would_confuse_is_refused_where_the_base_is_not_known(
    server: Server, local: Path, module: str, config: Lora, served: set[str] | None, problem: str
) -> None:
    from sglang.srt.runtime_context import get_lora

    server.requests.model_config.hf_config.num_heads = 4  # a key that Llama has not
    save_odd(local, module, config)
    with get_lora().override(lora_target_modules=served), pytest.raises(ValueError, match=problem):
        await server.resolve("odd")
    assert server.loads == []


async def test_experts_may_have_any_spelling(server: Server, local: Path) -> None:
    server.requests.model_config.hf_config = transformers.Qwen3MoeConfig()
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    save_odd(local, "model.layers.1.mlp.experts.3.down_proj", {"target_modules": targets})
    await server.resolve("odd")
    assert len(server.loads) == 1


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_rslora": True, "r": 12}])
async def test_the_scale_is_pefts(server: Server, local: Path, lora: Lora) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    folder = save(llama(), {**ATTENTION, **lora}, local / f"scale-{len(lora)}")
    lora_id = await server.resolve(folder.name)
    server.weights.fetch_new_loras({lora_id})
    batch = {"lora_ids": [lora_id], "batch_size": 1, "forward_mode": ForwardMode.EXTEND}
    lengths = {"extend_seq_lens_cpu": [5], "extend_seq_lens": torch.tensor([5])}
    server.weights.prepare_lora_batch(SimpleNamespace(**batch, **lengths, extend_num_tokens=5))
    x = torch.randn(5, 32)
    layer = server.weights.base_model.model.layers[1].self_attn  # the base's weights are zeros
    q, k, v = layer.qkv_proj(x)[0].split([32, 16, 16], dim=1)
    assert not k.any()
    with torch.no_grad(), active(llama(), only=folder) as model:
        peft = model.base_model.model.model.layers[1].self_attn
        pairs = (q, peft.q_proj), (v, peft.v_proj), (layer.o_proj(x)[0], peft.o_proj)
        for ours, theirs in pairs:
            expected = theirs(x) - theirs.base_layer(x)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


async def test_an_unexpected_sglang_is_left_alone(
    server: Server, origin: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.lora import utils
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(dp_size=2):
        for _ in range(2):
            with pytest.raises(ValueError, match=UNKNOWN):
                await server.resolve(origin.url("one/"))
    del server.requests.lorax_async
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=UNKNOWN):
        patch.delattr(utils, "get_normalized_target_modules")
        await server.resolve(origin.url("one/"))

    async def changed(self: Any, name: str) -> None: ...

    hooks: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: hooks.append(target))
    register()
    assert len(hooks) == 4
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="LORAX_ASYNC_TIMEOUT"):
        patch.setenv("LORAX_ASYNC_TIMEOUT", "-1")
        register()  # SGLang logs other exceptions, and starts
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    register()
    monkeypatch.setenv("SGLANG_PLUGINS", "another, lorax_async")
    monkeypatch.setattr(TokenizerManager, "_resolve_lora_path", changed)
    monkeypatch.delattr(LoRAAdapter, "__init__")
    register()
    assert len(hooks) == 4
    ours = [record.message for record in caplog.records if "lorax_async" in record.name]
    assert [message.partition(":")[0] for message in ours] == [
        "requests may name loaded adapters only",
        "requests may name loaded adapters only",
        "the scale of rsLoRA is left to SGLang",
        "requests may name loaded adapters only",
    ]
