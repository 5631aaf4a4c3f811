"""What replicas publish for the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

from lorax_async.config import PEERS_REMOVED
from lorax_async.engines.ray.routing import MAX_IDS, STATS, TIERS, ReplicaResidency
from lorax_async.errors import ConfigError
from lorax_async.loader import AdapterLoader
from lorax_async.store import AdapterStore


class PublishedAdapters:
    """A mixin for deployments: publishes where adapters are, for `AdapterRouter`.

    The deployment sets `adapters` to its open loader or store. Requests must name adapters as its
    calls do, or else `adapter_names` returns each id's name.
    """

    adapters: AdapterLoader | AdapterStore

    def adapter_names(self) -> Mapping[str, str]:
        """Return the names by which requests know ids; an id without one is its own."""
        return {}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return what Ray Serve publishes to its routers."""
        residency = residency_of(self.adapters, self.adapter_names())
        return {STATS: asdict(residency)}


def residency_of(
    adapters: AdapterLoader | AdapterStore, names: Mapping[str, str] | None = None
) -> ReplicaResidency:
    """Return where adapters are now: at most `MAX_IDS`, the nearest to the device first."""
    loading, free_bytes, tiers = 0, 0, dict[str, str]()
    if isinstance(adapters, AdapterLoader):
        placement = adapters.placement()
        budget = placement.usage.device_bytes
        free_bytes = budget.limit - budget.used
        for id, where in placement.by_id.items():
            tiers[id] = where.tier
            loading += where.state == "filling"
    else:
        for id, stored in adapters.placement().items():
            if stored.state == "present":
                tiers[id] = "disk"
            loading += stored.state in {"resolving", "fetching", "checking"}
    nearest = sorted(tiers.items(), key=lambda item: TIERS.index(item[1]))
    called = names or {}
    return ReplicaResidency(
        {called.get(id, id): tier for id, tier in islice(nearest, MAX_IDS)}, free_bytes, loading
    )


def __getattr__(name: str) -> Any:
    if name == "join_fleet":
        raise ConfigError(PEERS_REMOVED)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
