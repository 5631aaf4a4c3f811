"""Every access of an interpreted kernel is looked at: it is to an element of a tensor, or told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime import interpreter

from sgmv.arena import Arena

_LOADS_AND_STORES = "_interpreter"
"""Triton's name for the object that does them."""


class _Watched:
    """Triton's own loads and stores; `strays` counts elements outside an arena's tensors."""

    def __init__(self, inner: Any, arena: Arena) -> None:
        self.inner = inner
        self._base = arena.memory.data_ptr()
        self._owned = arena.owned().numpy()
        self.strays = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, addresses: Any, mask: Any, *rest: Any) -> Any:
        self._look(addresses[mask])
        return self.inner.load(addresses, mask, *rest)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._look(addresses[mask])
        return self.inner.store(addresses, value, mask)

    def _look(self, addresses: Any) -> None:
        places = addresses.astype("int64") - self._base
        inside = (places >= 0) & (places < len(self._owned))
        self.strays += int(len(places) - self._owned[places[inside]].sum())


@contextmanager
def watched(arena: Arena) -> Iterator[_Watched]:
    """While a kernel runs whose tensors are all in `arena`, and nothing is put there any more."""
    watching = _Watched(getattr(interpreter, _LOADS_AND_STORES), arena)
    setattr(interpreter, _LOADS_AND_STORES, watching)
    try:
        yield watching
    finally:
        setattr(interpreter, _LOADS_AND_STORES, watching.inner)
