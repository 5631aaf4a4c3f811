"""Telling that a decision is under way, to whoever runs in the midst of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

_T = TypeVar("_T")


def undisturbed(owner: type[_T]) -> type[_T]:
    """Let `deciding` be true while a public method of an object runs.

    The interpreter may run a finalizer at any allocation: one that ends a lease must see that the
    books are open, and come again later.
    """
    for name, method in tuple(vars(owner).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            setattr(owner, name, _alone(method))
    return owner


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, self.deciding = self.deciding, True
        try:
            return method(self, *args, **kwargs)
        finally:
            self.deciding = before

    return alone
