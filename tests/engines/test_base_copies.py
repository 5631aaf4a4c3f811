"""Copies of the base's own weights, which PEFT's default save adds, are compared with the base."""

import asyncio
from pathlib import Path
from typing import Any

import peft_adapters as variants
import pytest
import torch
from event_loops import until
from peft_adapters import (
    WEIGHTS,
    llama,
    logits_of,
    logits_with,
    pefts,
    prompt,
    read_weights,
    serving,
)
from safetensors.torch import save_file

from lorax_async import (
    AdapterLoader,
    IncompatibleAdapterError,
    LoaderConfig,
    Shard,
    UnsupportedAdapterError,
    layouts,
)
from lorax_async.cli.inspect import inspect_adapter
from lorax_async.engines.plugin_settings import BaseRequirements
from lorax_async.testing import FakeSource

pytestmark = [pytest.mark.filterwarnings(variants.FEATURE_WARNINGS)]
HEAD, TOKENS = ["lm_head", "q_proj"], ["embed_tokens", "lm_head", "v_proj"]
COPY = "base_model.model.lm_head.base_layer.weight"


def save(model: Any, targets: list[str], folder: Path, **lora: Any) -> Path:
    """Save as PEFT does by default, which warns that it adds the base's weights."""
    settings = {"r": 4, "target_modules": targets, **lora}
    warned = pytest.warns(UserWarning, match="save_embedding_layers")
    with variants.wrapped(model, settings) as peft, warned:
        peft.save_pretrained(folder)
    return folder


def change(folder: Path, name: str, make: Any) -> Path:
    tensors = read_weights(folder)
    tensors[name] = make(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [HEAD, TOKENS], ids=["head", "both"])
