"""Whole modules (modules_to_save): heads, embeddings, norms and classifiers, row by row.

The reference is PEFT's active model in float32: the same bits alone, and near them in mixed batches.
"""

import asyncio
import copy
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import peft_adapters as variants
import pytest
import torch
import transformers
from event_loops import until
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import (
    PLAIN,
    WEIGHTS,
    Lora,
    llama,
    logits_by_row,
    logits_of,
    pefts,
    prompt,
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
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def build(config: Any, make: Any) -> Any:
    torch.manual_seed(3)
    return make(config).eval()


SIZES: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}

LABELS: Any = {"num_attention_heads": 4, "num_labels": 3}


def gemma() -> Any:
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma2Config(**SIZES, **heads, pad_token_id=0)
    return build(config, transformers.Gemma2ForCausalLM)


def gpt2() -> Any:
    sizes: Any = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)
    return build(config, transformers.GPT2LMHeadModel)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def scored() -> Any:
    config = llama(num_labels=3).config
    return build(config, transformers.LlamaForSequenceClassification)


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, **LABELS)
    return build(config, transformers.BertForSequenceClassification)


def roberta() -> Any:
    config = transformers.RobertaConfig(**SIZES, **LABELS)
    return build(config, transformers.RobertaForSequenceClassification)


