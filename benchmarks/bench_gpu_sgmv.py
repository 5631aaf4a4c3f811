"""Mixed adapters on a GPU: the Triton kernels against torch, a bandwidth floor, and peers.

`--device interpreted` runs the same code in Triton's interpreter, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

import sgmv_peers
from bench_options import options, print_environment, write_json
from harness import print_table
from sgmv_peers import Call, NotMeasuredError
from sgmv_work import Batch, Size

Line = dict[str, object]

ROWS = ("decode", "prefill", "mixed", "group")
CACHE_BYTES = 192 << 20
"""Weights beyond every cache: a model comes back to a module after all others."""

MOST_MODULES = 64
COPY_BYTES = 256 << 20
TOLERANCE = 2**-6
"""Of the largest element: peers round where we do not."""

_LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096))
_RANKS = (8, 16, 64)
_DECODE = ((1,), (1,) * 8, (1,) * 32, (1,) * 128)
_PREFILL = ((512,), (64,) * 8, (16,) * 8, (256,) * 16)


def sizes(row: str) -> list[Size]:
    if row in {"decode", "prefill"}:
        batches = _DECODE if row == "decode" else _PREFILL
        return [
            Size(f"{row} {sum(rows)}/{len(rows)}", rows, (rank,) * len(rows), features)
            for features in _LLAMA
            for rank in _RANKS
            for rows in batches
        ]
    mixed = tuple(8 << n % 4 for n in range(16))
    skewed = (196, *[4] * 15)
    if row == "mixed":
        return [
            Size("mixed ranks, decode 16/16", (1,) * 16, mixed, _LLAMA[0]),
            Size("mixed ranks, skewed 256/16", skewed, mixed, _LLAMA[0]),
        ]
    return [
        Size("q, k, v, decode 16/16", (1,) * 16, mixed, _LLAMA[0]),
        Size("q, k, v, skewed 256/16", skewed, mixed, _LLAMA[0]),
    ]


SMALL = Size("smoke", (1, 3, 17), (8, 16, 8), (160, 48))


@dataclass(frozen=True, slots=True)
class Contender:
    """`call` adds a module's adapters to y; `why_not` says what kept it away."""

    name: str
    call: Call | None
    why_not: str = ""


