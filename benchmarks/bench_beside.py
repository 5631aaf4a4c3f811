"""A load over HTTP beside other downloads of the same origin, against the same load alone."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import perf_counter

import torch

from bench_options import Options, options, print_environment, write_json
from harness import print_table
from link import Link
from lorax_async import AdapterLoader, Allow, LoaderConfig, LoraxError, layouts
from lorax_async.config import MiB
from work_files import CONFIG, WEIGHTS, write_adapter

STALLS = 24
PREFETCHED_SECONDS, STALLED_SECONDS = 0.4, 2.0
"""From when the others begin to when the timed load does; by then it is known that they stall."""

WARM, TIMED, OTHER = "warm", "timed", "other"


@dataclass(frozen=True, slots=True)
class Row:
    """A link, as in bench_layer_order; what else is downloaded; the target of the ratio."""

    rate: float
    delay: float
    divisor: int
    shared: bool
    stalls: int
    target: float


ROWS = {
    "beside a prefetch, shared, 0.75 s": Row(14e6, 0.0, 8, True, 0, 1.10),
    "beside a prefetch, shared, 3 s": Row(3.5e6, 0.0, 8, True, 0, 1.10),
    "beside a prefetch, own 20 MB/s, 10 ms": Row(20e6, 0.01, 1, False, 0, 1.10),
    f"beside {STALLS} stalled, shared, 0.75 s": Row(14e6, 0.0, 8, True, STALLS, 1.30),
    f"beside {STALLS} stalled, own 20 MB/s, 10 ms": Row(20e6, 0.01, 1, False, STALLS, 1.30),
}


async def seconds_of(
    link: Link, folder: Path, cache: Path, given: Options, others: list[str], *, stalled: bool
) -> float:
    """Return the seconds of the timed load by a new loader that knows the link."""
    config = LoaderConfig(
        device_bytes=256 * MiB,
        max_slots=3,
        host_bytes=0,
        cache_dir=cache,
        io_threads=given.io_threads,
        allow=(Allow("http", "127.0.0.1", link.port),),
    )
    async with AdapterLoader(layouts.from_adapter(folder), config) as loader:
        (await loader.load(link.url(f"{WARM}/"))).release()

        async def begin(name: str) -> None:
            with suppress(LoraxError, TimeoutError):
                if stalled:
                    await loader.load(link.url(f"{name}/"), timeout=60)
                else:
                    await loader.prefetch([link.url(f"{name}/")])

        tasks = [asyncio.create_task(begin(name)) for name in others]
        if others:
            await asyncio.sleep(STALLED_SECONDS if stalled else PREFETCHED_SECONDS)
        start = perf_counter()
        (await loader.load(link.url(f"{TIMED}/"))).release()
        seconds = perf_counter() - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    rmtree(cache)
    return seconds


def measure(name: str, row: Row, work: Path, given: Options) -> dict[str, object]:
    folder = write_adapter(
        work / name, rank=16, dtype=torch.bfloat16, seed=1, divisor=row.divisor
    ).path
    others = [f"{OTHER}{n}" for n in range(row.stalls or 1)]
    files = {
        f"{name}/{file}": folder / file
        for name in (WARM, TIMED, *others)
        for file in (CONFIG, WEIGHTS)
    }
    stall_after = 1_000 if row.stalls else 0
    alone, beside = list[float](), list[float]()
    for _ in range(given.rounds):
        with Link(
            files,
            rate=row.rate,
            delay=row.delay,
            shared=row.shared,
            stall_after=stall_after,
            stalling=OTHER,
        ) as link:
            cache, stalled = work / "cache", row.stalls > 0
            for seconds, names in ((alone, []), (beside, others)):
                measured = seconds_of(link, folder, cache, given, names, stalled=stalled)
                seconds.append(asyncio.run(measured))
    rmtree(folder)
    return {
        "row": name,
        "rounds": given.rounds,
        "alone_s": alone,
        "beside_s": beside,
        "ratio": statistics.median(beside) / statistics.median(alone),
        "target": row.target,
    }


def print_rows(lines: Sequence[dict[str, object]]) -> None:
    cells = []
    for line in lines:
        shown = []
        for seconds in (line["alone_s"], line["beside_s"]):
            assert isinstance(seconds, list)
            median, least, most = statistics.median(seconds), min(seconds), max(seconds)
            shown.append(f"{median:.2f} ({least:.2f}-{most:.2f})")
        cells.append([str(line["row"]), *shown, f"{line['ratio']:.2f}", f"{line['target']:.2f}"])
    headings = ("", "alone, s", "beside, s", "ratio", "target")
    print_table("a load over HTTP beside other downloads of its origin", headings, cells)


def main() -> int:
    given = options("bench_beside", __doc__ or "", rounds=5, rows=tuple(ROWS), plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        lines = [measure(name, ROWS[name], Path(work), given) for name in given.only]
    print_rows(lines)
    write_json(given, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