async def test_it_is_applied_as_peft_applies_it(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    base = {"tie_word_embeddings": tied}
    adapter = save(llama(**base), targets, tmp_path)
    copies = [name for name in read_weights(adapter) if "base_layer" in name]
    assert len(copies) == len(targets) - 1
    expected = pefts(llama(**base), adapter, prompt(2))
    assert torch.equal(await logits_with(llama(**base), adapter, prompt(2)), expected)
    assert not torch.equal(expected, logits_of(llama(**base), prompt(2)))


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_copies_take_no_room_on_the_device_and_others_are_refused(
    device: str, tmp_path: Path
) -> None:
    model, adapter = llama(), save(llama(), HEAD, tmp_path / "equal")
    plain = variants.save(llama(), {"r": 4, "target_modules": HEAD}, tmp_path / "plain")
    other = change(save(llama(), HEAD, tmp_path / "other"), COPY, lambda it: it + 1e-6)
    async with serving(model, device=device) as (loader, _):
        async with await loader.load(adapter) as handle, await loader.load(plain) as without:
            assert handle.nbytes == without.nbytes
            assert len(handle.modules) == len(without.modules)
        await loader.unload(adapter)
        async with await loader.load(adapter) as again:
            assert again.resident
        with pytest.raises(IncompatibleAdapterError, match="'lm_head' differs from the base's"):
            await loader.load(other)
        await until(lambda: loader.placement().usage.slots.used == 2)
    async with serving(model, base_copies="trust") as (loader, _), await loader.load(other) as it:
        assert it.resident


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_the_base_is_cast_to_the_dtype_of_the_file(dtype: Any, tmp_path: Path) -> None:
    """As where a base in float32 serves what was trained on it in half precision."""
    adapter = change(save(llama(), HEAD, tmp_path), COPY, lambda it: it.to(dtype))
    assert (await logits_with(llama(), adapter, prompt(1))).isfinite().all()


async def test_a_streamed_head_waits_for_its_comparison(tmp_path: Path) -> None:
    """The layers before it are computed meanwhile; a copy that differs fails the pass."""
    model, source = llama(), FakeSource()
    adapter = save(llama(), HEAD, tmp_path / "equal")
    other = change(save(llama(), HEAD, tmp_path / "other"), COPY, lambda it: it.flip(0))
    for name, folder in (("equal", adapter), ("other", other)):
        source.put(
            name, *((folder / file).read_bytes() for file in ("adapter_config.json", WEIGHTS))
        )
        source.hold(name)
    computed = list[int]()
    model.model.layers[1].register_forward_hook(lambda *_: computed.append(1))
    expected = pefts(llama(), adapter, prompt(1))
    async with serving(model, source=source) as (loader, attached):
        async with loader.stream("equal") as handle:
            with attached.batch([handle]):
                forward = asyncio.create_task(asyncio.to_thread(logits_of, model, prompt(1)))
                source.allow("equal", 0, 1)
                await until(lambda: computed)
                assert not forward.done()
                source.allow("equal")
                assert torch.equal(await forward, expected)
        async with loader.stream("other") as handle:
            with attached.batch([handle]):
                source.allow("other")
                with pytest.raises(IncompatibleAdapterError, match="differs from the base's"):
                    await asyncio.to_thread(logits_of, model, prompt(1))


@pytest.mark.parametrize("tied", [False, True])
async def test_a_loader_without_a_model_compares_with_the_bases_files(
    tied: bool, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")  # several files
    adapter = save(llama(tie_word_embeddings=tied), TOKENS, tmp_path / "adapter")
    other = change(save(model, TOKENS, tmp_path / "other"), COPY, lambda it: it.neg())
    layout = layouts.from_pretrained(tmp_path / "base", "float32")
    async with AdapterLoader(layout, LoaderConfig(device_bytes=1 << 20)) as loader:
        async with await loader.load(adapter) as handle:
            assert handle.resident
        with pytest.raises(IncompatibleAdapterError, match="differs from the base's"):
            await loader.load(other)
    check = BaseRequirements(layout, None).check
    assert check(adapter) > 0
    with pytest.raises(IncompatibleAdapterError, match="differs from the base's"):
        check(other)
    assert BaseRequirements(layout, None, base_copies="trust").check(other) > 0
    unknown = layouts.from_module(model)
    with pytest.raises(UnsupportedAdapterError, match="no base to compare it with"):
        BaseRequirements(unknown, None).check(adapter)
    assert BaseRequirements(unknown, None, base=str(tmp_path / "base")).check(adapter) > 0
    found = inspect_adapter(adapter, layout, "base")
    assert (found.problems, found.base_copies) == ({}, ["model.embed_tokens", "lm_head"])
    assert "IncompatibleAdapterError" in inspect_adapter(other, layout, "base").problems.values()
    assert inspect_adapter(other).problems == {}  # there is nothing to compare it with


async def test_without_a_base_it_is_refused_with_the_remedies(tmp_path: Path) -> None:
    adapter = save(llama(), HEAD, tmp_path)
    config = LoaderConfig(device_bytes=1 << 20)
    remedy = "'lm_head', and there is no base .*save_embedding_layers=False.*'trust'"
    async with AdapterLoader(layouts.from_module(llama()), config) as loader:
        with pytest.raises(UnsupportedAdapterError, match=remedy):
            await loader.load(adapter)


async def test_a_resized_vocabulary_is_named(tmp_path: Path) -> None:
    adapter = save(llama(vocab_size=65), HEAD, tmp_path)
    async with serving(llama()) as (loader, _):
        with pytest.raises(
            IncompatibleAdapterError, match=r"copy of the base's weight is \[65, 32\]"
        ):
            await loader.load(adapter)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_compares_its_rows_of_the_head(rank: int, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter = save(llama(), TOKENS, tmp_path / "adapter")
    rows = range(32 * rank, 32 * rank + 32)

    def spoil(row: int) -> Any:
        return lambda weight: weight.index_fill(0, torch.tensor([row]), 7.0)

    other = change(save(llama(), TOKENS, tmp_path / "other"), COPY, spoil(rows[3]))
    elsewhere = change(save(llama(), TOKENS, tmp_path / "x"), COPY, spoil((rows[3] + 32) % 64))
    layout = layouts.from_pretrained(tmp_path / "base", "float32")
    config = LoaderConfig(device_bytes=1 << 20, shard=Shard(rank, 2))
    async with AdapterLoader(layout, config) as loader:
        async with await loader.load(adapter) as handle, await loader.load(elsewhere) as same:
            assert handle.resident
            assert same.resident
        with pytest.raises(IncompatibleAdapterError, match="differs from the base's"):
            await loader.load(other)
