"""A source of merges, over files that are here."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import safetensors.torch

import tiny
from lorax_async import Merge
from lorax_async.adapter import AdapterRef, MergedKey
from lorax_async.config import Limits
from lorax_async.io.sources.merged import MergedSource
from lorax_async.testing import FakeSource


class MergedWorld:
    """A fake source, and merges over it."""

    def __init__(self, threads: ThreadPoolExecutor, holds: bool) -> None:
        self.holds = holds
        self.inner = FakeSource(holdable=holds)
        self.source = MergedSource(
            self.inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads
        )

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        self.inner.put(name, config, weights)
        return AdapterRef(name)

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name)

    def stock(self) -> None:
        config = json.dumps(tiny.config()).encode()
        for seed, name in enumerate("abc"):
            self.put(name, config, safetensors.torch.save(tiny.tensors(seed)))

    def key(self, merge: Merge) -> MergedKey:
        if "a" not in self.inner._current:
            self.stock()
        return MergedKey.of(merge, [self.inner._current[name].key for name in "abc"])
