"""Keys and values of many sequences, as transformers' models ask for them in one forward pass.

Each sequence has a place, the same in every layer. A pass is of rows with the same number of new
tokens, so that no token is padded; what a row does not have is masked where lengths differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from lorax_async.errors import UsageError
from lorax_async.server.decoding.rows import Rows

BLOCK = 64
"""Tokens by which places become longer."""


class KeptKeys:
    """The places of sequences.

    Attributes
    ----------
    cache
        What the model is given as `past_key_values`, between `begin` and the end of the pass.

    Memory is `[places, heads, tokens, head_dim]` per layer, twice: as many places as there were
    sequences at a time, as long as the longest of them was, by `BLOCK` tokens.
    """

    def __init__(self, layers: int, max_sequences: int, device: torch.device) -> None:
        self._layers = [KeptLayer() for _ in range(layers)]
        self.cache: Any = Cache(layers=list(self._layers))  # untyped in transformers
        self._max_sequences = max_sequences
        self._device = device
        self._places: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._last: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Sequences that have places."""
        return len(self._places)

    def begin(self, sequences: Sequence[int], starts: Sequence[int], tokens: int) -> Rows:
        """The next pass computes so many tokens of each sequence, from these positions on.

        Raises `UsageError`, and changes nothing, if there are more sequences than places, or a
        sequence has other tokens than those before its start.
        """
        self._check(sequences, starts)
        for sequence, start in zip(sequences, starts, strict=True):
            if start == 0:
                self.forget(sequence)
                self._take(sequence)
            self._lengths[sequence] = start + tokens
        self._gather(sequences)
        places = [self._places[sequence] for sequence in sequences]
        rows = Rows(places, starts, tokens, self._device)
        for layer in self._layers:
            layer.begin(rows, max(self._places.values()) + 1)
        return rows

    def forget(self, sequence: int) -> None:
        """Its place is another's. Without effect if it has none."""
        place = self._places.pop(sequence, None)
        if place is not None:
            length = self._lengths.pop(sequence)
            for layer in self._layers:
                layer.clear(place, length)

    def _check(self, sequences: Sequence[int], starts: Sequence[int]) -> None:
        for sequence, start in zip(sequences, starts, strict=True):
            if start and self._lengths.get(sequence) != start:
                raise UsageError(
                    f"sequence {sequence} goes on at {start}, and has"
                    f" {self._lengths.get(sequence, 0)} tokens; begin it anew"
                )
        together = len(self._places.keys() | set(sequences))
        if together > self._max_sequences:
            raise UsageError(
                f"{together} sequences have keys and values, and max_sequences is"
                f" {self._max_sequences}; give the scheduler that number as max_begun"
            )

    def _take(self, sequence: int) -> None:
        taken = set(self._places.values())
        self._places[sequence] = next(n for n in range(self._max_sequences) if n not in taken)

    def _gather(self, sequences: Sequence[int]) -> None:
        """Rows that come again and again get places in their order: then nothing is copied."""
        again, self._last = tuple(sequences) == self._last, tuple(sequences)
        if not again or is_run([self._places[sequence] for sequence in sequences]):
            return
        others = [each for each in self._places if each not in set(sequences)]
        ordered = [*sequences, *others]
        before = [self._places[sequence] for sequence in ordered]
        for layer in self._layers:
            layer.move(before)
        self._places = {sequence: place for place, sequence in enumerate(ordered)}


def is_run(places: Sequence[int]) -> bool:
    """Whether they follow each other."""
    return list(places) == list(range(places[0], places[0] + len(places)))


class KeptLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's: `keys` and `values` `[places, heads, tokens, head_dim]`, and no NaN unasked.

    Masked values count 0 times, which is no number for one that is none: what is not a token is 0.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows: Rows | None = None
        self._size = 0, 0

    # -- between passes ----------------------------------------------------------------------------

    def begin(self, rows: Rows, places: int) -> None:
        """Have room for the rows of a pass; `places` is how many places there are."""
        self._rows = rows
        most, longest = self._size
        wanted = max(most, places), max(longest, -(-rows.length // BLOCK) * BLOCK)
        if wanted == self._size:
            return
        if self.is_initialized:
            self.keys, self.values = [_grown(kept, wanted) for kept in self._kept()]
        self._size = wanted

    def clear(self, place: int, length: int) -> None:
        for kept in self._kept():
            kept[place, :, :length] = 0

    def move(self, places: Sequence[int]) -> None:
        """What is at `places[n]` comes to place n; the others have nothing."""
        for kept in self._kept():
            index = torch.tensor(places, device=kept.device)
            moved = kept.index_select(0, index)
            kept[: len(places)] = moved
            kept[len(places) :] = 0

    def _kept(self) -> Iterable[torch.Tensor]:
        return [kept for kept in (self.keys, self.values) if kept is not None]

    # -- for the model -----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_new(made, self._size) for made in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows' new tokens `[rows, heads, tokens, head_dim]`; give all that they have."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rows is not None
        assert self.keys is not None
        assert self.values is not None
        rows = self._rows
        return rows.kept(self.keys, key_states), rows.kept(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._rows is None else self._rows.length - self._rows.tokens

    def get_max_length(self) -> int:
        return -1


def _new(like: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    places, tokens = size
    return like.new_zeros(places, like.shape[1], tokens, like.shape[3])


def _grown(kept: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    grown = _new(kept, size)
    grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown
