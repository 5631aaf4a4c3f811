"""The plans of the last batches: a server's next one often has the same rows.

A plan that is used again finds what the kernels made for it: buffers, weights put together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")

MOST = 4
"""Of two batches, a prefill's and a step's each. A plan keeps `Thresholds.kept_bytes` at most."""


class LastPlans(Generic[T]):
    """In any thread; the one that was used longest ago goes first."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The plan of this key; `make` is called where there is none, and must not wait."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = make()
                if len(self._plans) > self._most:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def forget(self) -> None:
        with self._lock:
            self._plans.clear()
