"""A merge, under LoRAX's names too, has the bits of PEFT's `add_weighted_adapter`; its "cat" is "linear"."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from peft import PeftModel
from peft_adapters import llama, save
from safetensors.torch import load_file
from torch import nn

from lorax_async import adapters as lorax
from lorax_async import layouts
from lorax_async.adapters import (
    AdapterParameters,
    LoraConfig,
    Recipe,
    merge_adapters,
    merge_folders,
)
from lorax_async.adapters.weights_file import ModuleMap
from lorax_async.config import LoaderConfig
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UsageError
from lorax_async.loader import AdapterLoader

pytestmark = [pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")]

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
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.o_proj": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "more_patterns": {
        "r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
    },
}  # fmt: skip


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


Merge = tuple[Sequence[Path], Recipe]


def theirs(folders: Sequence[Path], merge: Recipe) -> dict[str, Weights]:
    names = [f"part{n}" for n in range(len(folders))]
    model: Any = PeftModel.from_pretrained(llama(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    torch.manual_seed(merge.seed)
    kind = "cat" if merge.strategy == "linear" else merge.strategy
    more: dict[str, Any] = {"density": merge.density, "majority_sign_method": merge.majority_sign}
    more = {"combination_type": kind} | ({} if kind == "cat" else more)
    model.add_weighted_adapter(names, list(merge.weights), "merged", **more)
    merged = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "merged" in module.lora_A:
            a, b = (each["merged"].weight.data for each in (module.lora_A, module.lora_B))
            merged[name] = Weights(a, b, module.scaling["merged"])
    return merged


async def ours(
    folders: Sequence[Path], recipe: Recipe, dtype: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, Weights]:
    """As a server has it: in a thread, then resident under a name."""
    loader = AdapterLoader(layouts.from_module(llama()), LoaderConfig(dtype=dtype, io_threads=2))
    merged = await asyncio.to_thread(merge_folders, folders, recipe, loader.layout)
    async with loader, await loader.load_tensors("merged", *merged) as handle:
        found = handle.modules.items()
        return {name: Weights(w.a.clone(), w.b.clone(), w.scale) for name, w in found}


def assert_equal(found: Mapping[str, Weights], expected: Mapping[str, Weights]) -> None:
    """To the bit. One rank for every module may be filled up with zeros, as PEFT does it."""
    assert found.keys() == expected.keys()
    for name, (a, b, scale) in found.items():
        rank = min(len(a), len(expected[name].a))
        assert scale == 1
        assert torch.equal(a[:rank], expected[name].a[:rank]), name
        assert torch.equal(b[:, :rank], expected[name].b[:, :rank]), name
        assert not a[rank:].any()
        assert not expected[name].a[rank:].any()
        assert not expected[name].b[:, rank:].any()


PAIRS = [("one", "two"), ("two", "one"), ("one", "two", "three"), ("patterns", "more_patterns")]
WEIGHTS = [(0.7, 0.3, 1.1), (1.5, -0.4, 0.0), (-2.0, -1e-3, 1.0)]
DRAWN = [("dare_linear", "total"), ("dare_ties", "total"), ("dare_ties", "frequency")]


@dataclass(frozen=True)
class Case:
    strategy: Any
    names: tuple[str, ...]
    weights: tuple[float, ...] = (0.8, -0.3, 1.2)
    density: float | None = None
    sign: Any = "total"

    def merge(self, folder: Folders) -> Merge:
        folders = [folder(name) for name in self.names]
        seed = 11 if self.strategy.startswith("dare") else 0
        weights = self.weights[: len(folders)]
        return folders, Recipe(self.strategy, weights, self.density, self.sign, seed=seed)


RANKED = (("one", "rank_6"), ("patterns", "one", "rank_6"))
DENSITIES, SIGNS = (1.0, 0.5, 0.07, 1e-9), ("total", "frequency")
DROPPING = (*PAIRS, ("gaussian", "one"), ("unstarted", "three"), ("one", "three"))
ROUNDED: Any = (("linear", None), ("ties", 0.4), ("dare_ties", 0.4))
DRAWS = product(DROPPING, (1.0, 0.9, 0.3, 1e-9), DRAWN)

CASES = [Case("linear", *each) for each in product((*PAIRS, *RANKED), WEIGHTS)]
CASES += [Case("ties", n, density=d, sign=s) for n, d, s in product(PAIRS, DENSITIES, SIGNS)]
CASES += [Case(how, n, density=d, sign=s) for n, d, (how, s) in DRAWS]
CASES += [Case(how, ("one-bf16", "two-bf16"), density=d) for how, d in ROUNDED]
QUICK = {("one", "two"), ("patterns", "more_patterns"), ("one", "three"), ("one", "rank_6")}


def _is_quick(case: Case) -> bool:
    usual = case.density in {None, 0.3, 0.5} and case.weights not in WEIGHTS[1:]
    return (usual and case.names in QUICK) or case.density == 0.4


MARKED = [c if _is_quick(c) else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", MARKED, ids=str)
async def test_a_merge_is_pefts(folder: Folders, case: Case) -> None:
    """PEFT holds bf16 files as float32, in which both compute."""
    merge = case.merge(folder)
    expected = theirs(*merge)
    assert_equal(await ours(*merge), expected)
    if "one-bf16" in case.names:
        rounded = {n: Weights(w.a.bfloat16(), w.b.bfloat16(), w.scale) for n, w in expected.items()}
        assert_equal(await ours(*merge, dtype="bfloat16"), rounded)
    # What DARE drops of module maps is PEFT's where the first has all modules, in their order.
    if case.strategy in {"linear", "ties"} or case.names == ("one", "three"):
        assert_equal(in_loraxs_form(*merge), expected)


def in_loraxs_form(folders: Sequence[Path], merge: Recipe) -> dict[str, Weights]:
    adapters = []
    for part in folders:
        file = part / "adapter_model.safetensors"
        paths = dict.fromkeys(load_file(file), file)
        config = lorax.LoraConfig.load(part)
        names = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear)]
        adapters.append((config.map_weights_for_model(paths, names)[0], config))
    strategy, sign = merge.strategy.upper(), merge.majority_sign.upper()
    more: Any = {"merge_strategy": strategy, "majority_sign_method": sign, "seed": merge.seed}
    more |= {"weights": merge.weights, "density": merge.density}
    given = lorax.AdapterParameters(adapter_ids=folders, **more)
    merged, config = lorax.merge_adapters(adapters, given)
    found = {}
    for name in merged:
        a, b = (factor(merged, name, part) for part in ("lora_A", "lora_B"))
        assert a.shape[0] == b.shape[1] == config.r
        found[name] = Weights(a, b, config.scale_of(name))
    return found


async def test_a_seed_decides_what_drops_and_no_global_number_is_drawn(folder: Folders) -> None:
    folders, _ = [folder("one"), folder("two")], llama()  # which seeds it
    before = torch.get_rng_state()
    recipes = [Recipe("dare_linear", (1, 1), density=0.5, seed=seed) for seed in (1, 2)]
    first, second = [await ours(folders, recipe) for recipe in recipes]
    assert any(not torch.equal(first[name].a, second[name].a) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("names", [("rslora", "one"), ("one", "rslora"), ("rslora",), ("rank_6",)])
async def test_linear_is_a_weighted_sum_of_deltas(folder: Folders, names: tuple[str, ...]) -> None:
    """In float64; where PEFT is no oracle: an rslora part in front changes its merge's scale."""
    folders, recipe = Case("linear", names, (0.7, -1.3)).merge(folder)
    expected: dict[str, torch.Tensor] = {}
    for part, weight in zip(folders, recipe.weights, strict=True):
        model: Any = PeftModel.from_pretrained(llama(), part, adapter_name="part")
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["part"].weight, module.lora_B["part"].weight
                delta = weight * module.scaling["part"] * (b.double() @ a.double())
                expected[name] = expected.get(name, torch.zeros_like(delta)) + delta.detach()
    for found in (await ours(folders, recipe), in_loraxs_form(folders, recipe)):
        assert found.keys() == expected.keys()
        for name, (a, b, scale) in found.items():
            delta = scale * (b.double() @ a.double())
            torch.testing.assert_close(delta, expected[name], atol=1e-6, rtol=1e-6)


