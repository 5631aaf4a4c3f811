"""Where keys and values are: what is copied, and how much room is taken."""

from __future__ import annotations

import pytest
import torch

from lorax_async import UsageError
from lorax_async.server.decoding.kept_keys import BLOCK, KeptKeys, KeptLayer

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
