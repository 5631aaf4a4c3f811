"""LoRAX's names for merging; that the numbers are PEFT's is in test_merge_equality.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lorax_async.adapters.base import ModuleMap
from lorax_async.adapters.lora import LoraConfig
from lorax_async.adapters.lorax_merging import (
    AdapterParameters,
    merge_adapters,
    merge_adapters_async,
)
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UsageError
from lorax_async.types import Merge

Q, K = "layers.0.q", "layers.0.k"
Adapters = list[tuple[ModuleMap, LoraConfig]]


def config_of(r: int = 2, lora_alpha: float = 4, use_rslora: bool = False) -> LoraConfig:
    return LoraConfig("base", r, None, False, lora_alpha, use_rslora)


def module_map(a: torch.Tensor, b: torch.Tensor, *modules: str) -> ModuleMap:
    return {
        name: {
            "lora_A": (a, f"base_model.model.{name}.lora_A.weight"),
            "lora_B": (b, f"base_model.model.{name}.lora_B.weight"),
        }
        for name in modules
    }


def made(seed: int, *modules: str, rank: int = 2, features: int = 6) -> ModuleMap:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, features, generator=random), torch.randn(5, rank, generator=random)
    return module_map(a, b, *modules)


def parameters(count: int = 2, weights: Sequence[float] = (), **more: object) -> AdapterParameters:
    return AdapterParameters(adapter_ids=["a", "b"][:count], weights=weights, **more)  # type: ignore[arg-type]


def factors(merged: ModuleMap, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (merged[module][part][0] for part in ("lora_A", "lora_B"))
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return a, b


def delta(merged: ModuleMap, module: str, scale: float = 1.0) -> torch.Tensor:
    a, b = factors(merged, module)
    return scale * b.double() @ a.double()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


async def test_linear_adds_up_deltas_of_several_ranks_and_scales() -> None:
    """Other weights, and modules that one lacks, are compared in test_merge_equality.py."""
    adapters: Adapters = [
        (made(1, Q, K), config_of()),
        (made(2, Q, rank=3), config_of(r=3, lora_alpha=6, use_rslora=True)),
    ]
    first, second = delta(adapters[0][0], Q, 2.0), delta(adapters[1][0], Q, 6 / 3**0.5)
    merged, config = merge_adapters(adapters, parameters())
    close(delta(merged, Q), first + second)
    assert (config.r, config.scale_of(Q), config.use_rslora) == (5, 1.0, False)
    assert config.target_modules == [Q, K]
    a, _ = factors(merged, K)
    assert (a.shape, merged[K]["lora_A"][1]) == ((5, 6), f"base_model.model.{K}.lora_A.weight")
    assert not a[2:].any()
    awaited, _ = await merge_adapters_async(adapters, parameters())
    assert torch.equal(delta(awaited, Q), delta(merged, Q))
    # A small weight brings a large scale within float32.
    large: Adapters = [(adapters[0][0], config_of(lora_alpha=2.0**121))]
    merged, config = merge_adapters(large, parameters(1, [2.0**-120]))
    close(delta(merged, Q, config.lora_alpha / config.r), first / 2)


LINEAR: dict[str, object] = {}
TIES: dict[str, object] = {"merge_strategy": "ties", "density": 0.5}


def test_shapes_that_do_not_fit() -> None:
    ones = module_map(torch.ones(2, 6), torch.ones(5, 3), Q)
    sixes = r"lora_A of the shapes \[2, 6\] and"
    for more, other, problem in (
        (TIES, made(2, Q, rank=3), rf"'{Q}': 'ties' cannot merge {sixes} \[3, 6\]"),
        (LINEAR, made(2, Q, features=7), rf"{sixes} \[2, 7\]"),
        (LINEAR, made(2, Q, features=1), rf"{sixes} \[2, 1\]"),
        *((more, ones, r"and B \[5, 3\] are no pair") for more in (LINEAR, TIES)),
    ):
        adapters = [(ones if other is ones else made(1, Q), config_of()), (other, config_of())]
        with pytest.raises(IncompatibleAdapterError, match=problem):
            merge_adapters(adapters, parameters(**more))  # type: ignore[arg-type]


def test_there_is_no_density_of_zero_and_as_many_adapters_as_ids() -> None:
    pair: Adapters = [(made(1, Q), config_of()), (made(2, Q), config_of())]
    for density in (None, 0.0):
        with pytest.raises(UsageError, match="'ties' needs a density"):
            merge_adapters(pair, parameters(merge_strategy="ties", density=density))
    with pytest.raises(UsageError, match="2 adapter_ids, but 1 adapters"):
        merge_adapters(pair[:1], parameters())


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_scales_that_float32_does_not_hold(strategy: str) -> None:
    density, plain = None if strategy == "linear" else 0.5, (made(1, Q, K), config_of())
    for alpha, weight in ((1e39, 1.0), (-1e39, 1.0), (1e39, 0.0), (1e308, 3e38), (2e38, 4.0)):
        given = parameters(weights=[1.0, weight], merge_strategy=strategy, density=density)
        with pytest.raises(AdapterFormatError, match=f"'{K}' would be scaled by"):
            merge_adapters([plain, (made(2, K), config_of(lora_alpha=alpha))], given)


def test_a_request_is_an_id_for_a_loader() -> None:
    given = AdapterParameters(
        adapter_ids=["a", "b"],
        weights=[1, 2],
        merge_strategy="DARE_TIES",
        density=0.5,
        majority_sign_method="FREQUENCY",
    )
    assert given.merge == Merge("dare_ties", ["a", "b"], [1, 2], 0.5, "frequency")
