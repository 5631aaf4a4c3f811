"""Bounded memories of the most recent items."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def remember(items: OrderedDict[K, V], key: K, value: V, limit: int) -> K | None:
    """Set the newest item. Drop the oldest over `limit`, and return its key."""
    items[key] = value
    items.move_to_end(key)
    return items.popitem(last=False)[0] if len(items) > limit else None
