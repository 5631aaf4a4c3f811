"""Trained tokens (trainable_token_indices): rows of the embedding, and logits of a tied head."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import peft_adapters as variants
import pytest
import torch
import transformers
from event_loops import until
from peft import LoraConfig, get_peft_model
from peft_adapters import (
    PLAIN,
    WEIGHTS,
    llama,
    logits_by_row,
    logits_of,
    pefts,
    read_weights,
    serving,
)
from safetensors.torch import save_file

from lorax_async import (
    AdapterFormatError,
    AdapterLoader,
    IncompatibleAdapterError,
    LoaderConfig,
    Shard,
    UnsupportedAdapterError,
    UsageError,
    WholeModule,
    layouts,
)
from lorax_async.cli.inspect import inspect_adapter
from lorax_async.engines.plugin_settings import BaseRequirements
from lorax_async.testing import FakeSource

pytestmark = [
    pytest.mark.filterwarnings(variants.FEATURE_WARNINGS),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
]
SOME = [5, 2, 63]
IDS = {"input_ids": torch.tensor([[2, 3, 5, 63], [5, 5, 2, 7], [9, 2, 63, 1], [5, 6, 7, 8]])}
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
tied = partial(llama, tie_word_embeddings=True)


def gemma() -> Any:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.GemmaConfig(**sizes, **heads, vocab_size=64, pad_token_id=0)
    torch.manual_seed(3)
    model: Any = transformers.GemmaForCausalLM(config)
    return model.eval()


CASES: dict[str, tuple[Any, Any]] = {
    "untied": (llama, SOME),
    "tied": (tied, SOME),
    "gemma": (gemma, {"embed_tokens": SOME}),
    "each its own": (llama, {"embed_tokens": SOME, "lm_head": [1, 4]}),
    "both of a tied pair": (tied, {"embed_tokens": SOME, "lm_head": SOME}),
}


def save(make: Any, tokens: Any, folder: Path, seed: int = 1, **more: Any) -> Path:
    config = LoraConfig(**{**PLAIN, "trainable_token_indices": tokens, **more})
    peft: Any = get_peft_model(make(), config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.04, generator=random)
            elif "trainable_tokens_delta" in name:
                weight.normal_(0, 0.7, generator=random)
    peft.save_pretrained(folder)
    return folder


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("name", CASES)
async def test_alone_it_is_pefts(name: str, tmp_path: Path) -> None:
    """The same bits but for a head's logits of these tokens, which are a product of their own."""
    make, tokens = CASES[name]
    adapter = save(make, tokens, tmp_path)
    expected = pefts(make(), adapter, IDS)
    found = await logits_by_row(make(), [adapter] * 4, IDS)
    columns = [n for n in range(64) if n not in {*SOME, 1, 4}]
    assert torch.equal(found[..., columns], expected[..., columns])
    near(found, expected)
    if name == "untied":
        assert torch.equal(found, expected)
    assert not torch.allclose(expected, logits_of(make(), IDS), atol=0.1)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("name", ["untied", "tied", "gemma"])
async def test_in_a_mixed_batch_each_row_is_as_alone(
    name: str, device: str, tmp_path: Path
) -> None:
    make, tokens = CASES[name]
    plain = variants.save(make(), PLAIN, tmp_path / "plain")
    folders: list[Path | None] = [
        save(make, tokens, tmp_path / "one"),
        None,
        save(make, [5, 8], tmp_path / "two", seed=2),
        plain,
    ]
    mixed = await logits_by_row(make(), folders, IDS, device=device)
    for row, folder in enumerate(folders):
        part = {"input_ids": IDS["input_ids"][row : row + 1]}
        expected = logits_of(make(), part) if folder is None else pefts(make(), folder, part)
        near(mixed[row : row + 1], expected)


async def test_it_is_streamed_evicted_and_loaded_again(tmp_path: Path) -> None:
    adapter = save(tied, SOME, tmp_path / "one")
    other = save(tied, [3, 5], tmp_path / "two", seed=2)
    expected = {it: pefts(tied(), it, IDS) for it in (adapter, other)}
    source, model, computed = FakeSource(), tied(), list[int]()
    for name, folder in (("one", adapter), ("two", other)):
        content = [(folder / file).read_bytes() for file in ("adapter_config.json", WEIGHTS)]
        source.put(name, content[0], content[1])
    source.hold("one")
    model.model.embed_tokens.register_forward_hook(lambda *_: computed.append(1))
    async with serving(model, source=source, max_slots=1) as (loader, attached):
        async with loader.stream("one") as handle:
            with attached.batch([handle] * 4):
                forward = asyncio.create_task(asyncio.to_thread(logits_of, model, IDS))
                await asyncio.wait([forward], timeout=0.05)
                assert not computed
                source.allow("one", 0)
                await until(lambda: computed)
                assert not forward.done()
                source.allow("one")
                near(await forward, expected[adapter])
        for name, folder in [("two", other), ("one", adapter)] * 2:
            async with await loader.load(name) as handle:
                with attached.batch([handle] * 4):
                    near(await asyncio.to_thread(logits_of, model, IDS), expected[folder])