Q, K = "layers.0.q", "layers.0.k"
Adapters = list[tuple[ModuleMap, LoraConfig]]
Config: Any = type("Config", (LoraConfig,), {})  # an engine's own, which a merge keeps


def config_of(r: int = 2, lora_alpha: float = 4, use_rslora: bool = False) -> LoraConfig:
    return LoraConfig("base", r, None, False, lora_alpha, use_rslora)


def module_map(a: torch.Tensor, b: torch.Tensor, *modules: str) -> ModuleMap:
    parts = (("lora_A", a), ("lora_B", b))
    key = "base_model.model.{}.{}.weight"
    return {name: {part: (t, key.format(name, part)) for part, t in parts} for name in modules}


def made_map(seed: int, *modules: str, rank: int = 2, features: int = 6) -> ModuleMap:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, features, generator=random), torch.randn(5, rank, generator=random)
    return module_map(a, b, *modules)


def parameters(count: int = 2, weights: Sequence[float] = (), **more: object) -> AdapterParameters:
    return AdapterParameters(adapter_ids=["a", "b"][:count], weights=weights, **more)  # type: ignore[arg-type]


def factor(merged: ModuleMap, module: str, part: str) -> torch.Tensor:
    found = merged[module][part][0]
    assert isinstance(found, torch.Tensor)
    return found


