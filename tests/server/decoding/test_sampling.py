"""Which tokens are chosen, held against transformers' own warpers; whose random numbers."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lorax_async import UsageError
from lorax_async.server.decoding.sampling import Sampler, choose
from lorax_async.server.generation import Sampling


def logits_of(seed: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def chances(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Of each token, by transformers."""
    ids: Any = None  # they do not look at it
    scores = TemperatureLogitsWarper(temperature)(ids, logits[None])
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_tokens_come_as_often_as_transformers_says(temperature: float, top_p: float) -> None:
    logits, draws = logits_of(1, 40), 4000
    sampler = Sampler(Sampling(temperature, top_p, seed=5))
    found = torch.bincount(
        torch.tensor([sampler.choose(logits) for _ in range(draws)]), minlength=40
    )
    likely = chances(logits, temperature, top_p)
    deviation = (draws * likely * (1 - likely)).sqrt()
    assert ((found - draws * likely).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_nucleus_of_any_size_is_transformers_own(spread: float) -> None:
    """Of few tokens, of thousands, and of nearly all: only these ever come."""
    logits = logits_of(2, 20_000, spread)
    for top_p in (0.1, 0.7, 0.99):
        sampler = Sampler(Sampling(1.0, top_p, seed=1))
        allowed = chances(logits, 1.0, top_p) > 0
        assert allowed[[sampler.choose(logits) for _ in range(50)]].all()


def test_no_temperature_takes_the_likeliest() -> None:
    logits = torch.stack([logits_of(3, 50), logits_of(4, 50)])
    samplers = [Sampler(Sampling(temperature=0, top_p=p)) for p in (0.5, 1.0)]
    assert choose(logits, samplers) == logits.argmax(dim=-1).tolist()


def test_a_tiny_temperature_is_nearly_none() -> None:
    logits = logits_of(3, 50)
    assert Sampler(Sampling(temperature=1e-300, seed=1)).choose(logits) == int(logits.argmax())


def test_logits_that_are_no_numbers_choose_nothing() -> None:
    logits = torch.stack([logits_of(seed, 50) for seed in range(4)])
    logits[1, 7], logits[2, 8], logits[3, 9] = nan, inf, -inf
    samplers = [Sampler(Sampling(temperature=t)) for t in (0, 0, 1, 0)]
    assert choose(logits, samplers) == [
        int(logits[0].argmax()),
        None,
        None,
        int(logits[3].argmax()),
    ]


def test_a_seed_says_which_tokens_whoever_is_beside_it() -> None:
    logits = torch.stack([logits_of(seed, 50) for seed in range(3)])

    def alone(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(logits[1]) for _ in range(20)]

    samplers = [Sampler(Sampling()), Sampler(Sampling(seed=7)), Sampler(Sampling(top_p=0.5))]
    beside = [choose(logits, samplers)[1] for _ in range(20)]
    assert beside == alone(7) != alone(8)


def test_the_processs_own_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    for seed in (None, 1):
        Sampler(Sampling(seed=seed)).choose(logits_of(1, 50))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "given",
    [
        *({"temperature": t} for t in (-0.1, nan, inf, "1", True, None, 10**400)),
        *({"top_p": p} for p in (0, -1, 1.01, nan, "1", None)),
        *({"seed": s} for s in (1.5, True, 1 << 63, -(1 << 63) - 1, "1")),
    ],
    ids=repr,
)
def test_what_is_out_of_range_is_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(UsageError, match=name):
        Sampler(Sampling(**given))


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) - 1, -(1 << 63)])
def test_every_seed_of_64_bits_will_do(seed: int) -> None:
    first, second = (Sampler(Sampling(seed=seed)).choose(logits_of(1, 50)) for _ in range(2))
    assert first == second
