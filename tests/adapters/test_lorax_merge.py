"""LoRAX's names for merging, with PEFT's numbers: no cross terms, no squared weights, a true DARE."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorax_async.adapters import LoraConfig
from lorax_async.adapters.base import ModuleMap
from lorax_async.adapters.merging.merge import (
    AdapterParameters,
    merge_adapters,
    merge_adapters_async,
)
from lorax_async.adapters.merging.merge_strategies import (
    DareLinearMerge,
    DareTiesMerge,
    LinearMerge,
    MergeStrategy,
    TiesMerge,
    strategy_registry,
)
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UsageError
from lorax_async.merge import Merge

Q, K = "layers.0.q", "layers.0.k"


def config_of(r: int = 2, lora_alpha: float = 4, use_rslora: bool = False) -> LoraConfig:
    return LoraConfig("base", r, None, False, lora_alpha, use_rslora)


def made(seed: int, *modules: str, rank: int = 2) -> ModuleMap:
    random = torch.Generator().manual_seed(seed)
    return {
        name: {
            "lora_A": (
                torch.randn(rank, 6, generator=random),
                f"base_model.model.{name}.lora_A.weight",
            ),
            "lora_B": (
                torch.randn(5, rank, generator=random),
                f"base_model.model.{name}.lora_B.weight",
            ),
        }
        for name in modules
    }


def delta(module_map: ModuleMap, module: str, scale: float) -> torch.Tensor:
    a, b = (module_map[module][part][0] for part in ("lora_A", "lora_B"))
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return scale * b.double() @ a.double()


def test_linear_is_the_weighted_sum_of_the_deltas() -> None:
    """LoRAX's would be (w₁A₁ + w₂A₂)(w₁B₁ + w₂B₂), by the first one's scale, of equal ranks only."""
    adapters = [
        (made(1, Q, K), config_of()),
        (made(2, Q, rank=3), config_of(r=3, lora_alpha=6, use_rslora=True)),
    ]
    given = AdapterParameters(adapter_ids=["a", "b"], weights=[0.5, -2])
    merged, config = merge_adapters(adapters, given)
    assert (config.r, config.scale_of(Q), config.use_rslora) == (5, 1.0, False)
    assert config.target_modules == [Q, K]
    expected = 0.5 * delta(adapters[0][0], Q, 2.0) - 2 * delta(adapters[1][0], Q, 6 / sqrt(3))
    torch.testing.assert_close(delta(merged, Q, 1.0), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        delta(merged, K, 1.0), 0.5 * delta(adapters[0][0], K, 2.0), atol=1e-5, rtol=1e-5
    )
    a, name = merged[K]["lora_A"]
    assert isinstance(a, torch.Tensor)
    assert (a.shape, name) == ((5, 6), f"base_model.model.{K}.lora_A.weight")
    assert not a[2:].any()


def test_a_weight_counts_once() -> None:
    """Of one adapter four times as strong; the squares that LoRAX makes of it would be 16."""
    alone = [(made(1, Q), config_of())]
    merged, _ = merge_adapters(alone, AdapterParameters(adapter_ids=["a"], weights=[4]))
    torch.testing.assert_close(
        delta(merged, Q, 1), 4 * delta(alone[0][0], Q, 2), atol=1e-5, rtol=1e-5
    )


def test_weights_left_out_are_one() -> None:
    adapters = [(made(1, Q), config_of()), (made(2, Q), config_of())]
    merged, _ = merge_adapters(adapters, AdapterParameters(adapter_ids=["a", "b"]))
    expected = delta(adapters[0][0], Q, 2) + delta(adapters[1][0], Q, 2)
    torch.testing.assert_close(delta(merged, Q, 1), expected, atol=1e-5, rtol=1e-5)


def test_ties_by_hand() -> None:
    """One row of A, of scale 1: the larger half stays, the sign of the sum wins, the mean counts."""
    rows = [[4.0, -3.0, 1.0, 0.5], [-1.0, -5.0, 2.0, 0.1]]
    adapters: list[tuple[ModuleMap, LoraConfig]] = [
        (
            {Q: {"lora_A": (torch.tensor([row]), "a"), "lora_B": (torch.ones(1, 1), "b")}},
            config_of(r=1, lora_alpha=1),
        )
        for row in rows
    ]
    given = AdapterParameters(
        adapter_ids=["a", "b"], weights=[4, 1], merge_strategy="TIES", density=0.5
    )
    merged, _ = merge_adapters(adapters, given)
    a = merged[Q]["lora_A"][0]
    assert isinstance(a, torch.Tensor)
    # Weights go into A by their roots, 2 and 1: [4·2, (−3·2 − 5·1) / 2, 2·1, –]
    assert a.tolist() == [[8.0, -5.5, 2.0, 0.0]]


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_makes_up_for_what_it_drops(kind: str) -> None:
    """LoRAX divides by the density, and throws the quotient away."""
    ones: ModuleMap = {
        Q: {"lora_A": (torch.ones(2, 5000), "a"), "lora_B": (torch.ones(5000, 2), "b")}
    }
    adapters = [(ones, config_of(lora_alpha=2)), (ones, config_of(lora_alpha=2))]
    given = AdapterParameters(
        adapter_ids=["a", "b"], weights=[1, 0], merge_strategy=kind, density=0.25, seed=3
    )
    merged, _ = merge_adapters(adapters, given)
    again, _ = merge_adapters(adapters, given)
    for part in ("lora_A", "lora_B"):
        tensor, repeated = merged[Q][part][0], again[Q][part][0]
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(repeated, torch.Tensor)
        assert torch.equal(tensor, repeated)
        if kind == "dare_linear":
            assert set(tensor.flatten().tolist()) == {0.0, 4.0}
            assert abs(tensor.mean() - 1) < 0.05


def filed(module_map: ModuleMap, path: Path) -> ModuleMap:
    """As a server of LoRAX's has it that reads nothing yet: with the file's path for each tensor."""
    tensors = {}
    for factors in module_map.values():
        for content, key in factors.values():
            assert isinstance(content, torch.Tensor)
            tensors[key] = content
    save_file(tensors, path)
    return {
        name: {factor: (path, key) for factor, (_, key) in factors.items()}
        for name, factors in module_map.items()
    }


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear"])
async def test_files_give_what_tensors_give_and_the_loop_goes_on(tmp_path: Path, kind: str) -> None:
    plain = [(made(1, Q), config_of()), (made(2, Q), config_of())]
    in_files = [(filed(m, tmp_path / f"{n}.safetensors"), c) for n, (m, c) in enumerate(plain)]
    density = None if kind == "linear" else 0.5
    given = AdapterParameters(adapter_ids=["a", "b"], merge_strategy=kind, density=density)
    expected, _ = merge_adapters(plain, given)
    merged, _ = await merge_adapters_async(in_files, given)
    for part in ("lora_A", "lora_B"):
        found, other = merged[Q][part][0], expected[Q][part][0]
        assert isinstance(found, torch.Tensor)
        assert isinstance(other, torch.Tensor)
        assert torch.equal(found, other)


@pytest.mark.parametrize(
    ("kind", "ranks", "width", "problem"),
    [
        (
            "ties",
            (2, 3),
            6,
            r"module 'layers.0.q': 'ties' cannot merge lora_A of the shapes \[2, 6\] and \[3, 6\]",
        ),
        ("linear", (2, 2), 7, r"'linear' cannot merge lora_A of the shapes \[2, 6\] and \[2, 7\]"),
        ("linear", (2, 2), 1, r"of the shapes \[2, 6\] and \[2, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(
    kind: str, ranks: tuple[int, int], width: int, problem: str
) -> None:
    other = {name: dict(factors) for name, factors in made(2, Q, rank=ranks[1]).items()}
    other[Q]["lora_A"] = (torch.ones(ranks[1], width), "a")
    density = None if kind == "linear" else 0.5
    given = AdapterParameters(adapter_ids=["a", "b"], merge_strategy=kind, density=density)
    with pytest.raises(IncompatibleAdapterError, match=problem):
        merge_adapters([(made(1, Q), config_of()), (other, config_of())], given)


@pytest.mark.parametrize(("kind", "density"), [("linear", None), ("ties", 0.5)])
def test_a_and_b_of_other_ranks_are_no_pair(kind: str, density: float | None) -> None:
    other = {Q: {**made(2, Q)[Q], "lora_B": (torch.ones(5, 3), "b")}}
    maps = [(other, config_of()), (other, config_of())]
    given = AdapterParameters(adapter_ids=["a", "b"], merge_strategy=kind, density=density)
    with pytest.raises(IncompatibleAdapterError, match=r"A \[2, 6\] and B \[5, 3\] are no pair"):
        merge_adapters(maps, given)


def test_there_is_no_density_of_zero() -> None:
    pair = [(made(1, Q), config_of()), (made(2, Q), config_of())]
    for density in (None, 0.0):
        given = AdapterParameters(adapter_ids=["a", "b"], merge_strategy="ties", density=density)
        with pytest.raises(UsageError, match="'ties' needs a density"):
            merge_adapters(pair, given)
    for strategy in (TiesMerge(0.0), DareLinearMerge(1.5, torch.Generator())):
        with pytest.raises(UsageError, match="a density is above 0"):
            strategy.merge([torch.ones(2)], torch.ones(1))


def test_as_many_adapters_as_ids() -> None:
    with pytest.raises(UsageError, match="2 adapter_ids, but 1 adapters"):
        merge_adapters([(made(1, Q), config_of())], AdapterParameters(adapter_ids=["a", "b"]))


def test_a_request_is_an_id_for_a_loader() -> None:
    given = AdapterParameters(
        adapter_ids=["a", "b"],
        weights=[1, 2],
        merge_strategy="DARE_TIES",
        density=0.5,
        majority_sign_method="FREQUENCY",
    )
    assert given.merge == Merge("dare_ties", ["a", "b"], [1, 2], 0.5, "frequency")


def test_strategies_by_their_names() -> None:
    kinds = [LinearMerge, TiesMerge, DareLinearMerge, DareTiesMerge]
    assert list(strategy_registry.values()) == kinds
    assert list(strategy_registry) == ["linear", "ties", "dare_linear", "dare_ties"]


def test_strategies_on_whole_deltas() -> None:
    pair, weights = (
        [torch.tensor([4.0, -1.0]), torch.tensor([-1.0, -3.0])],
        torch.tensor([2.0, 1.0]),
    )
    drawn = torch.Generator().manual_seed(1)
    cases: list[tuple[MergeStrategy, list[float]]] = [
        (LinearMerge(), [7.0, -5.0]),
        (TiesMerge(1.0), [8.0, -2.5]),
        (TiesMerge(1.0, "frequency"), [8.0, -2.5]),
        (DareLinearMerge(1.0, drawn), [7.0, -5.0]),
        (DareTiesMerge(1.0, drawn), [8.0, -2.5]),
    ]
    for strategy, expected in cases:
        assert strategy.merge(pair, weights).tolist() == expected


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize(
    ("alpha", "weight"), [(1e39, 1.0), (-1e39, 1.0), (1e39, 0.0), (1e308, 3e38), (2e38, 4.0)]
)
def test_scales_and_weights_that_float32_does_not_hold(
    strategy: str, alpha: float, weight: float
) -> None:
    params = AdapterParameters(
        adapter_ids=["a/b", "c/d"],
        weights=[1.0, weight],
        merge_strategy=strategy,
        density=None if strategy == "linear" else 0.5,
    )
    adapters = [(made(1, Q, K), config_of()), (made(2, K), config_of(lora_alpha=alpha))]
    with pytest.raises(AdapterFormatError, match=f"'{K}' would be scaled by"):
        merge_adapters(adapters, params)


def test_a_small_weight_brings_a_large_scale_within_float32() -> None:
    params = AdapterParameters(adapter_ids=["a/b"], weights=[2.0**-120])
    part = made(1, Q)
    merged, config = merge_adapters([(part, config_of(lora_alpha=2.0**121))], params)
    torch.testing.assert_close(delta(merged, Q, config.lora_alpha / config.r), delta(part, Q, 1.0))
