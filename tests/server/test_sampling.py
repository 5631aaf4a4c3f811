"""Which tokens are chosen, held against transformers' own warpers; where keys and values are."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lorax_async import UsageError
from lorax_async.server.decoding.kept_keys import BLOCK, KeptKeys, KeptLayer
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
    """And a tiny one nearly does."""
    logits = torch.stack([logits_of(3, 50), logits_of(4, 50)])
    samplers = [Sampler(Sampling(temperature=0, top_p=p)) for p in (0.5, 1.0)]
    assert choose(logits, samplers) == logits.argmax(dim=-1).tolist()
    tiny = Sampler(Sampling(temperature=1e-300, seed=1))
    assert tiny.choose(logits[0]) == int(logits[0].argmax())


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


@pytest.mark.parametrize("seed", [0, 7, -1, (1 << 63) - 1, -(1 << 63)])
def test_a_seed_says_which_tokens_come_whatever_is_beside_it(seed: int) -> None:
    """The process's own random numbers are left alone."""
    logits, before = torch.stack([logits_of(n, 50) for n in range(3)]), torch.get_rng_state()

    def alone(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(logits[1]) for _ in range(20)]

    samplers = [Sampler(Sampling()), Sampler(Sampling(seed=seed)), Sampler(Sampling(top_p=0.5))]
    beside = [choose(logits, samplers)[1] for _ in range(20)]
    assert beside == alone(seed) != alone(8)
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


# -- keys and values ------------------------------------------------------------------------------

HEADS, DIM = 2, 3


def filled(kept: KeptKeys, sequences: list[int], starts: list[int], tokens: int) -> torch.Tensor:
    """What the one layer gives for keys that are the sequence's number."""
    kept.begin(sequences, starts, tokens)
    new = torch.tensor(sequences, dtype=torch.float32).view(-1, 1, 1, 1)
    new = new.expand(-1, HEADS, tokens, DIM).clone()
    keys, values = kept.cache.update(new, 2 * new, 0)
    assert torch.equal(values, 2 * keys)
    found: torch.Tensor = keys
    return found


def layer_of(kept: KeptKeys) -> KeptLayer:
    layer = kept.cache.layers[0]
    assert isinstance(layer, KeptLayer)
    return layer


def is_view(keys: torch.Tensor, kept: KeptKeys) -> bool:
    store = layer_of(kept).keys
    assert store is not None
    return keys.untyped_storage().data_ptr() == store.untyped_storage().data_ptr()


def test_rows_in_another_order_are_copied_once() -> None:
    kept = KeptKeys(1, 4, torch.device("cpu"))
    filled(kept, [10, 11, 12], [0, 0, 0], 5)
    assert is_view(filled(kept, [10, 11, 12], [5, 5, 5], 1), kept)
    views = list[bool]()
    for start in (6, 7, 8):
        keys = filled(kept, [12, 10], [start, start], 1)
        views.append(is_view(keys, kept))
        expected = torch.tensor([12.0, 10.0]).view(-1, 1, 1, 1).expand(-1, HEADS, start + 1, DIM)
        assert torch.equal(keys, expected)
    assert views == [False, True, True]
    assert torch.equal(filled(kept, [11], [6], 1), torch.full((1, HEADS, 7, DIM), 11.0))


def test_places_are_as_many_and_as_long_as_were_needed_at_a_time() -> None:
    kept = KeptKeys(1, 100, torch.device("cpu"))
    for sequence in range(20):
        filled(kept, [sequence], [0], 3)
        if sequence:
            kept.forget(sequence - 1)
    store = layer_of(kept).keys
    assert store is not None
    assert store.shape == (2, HEADS, BLOCK, DIM)
    filled(kept, [30], [0], BLOCK + 1)
    store = layer_of(kept).keys
    assert store is not None
    assert store.shape == (2, HEADS, 2 * BLOCK, DIM)
    assert (store[0, :, BLOCK + 1 :] == 0).all()
    assert len(kept) == 2


def test_what_does_not_follow_changes_nothing() -> None:
    kept = KeptKeys(1, 2, torch.device("cpu"))
    filled(kept, [1, 2], [0, 0], 3)
    for sequences, starts in (([1, 2], [0, 4]), ([1, 3], [0, 0])):
        with pytest.raises(UsageError):
            kept.begin(sequences, starts, 1)
    assert torch.equal(filled(kept, [1], [3], 1), torch.full((1, HEADS, 4, DIM), 1.0))


def test_nothing_is_left_at_a_place_that_is_free() -> None:
    """Whether its sequence was forgotten, began anew, or moved."""
    kept = KeptKeys(1, 4, torch.device("cpu"))
    for sequence in range(4):
        filled(kept, [sequence], [0], 5)
    kept.forget(0)
    kept.forget(1)
    for start in (5, 6):
        filled(kept, [3, 2], [start, start], 1)  # to places 0 and 1
    filled(kept, [3], [0], 2)
    store = layer_of(kept).keys
    assert store is not None
    assert (store[0, :, 2:] == 0).all()
    assert (store[2:] == 0).all()
