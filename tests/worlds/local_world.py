"""A local source with two roots, and a check that nothing is left open afterwards."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import uvloop
from leaks import descriptors
from source_inputs import CONFIG, tensors

from lorax_async import AdapterRef, Limits, LocalRoot, errors
from lorax_async.sources.local import LocalSource

LIMITS = Limits(max_config_bytes=4096, max_adapter_bytes=1 << 24, max_header_bytes=1 << 20)
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILES = [CONFIG_NAME, WEIGHTS_NAME]


def maps_below(folder: Path) -> list[str]:
    """Return this process's maps of files below `folder`."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if f" {folder}/" in line]


class LocalWorld:
    def __init__(
        self, base: Path, threads: ThreadPoolExecutor, immutable: bool = False, hashes: bool = False
    ) -> None:
        self.holds = immutable
        self.roots, self.outside = [base / "first", base / "second"], base / "outside"
        for folder in (*self.roots, self.outside):
            folder.mkdir()
        roots = [LocalRoot(root, immutable=immutable) for root in self.roots]
        self.source = LocalSource(roots=roots, limits=LIMITS, threads=threads, hashes=hashes)

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        folder = self.roots[0] / name
        folder.mkdir(exist_ok=True)
        for file, content in ((CONFIG_NAME, config), (WEIGHTS_NAME, weights)):
            (folder / "new").write_bytes(content)
            (folder / "new").rename(folder / file)
        return self.ref(name)

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(self.roots[0] / name)

    def fill(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / CONFIG_NAME).write_bytes(CONFIG)
        safetensors.torch.save_file(tensors(1), folder / WEIGHTS_NAME)
        return folder


@contextmanager
def nothing_left_open(base: Path, **options: bool) -> Iterator[LocalWorld]:
    uvloop.new_event_loop().close()  # opens a pipe once in every process
    before = descriptors()
    with ThreadPoolExecutor(2) as threads:
        yield LocalWorld(base, threads, **options)
    assert descriptors() == before
    assert maps_below(base) == []


def refusal(
    world: LocalWorld, ref: AdapterRef | str | Path, kind: type[errors.LoraxError], *words: str
) -> errors.LoraxError:
    """Return the error of resolving `ref`: of exactly this kind, with these words."""
    ref = ref if isinstance(ref, AdapterRef) else AdapterRef(ref)
    with pytest.raises(errors.LoraxError) as caught:
        asyncio.run(world.source.resolve(ref))
    assert type(caught.value) is kind
    assert all(word in caught.value.problem for word in words), caught.value
    return caught.value


def touch(path: Path) -> None:
    os.utime(path, (5, 5))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)
