"""vLLM's server, started by the Python that `make vllm` names in VLLM_PYTHON."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from link import Link, hub_files
from lorax_async.engines.smollm2 import prepare_base
from vllm_stage import VllmServer, write_adapter

if "VLLM_PYTHON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

DEMO = ("pirate", "shout", "json")
SMALL = ("red", "green", "blue")
NAMES = (*DEMO, *SMALL)
COMMIT = "c" * 40
CACHED = ("--max-loras", "2", "--max-cpu-loras", "2")
HUGE = "org/huge"


@dataclass(frozen=True)
class World:
    """Adapters on disk, and an origin that serves them at 8 MB/s per connection."""

    root: Path
    folders: Mapping[str, Path]
    origin: Link
    dying: Link

    def url(self, name: str) -> str:
        return self.origin.url(f"{name}/")

    def start(
        self, log: str, *, plugin: bool, extension: str | None = None, **settings: str
    ) -> VllmServer:
        """Start a server; unless another extension is given, calls in its loop are timed."""
        if extension is None:
            extension = "vllm_timing.TimedExtension" if plugin else "vllm_timing.LoopTimes"
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",  # for collective_rpc
            "HF_ENDPOINT": self.origin.url("")[:-1],
            "HF_HOME": str(self.root / "hub"),
        }
        if plugin:
            environment |= {
                "LORAX_ASYNC_SOURCES": " ".join(
                    [
                        "hub",
                        self.origin.url(""),
                        self.dying.url(""),
                        str(self.folders["red"].parent),
                    ]
                ),
                "LORAX_ASYNC_ADAPTERS": f"alias={self.url('shout')}",
                "LORAX_ASYNC_CACHE_DIR": str(self.root / f"cache-{log}"),
                **settings,
            }
        return VllmServer(
            Path(os.environ["VLLM_PYTHON"]),
            prepare_base(),
            self.root / f"{log}.log",
            plugin=plugin,
            arguments=CACHED,
            environment=environment,
            extension=extension,
        )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, examples: Path) -> Iterator[World]:
    root = tmp_path_factory.mktemp("vllm")
    folders = {name: root / "adapters" / name for name in DEMO}
    for name in DEMO:
        shutil.copytree(examples / name, folders[name])
    for seed, name in enumerate(SMALL):
        folders[name] = write_adapter(root / "adapters" / name, rank=8, seed=seed, layers=6)
    others = root / "others"
    folders |= {
        "wrong-base": write_adapter(others / "wrong-base", rank=8, seed=7, layers=4, hidden=512),
        "deeper": write_adapter(others / "deeper", rank=8, seed=7, layers=31),
        "large-rank": write_adapter(others / "large-rank", rank=136, seed=7, layers=1),
        "huge": write_adapter(others / "huge", rank=128, seed=7),
        "cut": write_adapter(others / "cut", rank=8, seed=7, layers=2),
    }
    weights = folders["cut"] / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    files = {
        f"{name}/{file.name}": file for name, path in folders.items() for file in path.iterdir()
    }
    files |= hub_files(HUGE, COMMIT, folders["huge"], root)
    with (
        Link(files, rate=8e6, delay=0.01, commit=COMMIT) as origin,
        Link(files, rate=1e6, delay=0.01) as dying,
    ):
        yield World(root, folders, origin, dying)
