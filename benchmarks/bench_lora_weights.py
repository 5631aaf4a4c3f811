"""All layer types of the 84 MB adapter in LoRAX's form, against the straightforward way."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from bench_loop_stall import COLUMNS, IDLE, Lateness, observe
from bench_options import Options, options, print_environment, write_json
from harness import (
    SEED,
    Contender,
    Loop,
    Measured,
    Row,
    WrongBytesError,
    measure,
    print_row,
    print_table,
    run_on,
)
from lorax_async import layouts
from lorax_async.adapters.layers import LayoutModel
from lorax_async.adapters.lora import LoraConfig, LoraWeights
from lorax_async.adapters.weights_file import WeightsFile
from work_files import LAYERS, PEFT_PREFIX, SCALE, TARGETS, AdapterFolder, write_adapter

TIMES_FASTER = 5.0
"""What the design asks of our row, against the per-module way."""

PER_MODULE = "per module"
OURS = "LoraWeights.load"

Stacks = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By layer type, A `[layers, r, in]` and B `[layers, r, out]`."""

_IDLE_SECONDS = 0.25


def names(target: str) -> Iterator[tuple[str, str]]:
    """The names of A and B of every layer of one target."""
    for layer in range(LAYERS):
        module = f"{PEFT_PREFIX}model.layers.{layer}.{target}"
        yield f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def stack(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A list of each layer's transposed factors, the scale in B; rank 16 needs no padding."""
    turned = [(a.transpose(0, 1), b.transpose(0, 1) * SCALE) for a, b in pairs]
    stored_a = [a.transpose(0, 1).contiguous() for a, _ in turned]
    return torch.stack(stored_a), torch.stack([b for _, b in turned])


class Loads:
    """The same adapter by every contender."""

    def __init__(self, folder: AdapterFolder) -> None:
        self.folder = folder
        self.model = LayoutModel(layouts.from_adapter(folder.path), torch.bfloat16, 1)
        self.loaded: Stacks = {}
        self.idle_seconds = _IDLE_SECONDS

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.folder.weights, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def per_module(self) -> None:
        self.loaded = {
            target: stack((self._tensor(a), self._tensor(b)) for a, b in names(target))
            for target in TARGETS
        }

    def one_safe_open(self) -> None:
        with safe_open(self.folder.weights, "pt") as file:
            self.loaded = {
                target: stack((file.get_tensor(a), file.get_tensor(b)) for a, b in names(target))
                for target in TARGETS
            }

    def floor(self) -> None:
        """One pass over the bytes, into memory that nobody touched before."""
        size = self.folder.file_size
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        file = os.open(self.folder.weights, os.O_RDONLY)
        try:
            if os.preadv(file, [memory], 0) != size:
                raise WrongBytesError("the floor did not read the whole file")
        finally:
            os.close(file)

    def ours(self) -> None:
        config = LoraConfig.load(self.folder.path, None)
        with WeightsFile.open(self.folder.path, None) as file:
            module_map, unused = config.map_weights_for_model(file, self.model.weight_names)
            for target in TARGETS:
                layer_type = target.rpartition(".")[2]
                self._keep(
                    target, LoraWeights.load(config, self.model, module_map, layer_type, unused)
                )

    async def ours_async(self) -> None:
        config = await LoraConfig.load_async(self.folder.path, None)
        with await WeightsFile.open_async(self.folder.path, None) as file:
            module_map, unused = config.map_weights_for_model(file, self.model.weight_names)
            for target in TARGETS:
                layer_type = target.rpartition(".")[2]
                weights = await LoraWeights.load_async(
                    config, self.model, module_map, layer_type, unused
                )
                self._keep(target, weights)

    def _keep(self, target: str, weights: LoraWeights | None) -> None:
        assert weights is not None
        self.loaded[target] = weights.weights_a, weights.weights_b

    def check(self) -> None:
        """Compare every stack with the file's own tensors, and let it go."""
        for target in TARGETS:
            stacked_a, stacked_b = self.loaded[target]
            for layer, (a, b) in enumerate(names(target)):
                same_a = torch.equal(stacked_a[layer], self.folder.tensors[a])
                if not (same_a and torch.equal(stacked_b[layer].T, SCALE * self.folder.tensors[b])):
                    raise WrongBytesError(f"{target}, layer {layer}")
        self.loaded = {}


def row(loads: Loads) -> Row:
    def awaited(work: Callable[[], None]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            work()

        return run

    def nothing() -> None:
        loads.loaded = {}

    return Row(
        None,
        [
            Contender("one pass over the bytes", "floor", awaited(loads.floor), nothing),
            Contender(OURS, "ours", awaited(loads.ours), loads.check),
            Contender(f"{OURS}, async", "peer", loads.ours_async, loads.check),
            Contender(PER_MODULE, "peer", awaited(loads.per_module), loads.check),
            Contender("one safe_open", "peer", awaited(loads.one_safe_open), loads.check),
        ],
    )


def load_lines(results: list[Measured]) -> list[dict[str, object]]:
    """With each contender's speed against the per-module way, by medians and by minima."""
    slow = next(result for result in results if result.contender == PER_MODULE)
    lines = []
    for result in results:
        times = slow.median / result.median
        reached = "reached" if times >= TIMES_FASTER else f"missed by {TIMES_FASTER - times:.1f} ×"
        lines.append(
            result.line()
            | {
                "times_faster": times,
                "times_faster_of_minima": min(slow.samples) / min(result.samples),
                "target": f"≥ {TIMES_FASTER:g} × faster" if result.role == "ours" else None,
                "verdict": reached if result.role == "ours" else None,
            }
        )
    return lines


def run_load(loads: Loads, given: Options) -> None:
    results = run_on("asyncio", lambda: measure("load", row(loads), "asyncio", given.rounds))
    print_row(f"84 MB, 7 layer types [{given.rounds} rounds]", results)
    lines = load_lines(results)
    for line in lines:
        times, minima = line["times_faster"], line["times_faster_of_minima"]
        verdict = f": {line['target']}, {line['verdict']}" if line["verdict"] else ""
        print(
            f"  {line['contender']}: {times:.1f} × {PER_MODULE} (of minima {minima:.1f}){verdict}"
        )
    write_json(given, lines)


async def measure_stalls(loads: Loads, rounds: int) -> dict[str, Lateness]:
    contenders: dict[str, Callable[[], Awaitable[object]]] = {
        IDLE: lambda: asyncio.sleep(loads.idle_seconds),
        f"{OURS}, async": loads.ours_async,
        f"{PER_MODULE}, in a thread": lambda: asyncio.to_thread(loads.per_module),
    }
    seen = {name: Lateness() for name in contenders}
    order, shuffle = list(contenders), random.Random(SEED).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:

            async def work(run: Callable[[], Awaitable[object]] = contenders[name]) -> None:
                await run()

            await observe(seen[name], work)
            if name != IDLE:
                loads.check()
    return seen


def stall_lines(loop: Loop, seen: dict[str, Lateness]) -> list[dict[str, object]]:
    idle = seen[IDLE]
    return [
        {
            "row": "stall",
            "loop": loop,
            "contender": name,
            "ticks": len(one.ticks),
            "work_median_ms": statistics.median(one.work),
            "p50_ms": one.quantile(0.5),
            "p99_9_ms": one.quantile(0.999),
            "max_ms": max(one.ticks),
            "p99_9_over_idle_ms": one.quantile(0.999) - idle.quantile(0.999),
            "max_over_idle_ms": max(one.ticks) - max(idle.ticks),
        }
        for name, one in seen.items()
    ]


def run_stall(loads: Loads, given: Options) -> None:
    loops: tuple[Loop, ...] = ("uvloop", "asyncio")
    for loop in loops:
        seen = run_on(loop, lambda: measure_stalls(loads, given.rounds))
        lines = stall_lines(loop, seen)
        cells = [
            (
                str(line["contender"]),
                *(f"{line[key]:.2f}" if key != "ticks" else f"{line[key]}" for key in COLUMNS),
            )
            for line in lines
        ]
        title = f"loop stall beside a load of 84 MB [{loop}, {given.rounds} rounds]"
        print_table(title, ("contender", *COLUMNS.values()), cells)
        write_json(given, lines)


ROWS = {"load": run_load, "stall": run_stall}


def main() -> int:
    given = options("bench_lora_weights", __doc__ or "", rounds=25, rows=tuple(ROWS), plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folder = write_adapter(Path(work) / "adapter", rank=16, dtype=torch.bfloat16, seed=1)
        loads = Loads(folder)
        loads.ours()  # imports peft
        loads.check()
        for name in given.only:
            ROWS[name](loads, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
