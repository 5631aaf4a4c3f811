"""Deployments of the tests, which Ray's workers import."""

import os
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ray import serve

from lorax_async import AdapterStore, StoreConfig
from lorax_async.config import Allow
from lorax_async.engines.ray.replicas import PublishedAdapters, join_fleet
from lorax_async.mirror import Peers
from lorax_async.sources.local import WEIGHTS


class Replica(PublishedAdapters):
    """Answers with the digest of the adapter's weights on this replica's own disk.

    With the name of a fleet, it takes adapters from its peers.
    """

    adapters: AdapterStore

    async def __init__(  # type: ignore[misc]
        self, allow: tuple[Allow, ...], hub: str, caches: Path, fleet: str
    ) -> None:
        self.peers = Peers("secret", trust=True, patience=60) if fleet else None
        config = StoreConfig(
            allow=allow,
            hub_endpoint=hub,
            hub_cache="off",
            cache_dir=Path(mkdtemp(dir=caches)),
            revalidate=0.5,
            peers=self.peers,
        )
        self.adapters = AdapterStore(config)
        await self.adapters.__aenter__()
        self._fleet = join_fleet(self.adapters, fleet)
        await self._fleet.__aenter__()

    async def members(self) -> tuple[int, int]:
        """Return the process, and how many mirrors it knows."""
        return os.getpid(), len(self.peers.members) if self.peers else 0

    async def __call__(self, adapter: str) -> dict[str, Any]:
        async with self.adapters.checkout(adapter) as folder:
            digest = sha256((folder.path / WEIGHTS).read_bytes()).hexdigest()
        problems = dict(self.peers.problems) if self.peers else {}
        return {"pid": os.getpid(), "digest": digest, "problems": problems}


class Multiplexed(Replica):
    """The same with Ray's own cache of models, which its default router knows."""

    @serve.multiplexed(max_num_models_per_replica=100)  # type: ignore[untyped-decorator]
    async def model(self, adapter: str) -> dict[str, Any]:
        return await Replica.__call__(self, adapter)

    async def __call__(self, adapter: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.model(adapter)
        return answer
