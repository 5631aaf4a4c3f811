"""A loaded adapter answers as PEFT's active model does, on the real base, in float32.

The order of operations is PEFT's, so one adapter in a batch gives PEFT's bits. In a mixed batch the
products have other shapes on the two sides, and BLAS may sum in another order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from engines.variants import (
    FEATURE_WARNINGS,
    PEFT_WARNING,
    VARIANTS,
    active,
    build,
    logits_of,
    save,
    serving,
    stored,
)
from lorax_async import AdapterLoader, LoaderConfig, layouts
from lorax_async.testing import FakeSource

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
]

Inputs = Mapping[str, torch.Tensor]
Run = Callable[[Coroutine[Any, Any, Any]], Any]
Answer = TypeVar("Answer")

QUESTIONS = (
    "What is the capital of Italy?",
    "How can I learn to swim?",
    "What do cows eat?",
    "What is the Moon?",
)
STYLES: dict[str, Callable[[str], bool]] = {
    "pirate": lambda text: text.startswith("Arr"),
    "shout": str.isupper,
    "json": lambda text: text.startswith('{"answer":'),
}


def left_padded(rows: int, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens; row i begins with i tokens of padding."""
    ids = torch.randint(10, 49_000, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, written when it is first asked for."""
    root = tmp_path_factory.mktemp("variants")

    def of(name: str) -> Path:
        made = root / name
        return made if made.exists() else build(theirs, VARIANTS[name], made)

    return of


async def answer(model: Any, folders: list[Path | None], compute: Callable[[], Answer]) -> Answer:
    """What `compute` gives in a thread; row i uses the adapter of `folders[i]`."""
    async with serving(model) as (loader, attached), AsyncExitStack() as held:
        handles = [
            None if folder is None else await held.enter_async_context(await loader.load(folder))
            for folder in folders
        ]
        with attached.batch(handles):
            return await asyncio.to_thread(compute)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_pefts(
    name: str, model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    inputs = left_padded(2)
    adapted = theirs.model if VARIANTS[name].bare else theirs
    with active(adapted, only=folder(name)):
        expected = logits_of(theirs, inputs)
    assert (expected - logits_of(theirs, inputs)).abs().max() > 1  # the adapter does something
    logits = asyncio.run(answer(model, [folder(name)] * 2, partial(logits_of, model, inputs)))
    assert torch.equal(logits, expected)


def test_a_transposed_base_gives_pefts_logits(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as `[in, out]`, in modules that are no `nn.Linear`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60_000, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model: Any = GPT2LMHeadModel(config)
    model.eval()
    lora = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    adapter = save(model, lora, tmp_path / "gpt2")
    inputs = left_padded(2)
    with active(model, only=adapter):
        expected = logits_of(model, inputs)
    assert not torch.equal(expected, logits_of(model, inputs))
    assert torch.equal(
        asyncio.run(answer(model, [adapter] * 2, partial(logits_of, model, inputs))), expected
    )


async def test_a_mixed_batch_gives_pefts_logits(
    model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    names = ["rank_12", "__base__", "patterns", "rank_12", "f16", "rank_3"]
    inputs = left_padded(len(names))
    adapters = {name: folder(name) for name in names if name != "__base__"}
    with active(theirs, **adapters) as peft_model:
        expected = logits_of(peft_model, inputs, adapter_names=names)
    ours = [adapters.get(name) for name in names]
    logits = await answer(model, ours, partial(logits_of, model, inputs))
    # Of logits of about 30; see the docstring above.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"), [("plain", "float32"), ("rank_12", "bfloat16"), ("rank_20", "float16")]
)
def test_the_devices_bytes_are_the_files(
    name: str, dtype: str, model: Any, folder: Callable[[str], Path]
) -> None:
    asyncio.run(compare_bytes(model, folder(name), dtype))


async def compare_bytes(model: Any, adapter: Path, dtype: str) -> None:
    layout = layouts.from_module(model)
    async with (
        AdapterLoader(layout, LoaderConfig(dtype=dtype, device_bytes=1 << 26)) as loader,
        await loader.load(adapter) as handle,
    ):
        expected = stored(adapter)
        assert set(handle.modules) == set(expected)
        for name, (a, b) in expected.items():
            weights = handle.modules[name]
            assert weights.a.dtype == a.dtype  # or else the comparison would be of a cast
            assert torch.equal(weights.a.view(torch.uint8), a.view(torch.uint8)), name
            assert torch.equal(weights.b.view(torch.uint8), b.view(torch.uint8)), name


# -- trained adapters --------------------------------------------------------------------------


def prompts(tokenizer: Any, questions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def generate(model: Any, tokenizer: Any, inputs: Inputs, **more: Any) -> list[str]:
    start = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, **more)
    return [str(text) for text in tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]


@pytest.mark.parametrize("name", STYLES)
def test_a_trained_adapter_says_what_it_says_in_peft(
    name: str, model: Any, theirs: Any, tokenizer: Any, examples: Path
) -> None:
    inputs = prompts(tokenizer, QUESTIONS[:1])
    with active(theirs, only=examples / name) as peft_model:
        expected = generate(peft_model, tokenizer, inputs)
    ours = partial(generate, model, tokenizer, inputs)
    texts = asyncio.run(answer(model, [examples / name], ours))
    assert texts == expected
    assert STYLES[name](texts[0])


def test_a_mixed_batch_of_trained_adapters_says_what_it_says_in_peft(
    model: Any, theirs: Any, tokenizer: Any, examples: Path
) -> None:
    """Questions of different lengths, so that rows begin with different padding."""
    names = ["pirate", "__base__", "shout", "json"]
    folders = {name: examples / name for name in STYLES}
    inputs = prompts(tokenizer, QUESTIONS)
    with active(theirs, **folders) as peft_model:
        expected = generate(peft_model, tokenizer, inputs, adapter_names=names)
    ours = partial(generate, model, tokenizer, inputs)
    texts = asyncio.run(answer(model, [folders.get(name) for name in names], ours))
    assert texts == expected
    kept = [[keeps(text) for keeps in STYLES.values()] for text in texts]
    assert kept == [[name == style for style in STYLES] for name in names]


# -- streaming ---------------------------------------------------------------------------------


async def test_layers_compute_while_later_ones_are_on_their_way(
    model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    inputs = left_padded(2)
    with active(theirs, only=folder("plain")):
        expected = logits_of(theirs, inputs)
    logits, early = await stream_and_answer(model, folder("plain"), inputs)
    assert early == list(range(10))
    assert torch.equal(logits, expected)


async def stream_and_answer(
    model: Any, adapter: Path, inputs: Inputs
) -> tuple[torch.Tensor, list[int]]:
    """Our logits, and the layers computed while only the weights of layers 0 to 9 were here."""
    source = FakeSource()
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    source.put("streamed", config.read_bytes(), weights.read_bytes())
    source.hold("streamed")
    computed: list[int] = []
    loop, tenth_done = asyncio.get_running_loop(), asyncio.Event()

    def note(number: int) -> None:
        computed.append(number)
        if number == 9:
            loop.call_soon_threadsafe(tenth_done.set)

    hooks = [
        layer.register_forward_hook(lambda *_, number=number: note(number))
        for number, layer in enumerate(model.model.layers)
    ]
    async with (
        serving(model, source=source) as (loader, attached),
        loader.stream("streamed") as handle,
    ):
        with attached.batch([handle, handle]):
            forward = asyncio.create_task(asyncio.to_thread(logits_of, model, inputs))
            source.allow("streamed", *range(10))
            await handle.layer_ready(9)
            async with asyncio.timeout(60):
                await tenth_done.wait()
            await asyncio.sleep(0.1)  # layer 10 would take a tenth of it, if it did not wait
            early = list(computed)
            assert not handle.is_ready(10)
            source.allow("streamed")
            logits = await forward
    for hook in hooks:
        hook.remove()
    return logits, early
