"""A loaded adapter answers as PEFT's active model does, on the real base, in float32.

One adapter in a batch gives PEFT's bits; in a mixed batch, or with padded ranks, BLAS may sum in
another order. Merging is no oracle where the head is tied to the embedding.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import peft_adapters as variants
import pytest
import torch
from peft_adapters import ATTENTION, EVERY, VARIANTS, Variant, active, logits_of, serving
from safetensors.torch import load_file

from lorax_async.devices.simulated import SimulatedDevice

pytestmark = [pytest.mark.filterwarnings(variants.FEATURE_WARNINGS)]

Answer = TypeVar("Answer")
FolderOf = Callable[[str], Path]
ALL = {
    **VARIANTS,
    "padded_dora": Variant({**EVERY, "r": 3, "use_dora": True}),
    "padded_bias": Variant({**ATTENTION, "r": 3, "lora_bias": True}),
    "tied": Variant({"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}
TRAINED = ("pirate", "shout", "json")
QUICK = ("rank_12", "embedding_and_all")
"""The others take seconds; tiny models have their features in test_features.py."""
GENERATED = ("dora", "lora_bias", "embedding_and_all", "dora_embedding", "json")

SLOW = pytest.mark.slow
NAMES = [n if n in QUICK else pytest.param(n, marks=SLOW) for n in [*VARIANTS, "tied", *TRAINED]]


def left_padded(rows: int, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens; row i begins with i tokens of padding."""
    ids = torch.randint(10, 49_000, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def folder(theirs: Any, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    root = tmp_path_factory.mktemp("variants")

    def of(name: str) -> Path:
        made = examples / name if name in TRAINED else root / name
        return made if made.exists() else variants.build(theirs, ALL[name], made)

    return of


@pytest.fixture(scope="session")
def base(theirs: Any) -> torch.Tensor:
    return logits_of(theirs, left_padded(2))


async def answer(model: Any, folders: list[Path | None], compute: Callable[[], Answer]) -> Answer:
    """What `compute` gives in a thread; row i uses the adapter of `folders[i]`."""
    async with serving(model) as (loader, attached), AsyncExitStack() as held:
        enter = held.enter_async_context
        handles = [await enter(await loader.load(f)) if f else None for f in folders]
        with attached.batch(handles):
            return await asyncio.to_thread(compute)


def near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    # Of about 30; kernels round otherwise for other shapes, on some processors by 0.008. Another
    # adapter would be off by more than 1.
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
async def test_logits_are_pefts(
    name: str, model: Any, theirs: Any, folder: FolderOf, base: torch.Tensor
) -> None:
    inputs = left_padded(2)
    adapted = theirs.model if name == "bare_backbone" else theirs
    with active(adapted, only=folder(name)):
        expected = logits_of(theirs, inputs)
    assert (expected - base).abs().max() > 1  # the adapter does something
    logits = await answer(model, [folder(name)] * 2, partial(logits_of, model, inputs))
    if name != "tied":
        assert torch.equal(logits, expected)
    else:  # PEFT writes lm_head's A and B beside the embedding's, and shares them when it loads
        names = load_file(folder(name) / "adapter_model.safetensors")
        modules = {each.rpartition(".lora")[0].rpartition(".")[2] for each in names}
        assert modules == {"embed_tokens", "lm_head"}
        near(logits, expected)


@pytest.mark.slow
async def test_mixed_rows_are_as_they_are_alone(model: Any, theirs: Any, folder: FolderOf) -> None:
    """Rows of one adapter apart and side by side. PEFT itself mixes no DoRA."""
    names = ["dora", "", "lora_bias", "plain", "embedding_and_all", "dora_embedding"]
    names += ["dora", "dora", "patterns", "f16", "rank_3", "rank_12"]
    inputs = left_padded(len(names))
    base = logits_of(theirs, inputs)
    ours = [folder(name) if name else None for name in names]
    mixed = await answer(model, ours, partial(logits_of, model, inputs))
    assert torch.equal(mixed[1], base[1])
    for name in filter(None, dict.fromkeys(names)):
        rows = [row for row, other in enumerate(names) if other == name]
        with active(theirs, only=folder(name)):
            expected = logits_of(theirs, inputs)
        assert (expected - base).abs().max() > 1
        near(mixed[rows], expected[rows])
        solo = {key: value[rows] for key, value in inputs.items()}
        compute = partial(logits_of, model, solo)
        near(mixed[rows], await answer(model, [folder(name)] * len(rows), compute))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded_dora", "padded_bias", "embedding_and_all"])
async def test_padded_ranks_give_pefts_logits(
    name: str, model: Any, theirs: Any, folder: FolderOf, base: torch.Tensor
) -> None:
    """On a device that pads ranks of 3 to 8, and copies late."""
    inputs = left_padded(2)
    with active(theirs, only=folder(name)):
        expected = logits_of(theirs, inputs)
    async with serving(model, device="simulated") as (loader, attached):
        assert isinstance(loader.device, SimulatedDevice)
        loader.device.delay = 0.002
        async with loader.stream(folder(name)) as handle:
            with attached.batch([handle, None]):
                logits = await asyncio.to_thread(logits_of, model, inputs)
    near(logits[:1], expected[:1])
    assert torch.equal(logits[1:], base[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
async def test_generation_is_pefts(name: str, model: Any, theirs: Any, folder: FolderOf) -> None:
    """Of a prefill and single tokens, each its own plan; and once more with a base's row beside."""

    def tokens(of: Any) -> list[list[int]]:
        out: torch.Tensor = of.generate(**left_padded(2), max_new_tokens=6, do_sample=False)
        listed: list[list[int]] = out.tolist()
        return listed

    base = tokens(theirs)
    with active(theirs, only=folder(name)) as peft_model:
        expected = tokens(peft_model)
    assert expected[0] != base[0]
    assert await answer(model, [folder(name)] * 2, partial(tokens, model)) == expected
    mixed = await answer(model, [folder(name), None], partial(tokens, model))
    assert mixed == [expected[0], base[1]]