async def test_handles_have_the_rows_and_engines_refuse_them(tmp_path: Path) -> None:
    adapter = save(llama, SOME, tmp_path)
    rows = read_weights(adapter)[ROWS]
    layout = layouts.from_module(llama())
    async with serving(llama()) as (loader, _), await loader.load(adapter) as handle:
        found: Any = handle.modules["model.embed_tokens"]
        assert (type(found), found.tokens) == (WholeModule, tuple(SOME))
        assert torch.equal(found.weight, rows)
    for known in (layout, None):
        for engine in ("vLLM", "SGLang"):
            with pytest.raises(UnsupportedAdapterError, match=f"trainable_token_indices.*{engine}"):
                BaseRequirements(known, None, engine=engine).check(adapter)
    for base in (layout, None):
        assert inspect_adapter(adapter, base).problems == {}
    config = LoaderConfig(device_bytes=1 << 20, shard=Shard(0, 2))
    async with AdapterLoader(layout, config) as loader:
        with pytest.raises(UnsupportedAdapterError, match="trained tokens.*without a shard"):
            await loader.load(adapter)


@pytest.mark.parametrize(
    ("tokens", "rows", "error", "text"),
    [
        ([5, 2], None, AdapterFormatError, "names 2 tokens of this module"),
        ([5, 2, 2], None, AdapterFormatError, "names 2 tokens of this module"),
        ([5, 2, 64], None, IncompatibleAdapterError, "tokens up to 64, and the base's .* 64 rows"),
        ([5, 2, -1], None, IncompatibleAdapterError, "the base's"),
        ({"lm_head": SOME}, None, AdapterFormatError, "names 0 tokens of this module"),
        (None, None, AdapterFormatError, "names 0 tokens of this module"),
        (SOME, torch.ones(3, 31), IncompatibleAdapterError, "has rows of 31"),
        (SOME, "none", AdapterFormatError, "the file has no rows for them"),
    ],
)
async def test_config_rows_and_base_belong_together(
    tokens: Any, rows: Any, error: Any, text: str, tmp_path: Path
) -> None:
    config, tensors = _edited(save(llama, SOME, tmp_path))
    if isinstance(rows, str):
        del tensors[ROWS]
    elif rows is not None:
        tensors[ROWS] = rows
    async with serving(llama()) as (loader, _):
        with pytest.raises(error, match=text):
            await loader.load_tensors("x", tensors, {**config, "trainable_token_indices": tokens})


def _edited(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config: dict[str, Any] = LoraConfig.from_pretrained(str(folder)).to_dict()
    return config, read_weights(folder)


async def test_a_pair_that_is_not_tied_here_and_a_head_changed_twice_are_refused(
    tmp_path: Path,
) -> None:
    both = save(tied, {"embed_tokens": SOME, "lm_head": SOME}, tmp_path / "both")
    with pytest.raises(UsageError, match="of a tied head, and the model's is not tied"):
        await logits_by_row(llama(), [both] * 4, IDS)
    config, tensors = _edited(save(tied, SOME, tmp_path / "head"))
    for part, shape in (("A", (4, 32)), ("B", (64, 4))):
        tensors[f"base_model.model.lm_head.lora_{part}.weight"] = torch.ones(shape)
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    async with serving(tied()) as (loader, attached):
        handle = await loader.load_tensors("x", tensors, config)
        refused = pytest.raises(UsageError, match="it changes otherwise too")
        with handle, refused, attached.batch([handle]):
            pass


async def test_nan_in_trained_tokens_is_refused(tmp_path: Path) -> None:
    adapter = save(llama, SOME, tmp_path)
    tensors = read_weights(adapter)
    tensors[ROWS][1, 3] = torch.inf
    save_file(tensors, adapter / WEIGHTS)
    async with serving(llama()) as (loader, _):
        with pytest.raises(AdapterFormatError, match="'model.embed_tokens' has NaN or infinite"):
            await loader.load(adapter)
