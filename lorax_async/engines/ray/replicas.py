"""What replicas publish for the router, and how they find their peers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from itertools import islice
from typing import Any

from lorax_async.engines.ray.routing import MAX_IDS, STATS, TIERS, ReplicaResidency
from lorax_async.loader import AdapterLoader
from lorax_async.mirror import AdapterMirror
from lorax_async.store import AdapterStore

# -- what replicas publish ------------------------------------------------------------------------


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


# -- peers ----------------------------------------------------------------------------------------

MEETING_SECONDS = 2.0
REPLY_SECONDS = 10.0
"""For the actor to answer; its process may have to start first."""

ABSENT_SECONDS = 20.0
"""A mirror that has not reported for this long is none any more."""


class MirrorDirectory:
    """An actor with the URLs of a fleet's mirrors. It may die: the next call makes a new one."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def report(self, url: str) -> list[str]:
        """Note that there is a mirror at `url`; return all that there are."""
        now = self._seen[url] = time.monotonic()
        self._seen = {url: at for url, at in self._seen.items() if now - at < ABSENT_SECONDS}
        return sorted(self._seen)


@asynccontextmanager
async def join_fleet(adapters: AdapterLoader | AdapterStore, fleet: str) -> AsyncIterator[None]:
    """Serve adapters to the replicas of a fleet, and take them from there, if `peers` is set.

    The members are known on entry. While their actor cannot be reached, they stay as they are.
    """
    peers = adapters.config.peers
    if peers is None:
        yield
        return
    import ray  # noqa: PLC0415

    name = f"lorax-mirrors-{fleet}"
    unavailable = ray.exceptions.RayError, ValueError, TimeoutError  # a race is a ValueError
    found_or_made = ray.remote(MirrorDirectory).options(
        name=name, namespace="lorax_async", get_if_exists=True, lifetime="detached", num_cpus=0
    )

    async def meet(url: str) -> None:
        with suppress(*unavailable):
            async with asyncio.timeout(REPLY_SECONDS):
                directory = await asyncio.to_thread(found_or_made.remote)
                peers.members = await directory.report.remote(url)

    async def keep_meeting(url: str) -> None:
        while True:
            await asyncio.sleep(MEETING_SECONDS)
            await meet(url)

    host = ray.util.get_node_ip_address()
    async with AdapterMirror(adapters, host=host, port=0) as mirror:
        await meet(mirror.url)
        meeting = asyncio.create_task(keep_meeting(mirror.url), name="lorax peers")
        try:
            yield
        finally:
            meeting.cancel()
            await asyncio.wait([meeting])