async def test_linear_says_what_it_made_and_keeps_within_float32() -> None:
    other = config_of(r=3, lora_alpha=6, use_rslora=True)
    own = Config("base", 2, None, False, 4, True, padded_rank=8)
    adapters: Adapters = [(made_map(1, Q, K), own), (made_map(2, Q, rank=3), other)]
    merged, config = merge_adapters(adapters, parameters())
    assert (config.r, config.scale_of(Q), config.use_rslora) == (5, 1.0, False)
    assert (type(config), config.padded_rank) == (Config, None)
    assert config.target_modules == [Q, K]
    a = factor(merged, K, "lora_A")
    assert (a.shape, merged[K]["lora_A"][1]) == ((5, 6), f"base_model.model.{K}.lora_A.weight")
    assert not a[2:].any()
    awaited, _ = await lorax.merge_adapters_async(adapters, parameters())
    assert all(factor(awaited, Q, n).equal(factor(merged, Q, n)) for n in ("lora_A", "lora_B"))
    # A small weight brings a large scale within float32.
    large: Adapters = [(adapters[0][0], config_of(lora_alpha=2.0**121))]
    merged, config = merge_adapters(large, parameters(1, [2.0**-120]))
    first, last = (factor(m, Q, "lora_B") @ factor(m, Q, "lora_A") for m in (large[0][0], merged))
    torch.testing.assert_close(config.lora_alpha / config.r * last, first, atol=1e-5, rtol=1e-5)


LINEAR: dict[str, object] = {}
TIES: dict[str, object] = {"merge_strategy": "ties", "density": 0.5}


def test_shapes_that_do_not_fit() -> None:
    ones = module_map(torch.ones(2, 6), torch.ones(5, 3), Q)
    sixes = r"lora_A of the shapes \[2, 6\] and"
    for more, rank, other, problem in (
        (TIES, 3, made_map(2, Q, rank=3), rf"'{Q}': 'ties' cannot merge {sixes} \[3, 6\]"),
        (LINEAR, 2, made_map(2, Q, features=7), rf"{sixes} \[2, 7\]"),
        (LINEAR, 2, made_map(2, Q, features=1), rf"{sixes} \[2, 1\]"),
        *((more, 2, ones, r"and B \[5, 3\] are not a pair of rank 2") for more in (LINEAR, TIES)),
        (LINEAR, 2, made_map(2, Q, rank=3), r"A \[3, 6\] and B \[5, 3\] are not a pair of rank 2"),
    ):
        adapters = [(made_map(1, Q), config_of()), (other, config_of(rank))]
        kind = AdapterFormatError if "pair" in problem else IncompatibleAdapterError
        with pytest.raises(kind, match=problem):
            merge_adapters(adapters, parameters(**more))  # type: ignore[arg-type]


def test_there_is_no_density_of_zero_and_as_many_adapters_as_ids() -> None:
    pair: Adapters = [(made_map(1, Q), config_of()), (made_map(2, Q), config_of())]
    for density in (None, 0.0):
        with pytest.raises(UsageError, match="'ties' needs a density"):
            merge_adapters(pair, parameters(merge_strategy="ties", density=density))
    with pytest.raises(UsageError, match="2 adapter_ids, but 1 adapters"):
        merge_adapters(pair[:1], parameters())
    assert merge_adapters([({}, config_of(3)), ({}, config_of())], parameters())[1].r == 3


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_scales_that_float32_does_not_hold(strategy: str) -> None:
    density, plain = None if strategy == "linear" else 0.5, (made_map(1, Q, K), config_of())
    for alpha, weight in ((1e39, 1.0), (-1e39, 1.0), (1e39, 0.0), (1e308, 3e38), (2e38, 4.0)):
        given = parameters(weights=[1.0, weight], merge_strategy=strategy, density=density)
        with pytest.raises(AdapterFormatError, match=f"'{K}' would be scaled by"):
            merge_adapters([plain, (made_map(2, K), config_of(lora_alpha=alpha))], given)


def test_a_request_is_a_recipe() -> None:
    more: Any = {"merge_strategy": "DARE_TIES", "majority_sign_method": "FREQUENCY"}
    given = AdapterParameters(adapter_ids=["a", "b"], weights=[1, 2], density=0.5, **more)
    assert given.recipe == Recipe("dare_ties", [1, 2], 0.5, "frequency")