class Clock:
    """Times calls on the GPU, by events around a graph of them."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.on_hardware = device.type == "cuda"
        self._rounds = rounds

    def us(self, calls: Sequence[Callable[[], None]]) -> tuple[float, str]:
        """Median µs of one call, and how they were launched. Raises what a call raises."""
        for call in calls[:2]:
            call()  # compiles
        if not self.on_hardware:
            return self._by_clock(calls), "interpreted"
        torch.cuda.synchronize()
        try:
            return self._by_events(self._graph(calls).replay) / len(calls), "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            return self._by_events(lambda: [call() for call in calls]) / len(calls), "launches"

    def launched_us(self, calls: Sequence[Callable[[], None]]) -> float | None:
        """The same without a graph: what a launch costs the host is in it."""
        if not self.on_hardware:
            return None
        return self._by_events(lambda: [call() for call in calls]) / len(calls)

    def copy_gb_s(self) -> float:
        """Of a plain copy on the device, both ways counted."""
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        if not self.on_hardware:
            return 2 * COPY_BYTES / self._by_clock([lambda: target.copy_(source)]) / 1e3
        return 2 * COPY_BYTES / self._by_events(lambda: target.copy_(source)) / 1e3

    def _graph(self, calls: Sequence[Callable[[], None]]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def _by_events(self, work: Callable[[], object]) -> float:
        """Median µs."""
        times: list[float] = []
        work()
        for _ in range(self._rounds):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) * 1e3)
        return statistics.median(times)

    def _by_clock(self, calls: Sequence[Callable[[], object]]) -> float:
        start = perf_counter()
        for call in calls:
            call()
        return (perf_counter() - start) / len(calls) * 1e6


def contenders(batch: Batch) -> list[Contender]:
    from lorax_kernels import sgmv

    def ours(y: torch.Tensor, module: int) -> None:
        sgmv.apply_group([y], batch.x, batch.plan, [module], batch)

    found = [Contender("ours", ours), Contender("torch per segment", batch.per_segment)]
    for name in ("vllm", "sglang"):
        try:
            found.append(Contender(name, getattr(sgmv_peers, name)(batch)))
        except NotMeasuredError as reason:
            found.append(Contender(name, None, str(reason)))
        except Exception as error:  # noqa: BLE001 - of a peer whose version nobody here knows
            found.append(Contender(name, None, f"{type(error).__name__}: {error}"))
    return found


def measure(size: Size, clock: Clock, gb_s: float, dtype: torch.dtype) -> list[Line]:
    nbytes = size.nbytes(dtype.itemsize)
    modules = min(MOST_MODULES, max(4, CACHE_BYTES // nbytes)) if clock.on_hardware else 2
    batch = Batch(size, modules, clock.device, dtype)
    floor = nbytes / gb_s / 1e3
    lines = []
    for contender in contenders(batch):
        line = _line(size, contender.name, nbytes, floor)
        if contender.call is None:
            lines.append({**line, "not_measured": contender.why_not})
            continue
        try:
            _check(batch, contender.call)
            calls = [partial(contender.call, batch.y, module) for module in range(modules)]
            us, how = clock.us(calls)
            lines.append({**line, "us": us, "how": how, "launched_us": clock.launched_us(calls)})
        except Exception as error:
            if contender.name == "ours":
                raise
            lines.append({**line, "not_measured": f"{type(error).__name__}: {error}"})
    return lines


def measure_group(size: Size, clock: Clock, gb_s: float, dtype: torch.dtype) -> list[Line]:
    """Three modules with one input: in two launches, and one after the other."""
    from lorax_kernels import sgmv

    batch = Batch(size, 3, clock.device, dtype)
    ys = [batch.y.clone() for _ in range(3)]
    nbytes = size.nbytes(dtype.itemsize, members=3)
    floor = nbytes / gb_s / 1e3

    def together() -> None:
        sgmv.apply_group(ys, batch.x, batch.plan, [0, 1, 2], batch)

    def alone() -> None:
        for module, y in enumerate(ys):
            sgmv.apply_group([y], batch.x, batch.plan, [module], batch)

    lines = []
    for name, call in (("ours, a group", together), ("ours, one by one", alone)):
        for y in ys:
            y.copy_(batch.y)
        call()
        for module, y in enumerate(ys):
            _require_close(y, batch.expected(module))
        us, how = clock.us([call] * 4)
        launched = clock.launched_us([call] * 4)
        lines.append(
            {**_line(size, name, nbytes, floor), "us": us, "how": how, "launched_us": launched}
        )
    return lines


def _line(size: Size, contender: str, nbytes: int, floor: float) -> Line:
    return {
        "row": size.name,
        "features": list(size.features),
        "ranks": sorted(set(size.ranks)),
        "contender": contender,
        "nbytes": nbytes,
        "floor_us": floor,
    }


def _check(batch: Batch, call: Call) -> None:
    """Once per contender, outside of the timer."""
    y = batch.y.clone()
    call(y, 1)
    _require_close(y, batch.expected(1))


def _require_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    off = float((y.double() - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise AssertionError(f"wrong by {off:.3g} of the largest element")


def print_lines(title: str, lines: Sequence[Line]) -> None:
    cells = []
    for line in lines:
        us, floor = line.get("us"), line["floor_us"]
        assert isinstance(floor, float)
        told = [f"{us:.1f}", f"{us / floor:.2f}"] if isinstance(us, float) else ["-", "-"]
        how = str(line.get("how", line.get("not_measured")))
        shape = f"{line['features']} rank {line['ranks']}"
        cells.append((str(line["row"]), shape, str(line["contender"]), *told, how))
    headings = ("batch", "features", "contender", "µs", "÷ floor", "how")
    print_table(f"{title}, medians, no target", headings, cells)


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--device", default="cuda")
    mine, rest = own.parse_known_args()
    if mine.device == "interpreted":
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured on hardware")
        return 0
    given = options(
        "bench_gpu_sgmv", __doc__ or "", rounds=30, rows=ROWS, arguments=rest, plots=False
    )
    device = torch.device("cpu" if mine.device == "interpreted" else mine.device)
    clock = Clock(device, given.rounds)
    hardware = torch.cuda.get_device_name(device) if clock.on_hardware else "none: interpreted"
    gb_s = clock.copy_gb_s()
    given.environment.update(device=mine.device, hardware=hardware, copy_gb_s=round(gb_s, 1))
    print_environment(given)
    lines: list[Line] = []
    for row in given.only:
        chosen = sizes(row) if clock.on_hardware else [SMALL]
        run = measure_group if row == "group" else measure
        found = [line for size in chosen for line in run(size, clock, gb_s, torch.bfloat16)]
        print_lines(row, found)
        lines += found
    write_json(given, ({"on_hardware": clock.on_hardware, **line} for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
