"""Count the Python calls of one load of the 84 MB adapter, in all threads: no noise hides them.

python benchmarks/bench_calls.py             # totals, and calls by module
python benchmarks/bench_calls.py --by file   # by file, or by function
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lorax_async
from harness import print_table
from link import Link
from lorax_async import AdapterLoader, Allow, LoaderConfig, layouts
from lorax_async.config import MiB
from work_files import CONFIG, WEIGHTS, write_adapter

PACKAGE = f"{Path(lorax_async.__file__).parent}/"
TARGETS = {"seen before": 1_200, "header met": 1_600, "first sight": 2_000, "over HTTP": 6_000}


class Calls:
    """Counts calls of Python functions, by module, file or function."""

    def __init__(self, by: str) -> None:
        self.counts: Counter[str] = Counter()
        self._by = by
        self._counting = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See the calls of this thread, and of those that start meanwhile."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        self.counts = Counter()
        self._counting = True
        try:
            yield self.counts
        finally:
            self._counting = False

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not self._counting:
            return
        code = frame.f_code
        file = code.co_filename
        name = file.removeprefix(PACKAGE) if file.startswith(PACKAGE) else "libraries"
        if self._by == "function":
            name = f"{name if name != 'libraries' else Path(file).name}: {code.co_qualname}"
        elif self._by == "module":
            name = name.partition("/")[0].removesuffix(".py")
        self.counts[name] += 1


async def count_loads(work: Path, by: str) -> dict[str, Counter[str]]:
    """Return the calls of each kind of load, of the second of its kind."""
    folders = [
        write_adapter(work / str(n), rank=16, dtype=torch.bfloat16, seed=n, mark=n // 2).path
        for n in range(6)
    ]
    served = {f"{n}/{name}": folders[n] / name for n in (4, 5) for name in (CONFIG, WEIGHTS)}
    calls, found = Calls(by), {}
    with Link(served, rate=0.0, delay=0.0) as link, calls.installed():
        config = LoaderConfig(
            device_bytes=88 * MiB,
            max_slots=1,
            host_bytes=0,
            cache_dir=work / "cache",
            allow=(Allow("http", "127.0.0.1", link.port),),
        )
        async with AdapterLoader(layouts.from_adapter(folders[0]), config) as loader:
            loads: list[tuple[str, Path | str]] = [
                *(("first sight", folders[n]) for n in (0, 2)),
                *(("header met", folders[n]) for n in (1, 3)),
                *(("seen before", folders[n]) for n in (0, 2)),
                *(("over HTTP", link.url(f"{n}/")) for n in (4, 5)),
            ]
            for kind, id in loads:
                with calls.counting() as found[kind]:
                    (await loader.load(id)).release()
                await asyncio.sleep(0.3)  # what follows a load belongs to none
    return found


def print_calls(found: Mapping[str, Counter[str]], shown: int) -> None:
    kinds = [kind for kind in TARGETS if kind in found]
    names = [name for name, _ in sum(found.values(), Counter()).most_common(shown)]
    cells = [[name, *(f"{found[kind][name]:,}" for kind in kinds)] for name in names]
    totals = ["all", *(f"{found[kind].total():,}" for kind in kinds)]
    targets = ["target", *(f"{TARGETS[kind]:,}" for kind in kinds)]
    print_table("Python calls of one load", ["", *kinds], [totals, targets, *cells])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", choices=("module", "file", "function"), default="module")
    parser.add_argument("--shown", type=int, default=24, help="lines of the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = asyncio.run(count_loads(Path(work), given.by))
    print_calls(found, given.shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
