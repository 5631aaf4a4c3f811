"""Deployments of the tests, which Ray's workers import."""

import os
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ray import serve

from lorax_async import AdapterStore, StoreConfig
from lorax_async.config import Allow
from lorax_async.engines.ray.replicas import PublishedAdapters
from lorax_async.sources.local import WEIGHTS


class Replica(PublishedAdapters):
    """Answers with the digest of the adapter's weights on this replica's own disk."""

    adapters: AdapterStore

    async def __init__(  # type: ignore[misc]
        self, allow: tuple[Allow, ...], hub: str, caches: Path, revalidate: float
    ) -> None:
        config = StoreConfig(
            allow=allow,
            hub_endpoint=hub,
            hub_cache="off",
            cache_dir=Path(mkdtemp(dir=caches)),
            revalidate=revalidate,
        )
        self.adapters = AdapterStore(config)
        await self.adapters.__aenter__()

    async def __call__(self, adapter: str) -> dict[str, Any]:
        async with self.adapters.checkout(adapter) as folder:
            digest = sha256((folder.path / WEIGHTS).read_bytes()).hexdigest()
        return {"pid": os.getpid(), "digest": digest}


class Multiplexed(Replica):
    """The same with Ray's own cache of models, which its default router knows."""

    @serve.multiplexed(max_num_models_per_replica=100)  # type: ignore[untyped-decorator]
    async def model(self, adapter: str) -> dict[str, Any]:
        return await Replica.__call__(self, adapter)

    async def __call__(self, adapter: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.model(adapter)
        return answer
