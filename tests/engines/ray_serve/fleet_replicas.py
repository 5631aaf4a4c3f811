"""Deployments of the tests, which Ray's workers import."""

import os
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import urlsplit

from ray import serve

from lorax_async import AdapterStore, StoreConfig
from lorax_async.config import Allow
from lorax_async.engines.ray.replicas import PublishedAdapters, join_fleet
from lorax_async.sources.local import WEIGHTS


class Replica(PublishedAdapters):
    """Answers with the digest of the adapter's weights on this replica's own disk."""

    adapters: AdapterStore

    async def __init__(  # type: ignore[misc]
        self, origin: str, caches: Path, fleet: str
    ) -> None:
        url = urlsplit(origin)
        allow = (Allow("http", str(url.hostname), url.port),)
        folder = Path(mkdtemp(dir=caches))
        self.adapters = AdapterStore(StoreConfig(allow=allow, cache_dir=folder, revalidate=0.5))
        await self.adapters.__aenter__()
        self._fleet = join_fleet(self.adapters, fleet)
        await self._fleet.__aenter__()

    async def __call__(self, adapter: str) -> dict[str, Any]:
        async with self.adapters.checkout(adapter) as folder:
            digest = sha256((folder.path / WEIGHTS).read_bytes()).hexdigest()
            return {"pid": os.getpid(), "digest": digest, "downloaded": folder.downloaded}


class Multiplexed(Replica):
    """The same with Ray's own cache of models, which its default router knows."""

    @serve.multiplexed(max_num_models_per_replica=100)  # type: ignore[untyped-decorator]
    async def model(self, adapter: str) -> dict[str, Any]:
        return await Replica.__call__(self, adapter)

    async def __call__(self, adapter: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.model(adapter)
        return answer
