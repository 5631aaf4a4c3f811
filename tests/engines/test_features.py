"""Biases, magnitudes and embeddings on the real base: in mixed batches, devices and generation.

PEFT's active model is the oracle: merging is none where the head is tied to the embedding. That one
adapter in a batch gives PEFT's bits is in test_peft_equality.py; here products have other shapes on
the two sides, or ranks are padded, and BLAS may sum in another order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines.test_peft_equality import answer, left_padded
from engines.variants import (
    ATTENTION,
    EVERY,
    FEATURE_WARNINGS,
    PEFT_WARNING,
    VARIANTS,
    Variant,
    active,
    build,
    logits_of,
    serving,
)
from late_device.world import loaded
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, layouts
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.testing import SimulatedDevice

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
    pytest.mark.slow,
]

MORE = {
    "padded_dora": Variant({**EVERY, "r": 3, "use_dora": True}),
    "padded_bias": Variant({**ATTENTION, "r": 3, "lora_bias": True}),
    "tied": Variant({"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant, written when it is first asked for."""
    root = tmp_path_factory.mktemp("features")

    def of(name: str) -> Path:
        made = root / name
        return made if made.exists() else build(theirs, (VARIANTS | MORE)[name], made)

    return of


def near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    # Of about 30; kernels round otherwise for other shapes, on some processors by 0.002. Another
    # adapter would be off by more than 1.
    torch.testing.assert_close(logits, expected, atol=4e-3, rtol=1e-4)


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(
    model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    """Rows of one adapter apart and side by side. PEFT itself mixes no DoRA."""
    names = [
        "dora",
        "",
        "lora_bias",
        "plain",
        "embedding_and_all",
        "dora_embedding",
        "dora",
        "dora",
    ]
    inputs = left_padded(len(names))
    base = logits_of(theirs, inputs)
    ours = [folder(name) if name else None for name in names]
    mixed = asyncio.run(answer(model, ours, partial(logits_of, model, inputs)))
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if not name:
            assert torch.equal(mixed[rows], base[rows])
            continue
        with active(theirs, only=folder(name)):
            expected = logits_of(theirs, inputs)
        assert (expected - base).abs().max() > 1
        near(mixed[rows], expected[rows])
        solo = {key: value[rows] for key, value in inputs.items()}
        alone = asyncio.run(
            answer(model, [folder(name)] * len(rows), partial(logits_of, model, solo))
        )
        near(mixed[rows], alone)


@pytest.mark.parametrize("name", ["dora", "lora_bias", "embedding_and_all", "dora_embedding"])
def test_generation_is_pefts(
    name: str, model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    """Of a prefill and single tokens, each its own plan; and once more with a base's row beside."""
    inputs = left_padded(2)

    def tokens(of: Any) -> list[list[int]]:
        out: torch.Tensor = of.generate(**inputs, max_new_tokens=6, do_sample=False)
        listed: list[list[int]] = out.tolist()
        return listed

    base = tokens(theirs)
    with active(theirs, only=folder(name)) as peft_model:
        expected = tokens(peft_model)
    assert expected[0] != base[0]
    assert asyncio.run(answer(model, [folder(name)] * 2, partial(tokens, model))) == expected
    mixed = asyncio.run(answer(model, [folder(name), None], partial(tokens, model)))
    assert mixed == [expected[0], base[1]]


@pytest.mark.parametrize("name", ["padded_dora", "padded_bias", "embedding_and_all"])
def test_padded_ranks_give_pefts_logits(
    name: str, model: Any, theirs: Any, folder: Callable[[str], Path]
) -> None:
    """On a device that pads ranks of 3 to 8, and copies late."""
    inputs = left_padded(2)
    with active(theirs, only=folder(name)):
        expected = logits_of(theirs, inputs)
    asyncio.run(compare_on_simulated(model, folder(name), inputs, expected))


async def compare_on_simulated(
    model: Any, adapter: Path, inputs: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    async with serving(model, device="simulated") as (loader, attached):
        assert isinstance(loader.device, SimulatedDevice)
        loader.device.delay = 0.002
        async with loader.stream(adapter) as handle:
            with attached.batch([handle, None]):
                logits = await asyncio.to_thread(logits_of, model, inputs)
        near(logits[:1], expected[:1])
        assert torch.equal(logits[1:], logits_of_base(model, attached, inputs)[1:])


def logits_of_base(model: Any, attached: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with attached.batch(None):
        return logits_of(model, inputs)


def test_a_tied_adapter_is_two(model: Any, theirs: Any, folder: Callable[[str], Path]) -> None:
    """PEFT writes lm_head's A and B beside the embedding's, and shares their memory when it loads."""
    inputs = left_padded(2)
    names = load_file(folder("tied") / "adapter_model.safetensors")
    assert {name.rpartition(".lora")[0].rpartition(".")[2] for name in names} == {
        "embed_tokens",
        "lm_head",
    }
    with active(theirs, only=folder("tied")):
        expected = logits_of(theirs, inputs)
    near(
        asyncio.run(answer(model, [folder("tied")] * 2, partial(logits_of, model, inputs))),
        expected,
    )


# -- handles -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def late() -> Any:
    """The code of `CudaDevice` on host memory that is written late."""
    yield from loaded()


@pytest.mark.parametrize("kind", ["cpu", "simulated", "late"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("padded_dora", "bfloat16"), ("padded_bias", "float32")]
)
def test_a_handles_vectors_are_the_files(
    kind: str,
    name: str,
    dtype: str,
    model: Any,
    folder: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    """Bit for bit, whatever A and B are stored as; on a device of its own while they still come."""
    if kind == "late":
        request.getfixturevalue("late")
    asyncio.run(compare_vectors(kind, model, folder(name), dtype))


async def compare_vectors(kind: str, model: Any, adapter: Path, dtype: str) -> None:
    layout = layouts.from_module(model)
    settings: dict[str, Any] = {"dtype": dtype, "device_bytes": 1 << 26, "timeout": 60.0}
    device = None
    if kind == "late":
        stored = {"bfloat16": "BF16", "float32": "F32"}[dtype]
        device = CudaDevice(layout, dtype=stored, nbytes=1 << 26, slots=4, device="late")
    else:
        settings["device"] = kind
    async with AsyncExitStack() as held:
        loader = AdapterLoader(layout, LoaderConfig(**settings), device=device)
        await held.enter_async_context(loader)
        handle = await held.enter_async_context(loader.stream(adapter))
        for layer in handle.layers:
            await handle.layer_ready(layer)
            compare_layer(handle, layout, layer, adapter)
        assert handle.vectors is not None


def compare_layer(handle: AdapterHandle, layout: Any, layer: int, adapter: Path) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    for name in [
        m.name for m in layout.modules if m.layer == layer and m.name in set(handle.modules)
    ]:
        weights = handle.modules[name]
        path = f"base_model.model.{name}"
        for vector, end in (
            (weights.bias, "lora_B.bias"),
            (weights.magnitude, "lora_magnitude_vector"),
        ):
            expected = saved.get(f"{path}.{end}")
            assert (vector is None) == (expected is None)
            if vector is not None and expected is not None:
                assert torch.equal(vector.cpu(), expected)
        assert torch.equal(weights.a.cpu(), saved[f"{path}.lora_A.weight"].to(weights.a.dtype))


@pytest.mark.parametrize("name", ["plain", "embedding_and_all"])
def test_a_handle_without_vectors_says_so(
    name: str, model: Any, folder: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with serving(model) as (loader, _), await loader.load(folder(name)) as handle:
            assert handle.vectors is None
            assert {(w.bias, w.magnitude) for w in handle.modules.values()} == {(None, None)}

    asyncio.run(main())


def test_an_embedding_is_as_in_the_file(model: Any, folder: Callable[[str], Path]) -> None:
    saved = load_file(folder("embedding") / "adapter_model.safetensors")

    async def main() -> None:
        async with serving(model) as (loader, _), await loader.load(folder("embedding")) as handle:
            assert (list(handle.modules), handle.layers) == (["model.embed_tokens"], (-1,))
            weights = handle.modules["model.embed_tokens"]
            path = "base_model.model.model.embed_tokens.lora_embedding"
            assert weights.a.shape == (4, 49152)
            assert torch.equal(weights.a, saved[f"{path}_A"])
            assert torch.equal(weights.b, saved[f"{path}_B"])

    asyncio.run(main())
