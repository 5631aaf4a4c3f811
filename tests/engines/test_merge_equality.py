"""A merge has the bits that PEFT's `add_weighted_adapter` computes, and answers as they do.

PEFT's "cat" is our "linear"; what it draws at random follows from `torch.manual_seed` alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel

from engines.variants import PEFT_WARNING, llama, logits_of, prompt, save, serving
from lorax_async import AdapterLoader, LoaderConfig, Merge, layouts

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning"),
]

Folders = Callable[[str], Path]

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "lm_head"]},
    "three": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rank_6": {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj", "v_proj"]},
    "unstarted": {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.o_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "more_patterns": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """An adapter of `llama`, other weights in each, by its name in `ADAPTERS`; "-bf16" in bf16."""
    root = tmp_path_factory.mktemp("parts")

    def of(name: str) -> Path:
        made = root / name
        if not made.exists():
            plain, _, cast = name.partition("-")
            dtype = torch.bfloat16 if cast else torch.float32
            save(llama(), ADAPTERS[plain], made, dtype, seed=list(ADAPTERS).index(plain))
        return made

    return of


class Weights(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def theirs(
    folders: Sequence[Path], weights: Sequence[float], kind: str, seed: int = 0, **more: Any
) -> tuple[dict[str, Weights], Any]:
    """By module, what PEFT makes of it; and its model, with that active."""
    names = [f"part{n}" for n in range(len(folders))]
    model: Any = PeftModel.from_pretrained(llama(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    torch.manual_seed(seed)
    model.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, **more)
    model.set_adapter("merged")
    merged = {
        name: Weights(
            module.lora_A["merged"].weight.data,
            module.lora_B["merged"].weight.data,
            module.scaling["merged"],
        )
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }
    return merged, model.eval()


async def ours(merge: Merge, **settings: Any) -> dict[str, Weights]:
    plain: dict[str, Any] = {"dtype": "float32", "io_threads": 2, "timeout": 60.0}
    config = LoaderConfig(**plain | settings)
    async with (
        AdapterLoader(layouts.from_module(llama()), config) as loader,
        await loader.load(merge) as handle,
    ):
        return {
            name: Weights(found.a.clone(), found.b.clone(), found.scale)
            for name, found in handle.modules.items()
        }


def assert_equal(found: Mapping[str, Weights], expected: Mapping[str, Weights]) -> None:
    """To the bit. PEFT gives every module the same rank, and fills it up with zeros."""
    assert found.keys() == expected.keys()
    for name, (a, b, scale) in found.items():
        rank = len(a)
        assert scale == 1
        assert torch.equal(a, expected[name].a[:rank]), name
        assert torch.equal(b, expected[name].b[:, :rank]), name
        assert not expected[name].a[rank:].any()
        assert not expected[name].b[:, rank:].any()


PAIRS = [("one", "two"), ("two", "one"), ("one", "two", "three"), ("patterns", "more_patterns")]


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.1), (1.5, -0.4, 0.0), (-2.0, -1e-3, 1.0)])
@pytest.mark.parametrize("names", [*PAIRS, ("one", "rank_6"), ("patterns", "one", "rank_6")])
def test_linear_is_pefts_cat(
    folder: Folders, names: Sequence[str], weights: Sequence[float]
) -> None:
    folders, weights = [folder(name) for name in names], weights[: len(names)]
    expected, _ = theirs(folders, weights, "cat")
    found = asyncio.run(ours(Merge("linear", folders, weights)))
    assert_equal(found, expected)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.07, 1e-9])
@pytest.mark.parametrize("names", PAIRS)
def test_ties_are_pefts(folder: Folders, names: Sequence[str], density: float, sign: Any) -> None:
    folders, weights = [folder(name) for name in names], (0.8, -0.3, 1.2)[: len(names)]
    expected, _ = theirs(folders, weights, "ties", density=density, majority_sign_method=sign)
    merge = Merge("ties", folders, weights, density=density, majority_sign=sign)
    assert_equal(asyncio.run(ours(merge)), expected)


DRAWN = [("dare_linear", "total"), ("dare_ties", "total"), ("dare_ties", "frequency")]


@pytest.mark.parametrize(("kind", "sign"), DRAWN)
@pytest.mark.parametrize("density", [1.0, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("names", [*PAIRS, ("gaussian", "one"), ("unstarted", "three")])
def test_dare_drops_what_peft_drops(
    folder: Folders, names: Sequence[str], density: float, kind: Any, sign: Any
) -> None:
    folders, weights = [folder(name) for name in names], (0.8, -0.3, 1.2)[: len(names)]
    more = {"density": density, "majority_sign_method": sign}
    expected, _ = theirs(folders, weights, kind, seed=11, **more)
    merge = Merge(kind, folders, weights, density=density, majority_sign=sign, seed=11)
    assert_equal(asyncio.run(ours(merge)), expected)


def test_another_seed_drops_others(folder: Folders) -> None:
    folders = [folder("one"), folder("two")]
    found = [
        asyncio.run(ours(Merge("dare_linear", folders, (1, 1), density=0.5, seed=seed)))
        for seed in (1, 2)
    ]
    assert any(not torch.equal(found[0][name].a, found[1][name].a) for name in found[0])


@pytest.mark.parametrize("kind", ["cat", "ties", "dare_ties"])
def test_of_bf16_files_too(folder: Folders, kind: Any) -> None:
    """PEFT holds them as float32, in which both compute."""
    folders, weights = [folder("one-bf16"), folder("two-bf16")], (0.8, -0.3)
    more: dict[str, Any] = {} if kind == "cat" else {"density": 0.4}
    seed = 3 if kind == "dare_ties" else 0
    expected, _ = theirs(folders, weights, kind, seed=seed, **more)
    strategy: Any = "linear" if kind == "cat" else kind
    merge = Merge(strategy, folders, weights, seed=seed, **more)
    assert_equal(asyncio.run(ours(merge)), expected)
    rounded = {n: Weights(w.a.bfloat16(), w.b.bfloat16(), w.scale) for n, w in expected.items()}
    assert_equal(asyncio.run(ours(merge, dtype="bfloat16")), rounded)


@pytest.mark.parametrize("names", [("rslora", "one"), ("one", "rslora"), ("rslora",), ("rank_6",)])
def test_linear_is_the_weighted_sum_of_the_deltas(folder: Folders, names: Sequence[str]) -> None:
    """In float64; where PEFT is no oracle: an rslora part in front changes its merge's scale."""
    weights = (0.7, -1.3)[: len(names)]
    folders = [folder(name) for name in names]
    expected: dict[str, torch.Tensor] = {}
    for part, weight in zip(folders, weights, strict=True):
        model: Any = PeftModel.from_pretrained(llama(), part, adapter_name="part")
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["part"].weight, module.lora_B["part"].weight
                delta = weight * module.scaling["part"] * (b.double() @ a.double())
                expected[name] = expected.get(name, torch.zeros_like(delta)) + delta.detach()
    found = asyncio.run(ours(Merge("linear", folders, weights)))
    assert found.keys() == expected.keys()
    for name, (a, b, scale) in found.items():
        torch.testing.assert_close(
            scale * (b.double() @ a.double()), expected[name], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("kind", ["cat", "ties", "dare_linear"])
def test_the_model_answers_as_pefts_does(folder: Folders, kind: Any) -> None:
    folders, weights = [folder("one"), folder("two")], (0.9, -0.5)
    more: dict[str, Any] = {} if kind == "cat" else {"density": 0.6}
    strategy: Any = "linear" if kind == "cat" else kind
    seed = 5 if kind == "dare_linear" else 0
    inputs = prompt(2)
    _, peft_model = theirs(folders, weights, kind, seed=seed, **more)
    expected, model = logits_of(peft_model, inputs), llama()
    assert not torch.equal(expected, logits_of(model, inputs))

    async def body() -> torch.Tensor:
        async with (
            serving(model, dtype="float32") as (loader, attached),
            await loader.load(Merge(strategy, folders, weights, seed=seed, **more)) as handle,
        ):
            with attached.batch([handle] * 2):
                return await asyncio.to_thread(logits_of, model, inputs)

    # PEFT multiplies by ranks filled up with zeros, and BLAS may sum those in another order.
    torch.testing.assert_close(asyncio.run(body()), expected, atol=1e-6, rtol=1e-6)


def test_no_global_random_number_is_drawn(folder: Folders) -> None:
    merge = Merge("dare_ties", [folder("one"), folder("two")], (1, 1), density=0.5, seed=1)
    layout = layouts.from_module(llama())

    async def body() -> None:
        async with AdapterLoader(layout, LoaderConfig(dtype="float32")) as loader:
            (await loader.load(merge)).release()

    before = torch.get_rng_state()
    asyncio.run(body())
    assert torch.equal(torch.get_rng_state(), before)
