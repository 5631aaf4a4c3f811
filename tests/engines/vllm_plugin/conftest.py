"""vLLM's server, started by the Python that `make vllm` names in VLLM_PYTHON."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from link import Link, hub_files
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.sources.local import WEIGHTS
from vllm_stage import VllmServer, write_adapter

if "VLLM_PYTHON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

DEMO = ("pirate", "shout", "json")
SMALL = ("red", "green", "blue")
NAMES = (*DEMO, *SMALL)
COMMIT = "c" * 40
CACHED = ("--max-loras", "2", "--max-cpu-loras", "2")
HUGE, SPOILT = "org/huge", "org/spoilt"


@dataclass(frozen=True)
class World:
    """Adapters on disk, and an origin that serves them at 8 MB/s per connection."""

    root: Path
    folders: Mapping[str, Path]
    origin: Link
    dying: Link

    def url(self, name: str) -> str:
        return self.origin.url(f"{name}/")

    def entry(self, name: str, log: str) -> Path:
        """Return an adapter's folder in the cache of the server with this log."""
        weights = (self.folders[name] / WEIGHTS).read_bytes()
        files = (self.root / f"cache-{log}").glob(f"entries/*/{WEIGHTS}")
        return next(file.parent for file in files if file.read_bytes() == weights)

    def start(
        self,
        log: str,
        *,
        plugin: bool,
        extension: str | None = None,
        arguments: Sequence[str] = (),
        **settings: str,
    ) -> VllmServer:
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
            arguments=[*CACHED, *arguments],
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
        "spoilt": write_adapter(others / "spoilt", rank=8, seed=7, layers=1),
        "cut": write_adapter(others / "cut", rank=8, seed=7, layers=2),
    }
    weights = folders["cut"] / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    files = {
        f"{name}/{file.name}": file for name, path in folders.items() for file in path.iterdir()
    }
    for repo in (HUGE, SPOILT):
        files |= hub_files(repo, COMMIT, folders[repo.removeprefix("org/")], root)
    with (
        Link(files, rate=8e6, delay=0.01, commit=COMMIT) as origin,
        Link(files, rate=1e6, delay=0.01) as dying,
    ):
        with (folders["spoilt"] / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)  # the hub has named its digest
            file.write(bytes(100))
        yield World(root, folders, origin, dying)


def counts(server: VllmServer) -> dict[str, float]:
    """What the workers did, by event."""
    server.adapters()
    families = {f.name: f for f in text_string_to_metric_families(server.get("/metrics").body)}
    return {s.labels["event"]: s.value for s in families["lorax_worker_adapters"].samples}


def loaded(server: VllmServer) -> list[list[int]]:
    """The numbers of the adapters that each worker has, in slots or in vLLM's cache."""
    results: list[list[int]] = server.post("/collective_rpc", method="list_loras").json["results"]
    return results


def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    stop = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < stop, "it did not come to pass"
        time.sleep(0.1)
