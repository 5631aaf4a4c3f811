"""The rows of one forward pass: where their keys and values are, and what of them is masked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch


class Rows:
    """Sequences of which the same number of tokens is computed.

    Attributes
    ----------
    tokens
        New ones, of each row.
    length
        Of the longest row with its new tokens.
    """

    def __init__(
        self, places: Sequence[int], starts: Sequence[int], tokens: int, device: torch.device
    ) -> None:
        self.tokens = tokens
        self.length = max(starts) + tokens
        self._places = list(places)
        self._starts = list(starts)
        self._device = device
        first = places[0]
        self._together = self._places == list(range(first, first + len(places)))
        self._abreast = len(set(starts)) == 1
        """All rows have the same number of tokens."""

    def positions(self) -> torch.Tensor:
        """Of the new tokens: `[rows, tokens]`."""
        starts = torch.tensor(self._starts, device=self._device).unsqueeze(1)
        return starts + torch.arange(self.tokens, device=self._device)

    def mask(self) -> torch.Tensor | None:
        """Which of `length` tokens each row has, `[rows, length]`; None if it is all."""
        if self._abreast:
            return None
        ends = torch.tensor(self._starts, device=self._device).unsqueeze(1) + self.tokens
        return torch.arange(self.length, device=self._device) < ends

    def kept(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write `new` `[rows, heads, tokens, head_dim]` into a layer's store `[places, heads, …]`,
        and return what the rows have there, `[rows, heads, length, head_dim]`.
        """
        self._write(store, new)
        if self.length == self.tokens:
            return new
        if self._together:
            first = self._places[0]
            return store[first : first + len(self._places), :, : self.length]
        return store[:, :, : self.length].index_select(0, self._index)

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> None:
        if self._together and self._abreast:
            first = self._places[0]
            store[first : first + len(self._places), :, self.length - self.tokens : self.length] = (
                new
            )
        elif self.tokens == 1:
            store[self._index, :, self._ends] = new[:, :, 0]
        else:
            for place, start, row in zip(self._places, self._starts, new, strict=True):
                store[place, :, start : start + self.tokens] = row

    @cached_property
    def _index(self) -> torch.Tensor:
        return torch.tensor(self._places, device=self._device)

    @cached_property
    def _ends(self) -> torch.Tensor:
        return torch.tensor(self._starts, device=self._device)
