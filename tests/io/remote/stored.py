"""An adapter in a bucket, put there and read back by obstore, and brought here by our engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fetching import DATA, GROUPS, PATIENT, MemorySink, engine
from obstore.store import AzureStore, S3Store

from lorax_async.http.settings import PublicOnly
from lorax_async.remote.base import LocatedAdapter, RemoteFile
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.types import AdapterRef

CONFIG = b'{"peft_type": "LORA", "r": 8}'


def bucket(kind: str, name: str) -> AzureStore | S3Store:
    """As obstore sees it."""
    return (S3Store if kind == "s3" else AzureStore)(name)


@contextmanager
def locator(*, signed_for: float = 600.0) -> Iterator[StoreBackend]:
    with ThreadPoolExecutor(2, "lorax-test") as threads:
        made = StoreBackend(threads, PublicOnly(), signed_for=signed_for)
        try:
            yield made
        finally:
            made.close()


def located(id: str, revision: str | None = None) -> LocatedAdapter:
    with locator() as made:
        return asyncio.run(made.locate(AdapterRef(id, revision=revision)))


def brought(file: RemoteFile) -> bytes:
    """By ranges, as a source would: first the beginning, then the rest over many connections."""
    assert file.nbytes is not None
    with engine(4, timeouts=PATIENT) as fetching:
        answer = fetching.probe(file.target, 5_000, timeout=30).done.result(40)
        assert file.checked(answer) is answer
        assert answer.ranges
        sink, order = MemorySink(file.nbytes), list[int]()
        groups = GROUPS if file.nbytes == len(DATA) else [[(0, file.nbytes)]]
        job = fetching.download(answer, groups, sink, order.append, first=2, timeout=30)
        job.done.result(40)
        assert order == list(range(len(groups)))
        start = groups[1][0][0] if len(groups) > 1 else 0
        assert set(sink.times[start:]) == {1}, "all of it came, and came once"
        sink.data[:start] = answer.start[:start]
        return bytes(sink.data)