BERTS: Any = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
GPT2S: Any = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "head": (llama, {**PLAIN, "modules_to_save": ["lm_head"]}),
    "embedding and head": (llama, {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embedding": (tied, {**PLAIN, "modules_to_save": ["embed_tokens"]}),
    "tied pair": (tied, {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": (llama, {**PLAIN, "modules_to_save": ["norm", "lm_head"]}),
    "a linear of the layers": (llama, {**PLAIN, "modules_to_save": ["mlp.down_proj"]}),
    "gemma": (gemma, {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "gpt2": (gpt2, {**GPT2S, "modules_to_save": ["wte", "lm_head", "ln_f", "mlp.c_fc"]}),
    "score": (scored, {**PLAIN, "task_type": "SEQ_CLS"}),
    "bert": (bert, {**BERTS, "modules_to_save": ["pooler"]}),
    "roberta": (roberta, BERTS),
}
QUICK = ["head", "embedding and head", "tied embedding", "norms", "gemma", "score"]


def trained(model: Any, lora: Lora, seed: int) -> Any:
    """Wrap the model in a new PeftModel of which everything that PEFT saves is random."""
    config = LoraConfig(**copy.deepcopy(lora))
    peft: Any = get_peft_model(model, config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.04, generator=random)
            elif ".modules_to_save." in name:
                weight.add_(torch.empty_like(weight).normal_(0, 0.3, generator=random))
    return peft


def save(
    make: Callable[[], Any], lora: Lora, folder: Path, dtype: Any = None, seed: int = 1
) -> Path:
    trained(make(), lora, seed).save_pretrained(folder)
    if dtype is not None:
        file = folder / WEIGHTS
        cast = {name: tensor.to(dtype) for name, tensor in read_weights(folder).items()}
        save_file(cast, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
async def test_alone_it_has_pefts_bits(name: str, dtype: Any, tmp_path: Path) -> None:
    make, lora = CASES[name]
    adapter = save(make, lora, tmp_path, dtype)
    inputs = prompt(2)
    expected = pefts(make(), adapter, inputs)
    assert torch.equal(await logits_by_row(make(), [adapter] * 2, inputs), expected)
    bare = dict(lora, modules_to_save=None)
    saved = [it for it in read_weights(adapter) if ".lora_" not in it]
    assert saved
    assert not torch.allclose(expected, logits_of(make(), inputs), atol=1e-2), bare


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("name", QUICK)
async def test_in_a_mixed_batch_each_row_is_as_alone(
    name: str, device: str, tmp_path: Path
) -> None:
    make, lora = CASES[name]
    plain = {it: value for it, value in lora.items() if it != "modules_to_save"}
    folders: list[Path | None] = [
        save(make, lora, tmp_path / "one"),
        None,
        save(make, plain, tmp_path / "plain"),
        save(make, lora, tmp_path / "two", seed=2),
    ]
    rows = [0, 1, 2, 3, 0, 3]
    inputs = prompt(len(rows))
    mixed = await logits_by_row(make(), [folders[row] for row in rows], inputs, device=device)
    for folder in folders:
        own = [n for n, row in enumerate(rows) if folders[row] == folder]
        part = {key: value[own] for key, value in inputs.items()}
        expected = logits_of(make(), part) if folder is None else pefts(make(), folder, part)
        torch.testing.assert_close(mixed[own], expected, atol=2e-6, rtol=2e-6)
    assert len({tuple(row.flatten().tolist()) for row in mixed}) == len(rows)


async def test_it_is_streamed_evicted_and_loaded_again(tmp_path: Path) -> None:
    """The head comes last: the layers are computed before it is here."""
    adapter = save(llama, CASES["embedding and head"][1], tmp_path / "whole")
    other = save(llama, CASES["head"][1], tmp_path / "other", seed=2)
    expected = {it: pefts(llama(), it, prompt(1)) for it in (adapter, other)}
    source, model, computed = FakeSource(), llama(), list[int]()
    for name, folder in (("whole", adapter), ("other", other)):
        content = [(folder / file).read_bytes() for file in ("adapter_config.json", WEIGHTS)]
        source.put(name, content[0], content[1])
    source.hold("whole")
    model.model.layers[1].register_forward_hook(lambda *_: computed.append(1))
    async with serving(model, source=source, max_slots=1) as (loader, attached):
        async with loader.stream("whole") as handle:
            assert handle.layers == (-1, 0, 1, 2)
            with attached.batch([handle]):
                forward = asyncio.create_task(asyncio.to_thread(logits_of, model, prompt(1)))
                source.allow("whole", 0, 1, 2)
                await until(lambda: computed)
                assert not forward.done()
                source.allow("whole")
                assert torch.equal(await forward, expected[adapter])
        for name, folder in [("other", other), ("whole", adapter)] * 2:
            async with await loader.load(name) as handle:
                with attached.batch([handle]):
                    logits = await asyncio.to_thread(logits_of, model, prompt(1))
                assert torch.equal(logits, expected[folder])
        with attached.batch([None]):
            base = await asyncio.to_thread(logits_of, model, prompt(1))
    assert torch.equal(base, logits_of(llama(), prompt(1)))
    assert torch.equal(logits_of(model, prompt(1)), base)  # detached


async def test_generation_is_pefts(tmp_path: Path) -> None:
    adapter = save(tied, CASES["tied pair"][1], tmp_path)
    generate: Any = {"max_new_tokens": 6, "do_sample": False}
    peft: Any = PeftModel.from_pretrained(tied(), adapter).eval()
    expected = peft.generate(**prompt(2), **generate)
    model = tied()
    async with serving(model) as (loader, attached), await loader.load(adapter) as handle:
        with attached.batch([handle] * 2):
            found = await asyncio.to_thread(lambda: model.generate(**prompt(2), **generate))
    assert torch.equal(found, expected)


async def test_handles_have_the_modules(tmp_path: Path) -> None:
    adapter = save(bert, CASES["bert"][1], tmp_path)
    file = read_weights(adapter)
    async with serving(bert()) as (loader, _), await loader.load(adapter) as handle:
        names = {name for name, it in handle.modules.items() if isinstance(it, WholeModule)}
        assert names == {"bert.pooler.dense", "classifier"}
        for name in names:
            found: Any = handle.modules[name]
            for key in ("weight", "bias"):
                assert torch.equal(getattr(found, key), file[f"base_model.model.{name}.{key}"])
            with pytest.raises(UsageError, match="replaces this whole module, and has no 'a'"):
                _ = found.a
        assert handle.extras is not None
        assert handle.nbytes >= sum(it.nbytes for it in file.values())
        query = handle.modules["bert.encoder.layer.0.attention.self.query"]
        assert not isinstance(query, WholeModule)


GROWN: Any = {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize("tied_too", [False, True])
@pytest.mark.parametrize("rows", [70, 60])
async def test_a_resized_vocabulary_answers_with_its_own_logits(
    rows: int, tied_too: bool, tmp_path: Path
) -> None:
    def grown() -> Any:
        return llama(vocab_size=rows, tie_word_embeddings=tied_too)

    def base() -> Any:
        return llama(tie_word_embeddings=tied_too)

    adapter = save(grown, GROWN, tmp_path / "grown")
    plain = save(base, PLAIN, tmp_path / "plain")
    inputs = {"input_ids": torch.tensor([[rows - 1, 3, rows - 2], [4, 5, 6], [7, 8, 9]])}
    alone = {"input_ids": inputs["input_ids"][:1]}

    model = base()
    async with serving(model) as (loader, attached), AsyncExitStack() as stack:
        own, other = [stack.enter_context(await loader.load(it)) for it in (adapter, plain)]
        assert (own.vocabulary, other.vocabulary) == (rows, None)
        with await loader.load(other.key) as released:
            pass
        assert released.vocabulary is None, "it needs no lease"
        with attached.batch([own]):
            logits = await asyncio.to_thread(logits_of, model, alone)
        # The grown base's layers were drawn after a larger embedding: take this base's.
        peft = PeftModel.from_pretrained(base_with(rows, tied_too), adapter).eval()
        assert torch.equal(logits, logits_of(peft, alone))
        with attached.batch([own, None, other]):
            mixed = await asyncio.to_thread(logits_of, model, inputs)
    wide = max(rows, 64)
    assert mixed.shape == (3, 3, wide)
    torch.testing.assert_close(mixed[:1, :, :rows], logits, atol=2e-6, rtol=2e-6)
    assert mixed[:1, :, rows:].eq(-torch.inf).all()
    assert mixed[1:, :, 64:].eq(-torch.inf).all()
    rest = {"input_ids": inputs["input_ids"][1:2]}
    torch.testing.assert_close(mixed[1:2, :, :64], logits_of(base(), rest), atol=2e-6, rtol=2e-6)


def base_with(rows: int, tied_too: bool) -> Any:
    model = llama(tie_word_embeddings=tied_too)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


async def test_capped_logits_of_two_widths_do_not_share_a_batch(tmp_path: Path) -> None:
    """The model would make a finite logit of -inf."""

    def grown() -> Any:
        model = gemma()
        model.resize_token_embeddings(70, mean_resizing=False)
        return model.eval()

    adapter = save(grown, GROWN, tmp_path)
    assert torch.equal(
        await logits_by_row(gemma(), [adapter] * 2, prompt(2)), pefts(grown(), adapter, prompt(2))
    )
    with pytest.raises(UsageError, match="caps its logits"):
        await logits_by_row(gemma(), [adapter, None], prompt(2))


async def test_an_id_that_the_base_does_not_know_is_an_error_in_its_own_row(tmp_path: Path) -> None:
    adapter = save(lambda: llama(vocab_size=70), GROWN, tmp_path)
    inputs = {"input_ids": torch.tensor([[3, 4], [65, 5]])}
    with pytest.raises(IndexError):
        await logits_by_row(llama(), [adapter, None], inputs)


def change(folder: Path, make: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = read_weights(folder)
    make(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


BASE = "base_model.model."


@pytest.mark.parametrize(
    ("lora", "edit", "error", "text"),
    [
        # Half of a resized vocabulary, and half of what PEFT would load into both of a tied pair.
        ({"modules_to_save": ["lm_head"]}, ("grow", "lm_head"), UnsupportedAdapterError, "resizes"),
        ({}, ("add", "lm_head"), UnsupportedAdapterError, "replaces lm_head and not model.embed"),
        # A module that the config does not name, one that the base lacks, one of another shape.
        ({}, ("add", "model.norm"), AdapterFormatError, "'adapter_config.json does not name|not"),
        ({"modules_to_save": ["x"]}, ("add", "x"), IncompatibleAdapterError, "no such module"),
        (
            {"modules_to_save": ["norm"]},
            ("grow", "model.norm"),
            IncompatibleAdapterError,
            r"model.norm \(its weight is \[33\], the base's is \[32\]\)",
        ),
        # A and B of it too, which PEFT would ignore.
        (
            {"modules_to_save": ["lm_head"]},
            ("pair", "lm_head"),
            AdapterFormatError,
            r"lm_head \(modules_to_save\)",
        ),
        (
            {"modules_to_save": ["norm"]},
            ("bias", "model.norm"),
            IncompatibleAdapterError,
            "missing",
        ),
    ],
)
async def test_what_is_not_whole_is_refused(
    lora: Any, edit: tuple[str, str], error: type[Exception], text: str, tmp_path: Path
) -> None:
    adapter = save(llama, {**PLAIN, **lora}, tmp_path)
    how, name = edit

    def make(tensors: dict[str, torch.Tensor]) -> None:
        path = f"{BASE}{name}"
        if how == "grow":
            tensors[f"{path}.weight"] = torch.cat([tensors[f"{path}.weight"]] * 2)[
                : len(tensors[f"{path}.weight"]) + 1
            ]
        elif how == "add":
            tensors[f"{path}.weight"] = torch.ones(32) if "norm" in name else torch.ones(64, 32)
        elif how == "bias":
            tensors[f"{path}.bias"] = torch.ones(32)
        else:
            del tensors[f"{path}.weight"]
            tensors[f"{path}.lora_A.weight"] = torch.ones(4, 32)
            tensors[f"{path}.lora_B.weight"] = torch.ones(64, 4)

    async with serving(llama()) as (loader, _):
        with pytest.raises(error, match=text):
            await loader.load(change(adapter, make))


async def test_a_model_without_that_bias_refuses_the_adapter(tmp_path: Path) -> None:
    adapter = save(llama, CASES["head"][1], tmp_path)
    change(adapter, lambda it: it.update({f"{BASE}lm_head.bias": torch.ones(64)}))
    with pytest.raises(UsageError, match="replaces the bias of module 'lm_head', and the model's"):
        await logits_by_row(llama(), [adapter], prompt(1))


async def test_nan_in_a_whole_module_is_refused(tmp_path: Path) -> None:
    adapter = save(llama, CASES["norms"][1], tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{BASE}model.norm.weight"][3] = torch.nan

    async with serving(llama()) as (loader, _):
        with pytest.raises(AdapterFormatError, match="'model.norm' has NaN"):
            await loader.load(change(adapter, spoil))


async def test_a_classifiers_head_is_vllms_to_judge(tmp_path: Path) -> None:
    adapter = save(scored, CASES["score"][1], tmp_path)
    for known in (layouts.from_module(scored()), None):
        assert BaseRequirements(known, None, engine="vLLM").check(adapter) > 0
        with pytest.raises(UnsupportedAdapterError, match="score.weight.*modules_to_save.*SGLang"):
            BaseRequirements(known, None, engine="SGLang").check(adapter)


async def test_engines_that_cannot_apply_it_refuse_it_by_name(tmp_path: Path) -> None:
    adapter = save(llama, CASES["head"][1], tmp_path)
    layout = layouts.from_module(llama())
    for known in (layout, None):
        assert BaseRequirements(known, None).check(adapter) > 0
        with pytest.raises(UnsupportedAdapterError, match="lm_head.weight.*modules_to_save.*vLLM"):
            BaseRequirements(known, None, engine="vLLM").check(adapter)
    found = inspect_adapter(adapter, layout)
    assert found.problems == {}
    assert "lm_head" in {target.name for target in found.targets}


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_holds_its_share(rank: int, tmp_path: Path) -> None:
    lora = {**PLAIN, "modules_to_save": ["lm_head", "norm", "down_proj", "embed_tokens"]}
    adapter = save(llama, lora, tmp_path)
    file = read_weights(adapter)
    config = LoaderConfig(device_bytes=1 << 20, shard=Shard(rank, 2))
    down = "model.layers.1.mlp.down_proj"
    loader = AdapterLoader(layouts.from_module(llama()), config)
    async with loader, await loader.load(adapter) as handle:
        wanted = {
            "lm_head": file[f"{BASE}lm_head.weight"].chunk(2)[rank],
            "model.norm": file[f"{BASE}model.norm.weight"],
            "model.embed_tokens": file[f"{BASE}model.embed_tokens.weight"],
            down: file[f"{BASE}{down}.weight"].chunk(2, 1)[rank],
        }
        for name, tensor in wanted.items():
            found: Any = handle.modules[name]
            assert torch.equal(found.weight, tensor), name
    grown = save(lambda: llama(vocab_size=70), GROWN, tmp_path / "grown")
    async with AdapterLoader(layouts.from_module(llama()), config) as loader:
        with pytest.raises(UnsupportedAdapterError, match="tensor parallelism"):
            await loader.load(grown)
